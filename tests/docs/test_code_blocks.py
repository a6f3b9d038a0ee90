"""Every block of code in the repository's pages runs as printed, in the order of its page.

Python blocks of a page share a namespace. The commands of its shell blocks run in this process, in a folder that has
nothing but the repository's recipes and the page's own files in it: `trl-dllm` with the arguments of `SHRUNK` behind
those that are printed, `make` with `-n`. A block whose first line is `# name.py` or `# name.yaml` is that file.
`NOT_RUN` is what is left out. Configs are built as on a GPU, where bfloat16 is TRL's default.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from trl_dllm import cli
from trl_dllm.trainer.model_card import rewrite_quick_start


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# What makes a command short; everything else is the page's. Of two values of an argument, the last one counts.
SHRUNK = {
    "init-tiny": "",
    "sft": "--max_steps 2 --num_train_examples 64 --per_device_train_batch_size 8 --disable_tqdm true",
    "dpo": "--max_steps 2 --num_train_examples 64 --num_eval_examples 8 --per_device_train_batch_size 8 "
    "--disable_tqdm true",
    "grpo": "--max_steps 2 --num_train_examples 64 --per_device_train_batch_size 8 --disable_tqdm true",
    "eval": "--num_examples 8",
    "generate": "",
    "report": "--num_examples 4 --batch_size 4",
    "report curves": "--against steps",
    "trace": "--num_examples 2",
    "merge": "",
    "recipe": "",
}

# Beginning of a command -> why it is not run.
NOT_RUN = {
    "pip install": "it changes the environment that the tests run in, and needs a package index",
    **{
        f"trl-dllm {command} {flag}": "it takes the GPUs of a machine: test_scaling.py takes it up to its processes"
        for command, flag in (
            ("grpo", "--num_processes"),
            ("grpo", "--accelerate_config"),
            ("sft", "--accelerate_config"),
        )
    },
    "accelerate launch": "it takes the GPUs of a machine; tests/test_evaluation.py launches it on two processes",
    "python benchmarks/any_order_comparison.py": "it trains for four minutes a seed",
    "python benchmarks/language.py": "it trains for hours; tests/benchmarks/test_language.py runs it at toy size",
    "python benchmarks/study.py": "it trains for an hour; tests/benchmarks/test_study.py runs it at toy size",
    "python benchmarks/any_order_loop.py": "tests/benchmarks/test_any_order.py runs it at toy size",
    "python benchmarks/loop.py": "tests/test_loop.py runs it",
    "python benchmarks/rollout.py": "tests/benchmarks/test_rollout.py runs it at toy size",
    "python benchmarks/step.py": "tests/test_step.py runs it",
    "python benchmarks/gpu.py": "tests/test_gpu.py runs it",
    "trl-dllm trace --model_name_or_path runs/demo/grpo": "`make demo` trains that model for minutes",
    "python tests/helpers_browser.py": "it takes a picture with a browser; tests/test_trace.py drives one",
    "python docs/examples/engine_server.py": "it serves for ever; a test below runs it",
}

SERVED = ROOT / "docs" / "engines.md"  # whose Python needs the server that it describes; a test below runs both

NOT_CODE = {"", "diff", "math"}  # output, a comparison, a formula


def blocks(text: str) -> list[tuple[str, str, int]]:
    """(language, content, number of its first line) of each fenced block of a page."""
    tokens = MarkdownIt("commonmark").parse(text)
    return [(token.info.strip(), token.content, token.map[0] + 2) for token in tokens if token.type == "fence"]


def files(text: str) -> dict[str, str]:
    """The files that a page prints, by name."""
    printed = [content for language, content, _ in blocks(text) if language in ("python", "yaml")]
    named = [(re.match(r"# (\w+\.(?:py|yaml))\n", content), content) for content in printed]
    return {match[1]: content for match, content in named if match}


def commands(content: str) -> list[list[str]]:
    """The commands of a shell block as lists of words, without comments."""
    lines = content.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def of_language(language: str) -> list[Path]:
    return [page for page in PAGES if any(found == language for found, *_ in blocks(page.read_text()))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_python(text: str, where: str) -> None:
    namespace: dict[str, object] = {"__name__": "__page__"}
    for language, content, line in blocks(text):
        if language == "python":
            exec(compile("\n" * (line - 1) + content, where, "exec"), namespace)  # a traceback has the page's lines


# Those that measure a step of 8B, and those whose commands take more than five seconds together.
MARKS = dict.fromkeys(("scaling.md", "index.md", "faq.md", "trace.md"), pytest.mark.slow)


def not_run(words: list[str]) -> str | None:
    return next((start for start in NOT_RUN if words[: len(start.split())] == start.split()), None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where commands run: the recipes, the outputs that docs/parsers.md scores, the logs that docs/runs.md draws."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    row = {"question": "1 + 1?", "generations": r"<answer>\boxed{2}</answer>", "ground_truth": 2}
    (tmp_path / "gsm8k_256.jsonl").write_text(json.dumps(row) + "\n")
    for run in ("step_merge/seed-0", "step_merge/seed-1", "pkl"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        log = [{"step": step, "reward": 0.1 * step} for step in (1, 2)]
        (tmp_path / "runs" / run / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(folder, monkeypatch):
    """`write(page)`: its files, as in a folder of one's own."""

    def write(page: Path) -> None:
        monkeypatch.setattr(sys, "path", [*sys.path])
        for name, content in files(page.read_text()).items():
            (folder / name).write_text(content)

    return write


@pytest.fixture
def bfloat16(monkeypatch):
    """transformers refuses TRL's default precision where there is neither a GPU nor `use_cpu`."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=MARKS.get(p.name, ())) for p in of_language("python") if p != SERVED], ids=name
)
def test_python_blocks_run(page, folder, bfloat16):
    run_python(page.read_text(), str(page))


@pytest.mark.parametrize("page", [pytest.param(p, marks=MARKS.get(p.name, ())) for p in of_language("bash")], ids=name)
def test_shell_blocks_run(page, folder, write):
    write(page)
    for language, content, _ in blocks(page.read_text()):
        for words in commands(content) if language == "bash" else []:
            if not_run(words):
                assert all((ROOT / word).exists() for word in words if word.endswith(".py")), words
            elif words[0] == "make":
                clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
                subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, env=clean, check=True, capture_output=True)
            elif words[0] == "python":
                assert words[1] in files(page.read_text()), f"{name(page)}: nothing here runs {words}"
                runpy.run_path(words[1], run_name="__main__")
            else:
                command = " ".join(words[1:3]) if words[1:3] == ["report", "curves"] else words[1]
                assert words[0] == "trl-dllm" and command in SHRUNK, f"{name(page)}: nothing here runs {words}"
                cli.main([*words[1:], *([] if "--dry_run" in words else SHRUNK[command].split())])


def test_every_block_is_code_that_runs_or_no_code():
    for page in PAGES:
        for language, block, line in blocks(page.read_text()):
            known = {"python", "bash", *NOT_CODE}
            if language == "yaml":  # which a command of the page reads
                (file,) = [name for name, content in files(page.read_text()).items() if content == block]
                assert f"--config {file}" in page.read_text(), f"{page}:{line}: no command reads {file}"
                continue
            assert language in known, f"{page}:{line}: nothing runs blocks of {language!r}"


def test_what_is_not_run_is_printed_somewhere():
    shell = [content for page in PAGES for language, content, _ in blocks(page.read_text()) if language == "bash"]
    printed = [words for content in shell for words in commands(content)]
    assert {not_run(words) for words in printed} - {None} == set(NOT_RUN)


def test_the_snippet_of_a_model_card_runs(tmp_path, capsys):
    model = tmp_path / "model"
    cli.main(["init-tiny", str(model), "--hidden_size", "16", "--num_layers", "1"])
    card = tmp_path / "README.md"
    card.write_text("# A model\n\n## Quick start\n\n```python\nraise AssertionError\n```\n")
    rewrite_quick_start(str(tmp_path), str(model), {"max_new_tokens": 8, "block_length": 4, "diffusion_steps": 2})
    capsys.readouterr()
    run_python(card.read_text(), str(card))
    assert capsys.readouterr().out.startswith("['")


@pytest.fixture
def port(tmp_path, monkeypatch):
    """A server on the page's model, started with the page's arguments and a free port."""
    monkeypatch.chdir(tmp_path)
    cli.main(["init-tiny", "runs/tiny_llada/init", "--hidden_size", "16", "--num_layers", "1"])
    printed = [content for language, content, _ in blocks(SERVED.read_text()) if language == "bash"]
    (command,) = [words for content in printed for words in commands(content) if words[0] == "python"]
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


def test_the_page_of_engines_trains_on_its_servers_completions(port):
    (code,) = [content for language, content, _ in blocks(SERVED.read_text()) if language == "python"]
    namespace: dict = {"__name__": "__page__"}
    exec(compile(code.replace("127.0.0.1:8000", f"127.0.0.1:{port}"), str(SERVED), "exec"), namespace)
    log = [entry for entry in namespace["trainer"].state.log_history if "sampling/mismatch_max" in entry]
    assert len(log) == 2 and all(entry["grad_norm"] > 0 for entry in log), "nothing was learned"
    # The server has the trainer's weights in the second step too: what differs is rounding.
    assert all(entry["sampling/mismatch_max"] < 1e-4 for entry in log)
