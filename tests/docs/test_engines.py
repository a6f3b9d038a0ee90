"""docs/engines.md: the server runs as printed, and the page's trainer draws from it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_blocks import blocks

from trl_dllm import cli


ROOT = Path(__file__).parents[2]


@pytest.fixture
def port(tmp_path, monkeypatch):
    """A server on the page's model, started with the page's arguments and a free port."""
    monkeypatch.chdir(tmp_path)
    cli.main(["init-tiny", "runs/tiny_llada/init", "--hidden_size", "16", "--num_layers", "1"])
    page = (ROOT / "docs" / "engines.md").read_text()
    (command,) = [content.split() for language, content, _ in blocks(page) if language == "bash"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    server = subprocess.Popen(
        [sys.executable, str(ROOT / command[1]), *command[2:], "--port", "0"],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    try:
        yield int(server.stdout.readline().split()[-1])
    finally:
        server.kill()
        server.communicate()


def test_the_page_trains_on_the_servers_completions(port):
    page = ROOT / "docs" / "engines.md"
    (code,) = [content for language, content, _ in blocks(page.read_text()) if language == "python"]
    namespace: dict = {"__name__": "__page__"}
    exec(compile(code.replace("127.0.0.1:8000", f"127.0.0.1:{port}"), str(page), "exec"), namespace)
    log = namespace["trainer"].state.log_history
    assert log[-1]["train_loss"] is not None and namespace["trainer"].state.global_step == 2
    # The server's model is the trainer's: what differs is rounding.
    assert namespace["Client"]().step == 0 and namespace["trainer"].rollout_func is not None
    mismatch = [entry["sampling/mismatch_max"] for entry in log if "sampling/mismatch_max" in entry]
    assert mismatch and max(mismatch) < 1e-4
