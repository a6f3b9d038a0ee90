import os
import time

import attacks
import pytest
from helpers_inside import start_caller

from trl_dllm.sandbox.inside import other_user
from trl_dllm.sandbox.inside.folders import remove_folder
from trl_dllm.sandbox.inside.other_user import elsewhere, kill_all


pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the kind 'uid' is for root")
WITHOUT_LANDLOCK = (
    "import sys; sys.path.insert(0, sys.argv[1]); import inside.landlock; "
    "inside.landlock.landlock_version = lambda: 0; import inside.other_user; "
    "inside.other_user.landlock_version = lambda: 0; "
)


def test_a_killed_caller_leaves_nothing():
    before = set(attacks.leftovers()), attacks.left_files()
    caller = start_caller("uid", "import os, time\nopen('f', 'w').close()\nos.fork()\ntime.sleep(300)")
    deadline = time.monotonic() + 20
    while len(set(attacks.leftovers()) - before[0]) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(set(attacks.leftovers()) - before[0]) >= 2 and attacks.left_files() - before[1]
    caller.kill()
    while set(attacks.leftovers()) - before[0] or attacks.left_files() - before[1]:
        assert time.monotonic() < deadline + 20
        time.sleep(0.05)


def test_a_killed_monitor_takes_its_program_along():
    before, files = set(attacks.leftovers()), attacks.left_files()
    caller = start_caller("uid", "import time\ntime.sleep(300)")
    deadline = time.monotonic() + 20
    while not (program := set(attacks.leftovers()) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    for pid in program:
        with open(f"/proc/{pid}/stat") as file:
            monitor = int(file.read().split()[3])
        os.kill(monitor, 9)
    while program & set(attacks.leftovers()):
        assert time.monotonic() < deadline + 20
        time.sleep(0.05)
    caller.kill()  # which has started another one
    while set(attacks.leftovers()) - before:
        assert time.monotonic() < deadline + 20
        time.sleep(0.05)
    for path in attacks.left_files() - files:  # nobody was left to remove it
        remove_folder(path)


def test_without_landlock_what_is_left_elsewhere_is_counted_and_removed():
    code = (
        "import os, time\nopen(f'/tmp/trl-dllm-test-{os.getpid()}', 'w').close()\n"
        "os.makedirs(f'/var/tmp/trl-dllm-test-{os.getpid()}/a/b')\nprint('written')\n"
    )
    before = attacks.left_files()
    caller = start_caller("uid", code, WITHOUT_LANDLOCK)
    answer, _ = caller.communicate()
    assert "passed=True" in answer and "written" in answer
    assert attacks.left_files() == before
    big = "open(f'/tmp/trl-dllm-test-{os.getpid()}-{i}', 'wb') as f: f.write(bytes(8 << 20))\n"
    code = f"import os, time\nfor i in range(10):\n    with {big}time.sleep(60)"
    caller = start_caller("uid", code, WITHOUT_LANDLOCK)
    answer, _ = caller.communicate()
    assert "reason='disk'" in answer
    assert attacks.left_files() == before


def test_with_landlock_nothing_else_is_seen():
    if not other_user.landlock_version():
        pytest.skip("this kernel has no Landlock")
    code = (
        "import os\n"
        "def can(path, mode):\n    try: return not open(path, mode).close()\n    except OSError: return False\n"
        "print(can('/etc/passwd', 'r'), can('/tmp/trl-dllm-test', 'w'), can('/proc/self/status', 'r'), can('x', 'w'))"
    )
    answer, _ = start_caller("uid", code).communicate()
    assert "stdout='False False False True\\n'" in answer


def test_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.chown(tmp_path / "file", 4242, 4242)
    os.symlink("nowhere", tmp_path / "link")
    os.lchown(tmp_path / "link", 4242, 4242)
    monkeypatch.setattr(other_user, "PLACES", (str(tmp_path), str(tmp_path / "missing")))
    monkeypatch.setattr(other_user, "landlock_version", lambda: 0)
    assert sorted(elsewhere(4242)) == [str(tmp_path / "file"), str(tmp_path / "link")]
    monkeypatch.setattr(other_user, "landlock_version", lambda: 1)
    assert elsewhere(4242) == []


def test_every_process_of_a_user_ends():
    uid = 1_999_999_999
    child = os.fork()
    if child == 0:
        os.setresuid(uid, uid, uid)
        os.setsid()
        time.sleep(60)
        os._exit(0)
    time.sleep(0.2)
    pid = os.fork()  # as `kill_all` collects all the children there are
    if pid == 0:
        kill_all(uid)
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
