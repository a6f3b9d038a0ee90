"""MATH: competition problems with answers in LaTeX; MATH-500 is its usual test set.

Answers are compared by `math-verify` (`pip install trl-dllm[eval]`), in a process of its own that can be stopped: its
own time limits are signals, which only the main thread may use and which long integer arithmetic does not notice.
"""

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from .base import Task, check_load_arguments, completion_text, last_boxed, marked_answers
from .d1_math500 import d1_boxed_and_answer_tags_reward, d1_math_correctness_reward, d1_score
from .data import choose, read_rows, to_dataset


FILES = {"train": "math/train.jsonl", "test": "math500/test.jsonl"}
HUB = {"train": ("ankner/math-500", None, "train"), "test": ("HuggingFaceH4/MATH-500", None, "test")}

CHAT_PROMPT = (
    "{question}\n\n"
    "Reason step by step. Use exactly this layout, with the final answer in a box:\n"
    "<reasoning>\nyour steps\n</reasoning>\n<answer>\n\\boxed{{the answer}}\n</answer>"
)

MAX_ANSWER = 300  # characters of an answer that are compared; longer ones are equal only if they are the same text
VERIFY_SECONDS = 5.0
START_SECONDS = 120.0  # importing SymPy on a busy machine
VERIFY_MEMORY = 4 * 2**30


def load(
    split: str,
    num_examples: int | None = None,
    seed: int = 0,
    prompt_format: str = "chat",
    data_dir: str | None = None,
    allow_test_as_train: bool = False,
) -> Dataset:
    """
    Problems and their answers: 500 in "test" (MATH-500), the rest of MATH in "train".

    Columns: `prompt`, `question`, `answer` (LaTeX, without the box), `completion` (for SFT: the published solution
    where there is one, and the boxed answer). From the Hub, or from `math500/test.jsonl` and `math/train.jsonl`
    (`problem`, and `answer` or a `solution` with a box) in `data_dir` or TRL_DLLM_DATA. "train" is shuffled by `seed`.

    Raises `ValueError` for what does not exist; `allow_test_as_train` is explained at `data.read_rows`.
    """
    check_load_arguments(split, num_examples, prompt_format)
    rows = choose(read_rows("math", split, FILES, HUB, data_dir, allow_test_as_train), split, num_examples, seed)
    questions, golds, completions = [], [], []
    for row in rows:
        solution = row.get("solution") or ""
        gold = row.get("answer") or last_boxed(solution)
        if gold is None:
            raise ValueError(f"a row of {split!r} has neither an answer nor a boxed one: {str(row)[:200]}")
        questions.append(row["problem"])
        golds.append(gold)
        boxed = f"\\boxed{{{gold}}}"
        if prompt_format == "chat":
            completions.append(f"<reasoning>\n{solution}\n</reasoning>\n<answer>\n{boxed}\n</answer>")
        else:
            completions.append(f"{solution}\n{boxed}".strip())
    if prompt_format == "chat":
        prompts = [CHAT_PROMPT.format(question=question) for question in questions]
    else:
        prompts = [f"Problem: {question}\nSolution: " for question in questions]
    return to_dataset(prompts, completions, {"question": questions, "answer": golds}, prompt_format)


# ---------------------------------------------------------------------------------------------------------------------
# Equivalence

_WORKER = """
import json, logging, resource, sys
limit = int(sys.argv[1])
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
from math_verify import parse, verify
logging.disable(logging.CRITICAL)
out = sys.stdout
sys.stdout = sys.stderr
print("ready", file=out, flush=True)
for line in sys.stdin:
    try:
        answer, gold = ("\\\\boxed{" + text + "}" for text in json.loads(line))
        equal = verify(parse(gold, parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None)
    except (Exception, MemoryError, RecursionError):
        equal = False
    print(int(bool(equal)), file=out, flush=True)
"""


class _Verifier:
    """math-verify in a child process, started when first needed, and again after it had to be stopped."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process = None
        self.owner = None

    def equal(self, answer: str, gold: str) -> bool:
        with self.lock:
            if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
                self._start()
            try:
                self.process.stdin.write(json.dumps([answer, gold]).encode() + b"\n")
                self.process.stdin.flush()
                line = self._line(VERIFY_SECONDS)
            except OSError:
                line = None
            if line is None:  # too slow, or dead
                self.stop()
            return line == b"1"

    def _start(self) -> None:
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(VERIFY_MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        if self._line(START_SECONDS) != b"ready":
            self.stop()
            raise RuntimeError("math-verify could not be started in a process of its own.")

    def _line(self, seconds: float) -> bytes | None:
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline().strip() if ready else None

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None and self.owner == os.getpid():
            process.kill()
            with contextlib.suppress(OSError):
                process.communicate()


_verifier = _Verifier()
atexit.register(_verifier.stop)


@functools.cache
def _need_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("comparing answers of the task 'math' needs math-verify: pip install 'trl-dllm[eval]'.")


_SPACE = re.compile(r"\s+|\\[!,;:]")


def is_equivalent(answer: str | None, gold: str) -> bool:
    """
    Do two answers in LaTeX mean the same, as math-verify sees it?

    The same text (white space aside) always does. Others are compared up to 300 characters and for 5 s at most; what
    takes longer does not. Raises `ImportError` without math-verify, and else nothing on any text.
    """
    _need_math_verify()
    if answer is None:
        return False
    # Lone surrogates cannot be sent; they mean nothing in LaTeX either.
    answer = answer if len(answer) > MAX_ANSWER else _SPACE.sub(" ", answer).strip()
    gold_text = _SPACE.sub(" ", gold).strip()
    if answer.replace(" ", "") == gold_text.replace(" ", ""):
        return bool(answer)
    if not answer or max(len(answer), len(gold_text)) > MAX_ANSWER:
        return False
    return _equivalent(answer, gold_text)


@functools.lru_cache(maxsize=65536)
def _equivalent(answer: str, gold: str) -> bool:
    return _verifier.equal(answer, gold)


def parse_answer(text: str) -> str | None:
    """The LaTeX of what `text` marks as its answer (see `base.marked_answers`), None without one; never raises."""
    return next(marked_answers(text), None)


def score(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """`correct` of one completion, and `answer`, what was read (None without one). Raises as `is_equivalent`."""
    answer = parse_answer(text)
    return {"correct": is_equivalent(answer, row["answer"]), "answer": None if answer is None else answer[:1000]}


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


def math_reward(completions: list, answer: list[str], **kwargs) -> list[float]:
    """
    2.0 for an answer that is equivalent to the gold one, else 0.0.

    Differs from d1's correctness reward: equivalence is mathematical and not one of normalised strings, an answer in
    tags needs no box, and a text without any marked answer is never compared as a whole.
    """
    return [
        2.0 if is_equivalent(parse_answer(completion_text(completion)), gold) else 0.0
        for completion, gold in zip(completions, answer, strict=True)
    ]


def boxed_reward(completions: list, **kwargs) -> list[float]:
    """
    0.5 with a closed box in closed answer tags, 0.375 with such tags only, 0.25 with a box only, 0.0 with neither.

    Differs from d1's format reward: the box is looked for (d1 looks for a backspace, and so never finds one), tags
    have to close, and neither of the two earns nothing.
    """
    rewards = []
    for completion in completions:
        text = completion_text(completion)
        end = text.rfind("</answer>")
        start = text.rfind("<answer>", 0, max(end, 0))
        if start >= 0:
            rewards.append(0.5 if last_boxed(text[start:end]) is not None else 0.375)
        else:
            rewards.append(0.25 if last_boxed(text) is not None else 0.0)
    return rewards


def stored_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a stored output, whose gold answer is LaTeX."""
    return {"question": record["question"], "answer": record["ground_truth"]}


TASK = Task(
    name="math",
    load=load,
    rewards={
        "correctness": math_reward,
        "boxed": boxed_reward,
        "d1_correctness": d1_math_correctness_reward,
        "d1_boxed_and_answer_tags": d1_boxed_and_answer_tags_reward,
    },
    score=score,
    parsers={"d1": d1_score},
    stored_row=stored_row,
)
