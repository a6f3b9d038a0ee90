"""Done once for all processes of a launch; an error is everybody's."""

import os
import subprocess
import sys

import pytest

from trl_dllm.processes import on_main_process, say


SCRIPT = """
from trl_dllm.processes import on_main_process, process_state, say

rank = process_state().process_index

def fail():
    raise ValueError(f"of {rank}")

found = on_main_process(lambda: {"rank": rank})
say(f"said by {rank}")
try:
    on_main_process(fail)
except ValueError as error:
    print(f"{rank} of {process_state().num_processes}: {found} {error}\\n", end="", flush=True)
process_state().destroy_process_group()
"""


def test_one_process_does_it_itself(capsys):
    assert on_main_process(lambda: 3) == 3
    with pytest.raises(KeyError, match="x"):
        on_main_process(lambda: {}["x"])
    say("a line")
    assert capsys.readouterr().out == "a line\n"


@pytest.mark.slow
def test_of_two_processes_the_first_does_it_for_both(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [*launch, str(tmp_path / "script.py")], env=environment, check=True, capture_output=True, text=True
    )
    lines = sorted(line for line in result.stdout.splitlines() if line)
    assert lines == ["0 of 2: {'rank': 0} of 0", "1 of 2: {'rank': 0} of 0", "said by 0"]
