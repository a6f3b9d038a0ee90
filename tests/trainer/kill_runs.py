"""Runs that are killed at random moments and resumed must be the run that was left alone, bit for bit.

    python tests/trainer/kill_runs.py --kills 30 --seed 0

A worker (one process, or two under torchrun with gloo) trains a tiny model and says on its output what it begins to
do: `rollout`, `backward`, `saving`, `between`. SIGKILL comes to all of its processes a random moment after such a
line, and the same command is given again, until the run is finished.
"""

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


HERE = Path(__file__).resolve()
PHASES = ("rollout", "backward", "saving", "between")
KINDS = ("full", "lora")

# Cycles of four optimizer steps, a checkpoint after each, a log of every second one, and old checkpoints deleted.
SETTINGS = {
    "num_iterations": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "max_steps": 10,
    "beta": 0.04,
    "p_mask_prompt": 0.15,
    "num_segments": 3,
    "lr_scheduler_type": "linear",
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "logging_steps": 2,
}


# ------------------------------------------------------------------------------------------------------- the worker


def work(folder: Path, kind: str) -> None:
    """Start or go on, finish, and write what came of it."""
    from helpers_grpo import build, history

    from trl_dllm import DiffusionGRPOTrainer
    from trl_dllm.trainer.checkpoint import find_checkpoint

    def say(what: str) -> None:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"<{what}>", flush=True)

    class TalkingTrainer(DiffusionGRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            say("rollout")
            return super()._generate_single_turn(*args, **kwargs)

        def _compute_loss(self, *args, **kwargs):
            say("backward")
            return super()._compute_loss(*args, **kwargs)

        def _save_checkpoint(self, *args, **kwargs):
            say("saving")
            super()._save_checkpoint(*args, **kwargs)
            say("between")

    world = int(os.environ.get("WORLD_SIZE", 1))
    trainer = build(
        folder,
        TalkingTrainer,
        model=str(folder.parent / "model"),
        peft=kind == "lora",
        per_device_train_batch_size=4 // world,
        ddp_timeout=60,
        **SETTINGS,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = find_checkpoint(True, folder)
    skipped = re.findall(r"checkpoint-\d+(?= \()", " ".join(str(w.message) for w in caught))
    say(f"from {Path(checkpoint).name if checkpoint else 'the beginning'}, skipped {len(skipped)}")
    trainer.train(resume_from_checkpoint=checkpoint)
    digest = hashlib.sha256()
    for name, value in sorted(trainer.model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    result = {"weights": digest.hexdigest(), "flops": trainer.flops.state_dict(), "log": history(trainer)[:-1]}
    (folder / f"result_{os.environ.get('RANK', 0)}.json").write_text(json.dumps(result, sort_keys=True))
    trainer.end()  # or gloo's threads may abort this process, and torchrun ends the other before it has written


# ------------------------------------------------------------------------------------------------------ the killer


@dataclass
class Kill:
    """When SIGKILL comes: `delay` seconds behind the `count`-th time that the worker begins with `phase`."""

    phase: str
    count: int
    delay: float

    @classmethod
    def draw(cls, rng: random.Random) -> "Kill":
        phase = rng.choice(PHASES)
        most = {"rollout": 2, "backward": 8}.get(phase, 4)
        return cls(phase, rng.randint(1, most), rng.uniform(0, 0.03))


def launch(folder: Path, kind: str, processes: int, kill: Kill | None) -> tuple[str, str, bool]:
    """One start of the worker: where it went on from, what it did last, and whether it was killed."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(HERE), "--work", str(folder), "--kind", kind]
    root = HERE.parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with (folder.parent / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
    begun: Counter[str] = Counter()
    start = last = "nowhere"
    try:
        for line in process.stdout:
            if not (match := re.fullmatch(r"<(.*)>\n", line)):
                continue
            last = match[1]
            if last.startswith("from "):
                start = last
            begun[last] += 1
            if kill and last == kill.phase and begun[last] == kill.count:
                time.sleep(kill.delay)
                break
        killed = process.poll() is None and kill is not None and begun[kill.phase] >= kill.count
        if killed:
            kill_all(process.pid)
            said = re.findall(r"<(.*)>\n", process.stdout.read())  # it may have come further meanwhile
            last = said[-1] if said else last
        code = process.wait(120)
    finally:
        if process.poll() is None:
            kill_all(process.pid)
    assert killed or code == 0, f"exit {code}\n" + (folder.parent / "errors.txt").read_text()[-3000:]
    return start, last, killed


def kill_all(leader: int) -> None:
    """SIGKILL to the worker and all that it has started; torchrun puts its own into sessions of theirs."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    killed = [leader]
    for process in killed:
        killed += [child for child, parent in parents.items() if parent == process]
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def results(folder: Path, processes: int) -> list[dict]:
    return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(processes)]


def run_killed(folder: Path, kind: str, processes: int, kills: int, seed: int, say=print) -> int:
    """Run alone once, then as often as it takes until `kills` have come; returns how many runs had to be finished.

    Raises:
        AssertionError: a run that does not resume, or is not the undisturbed one.
    """
    from helpers_grpo import tiny

    folder.mkdir(parents=True)
    model, tokenizer = tiny(num_layers=2)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    launch(folder / "alone", kind, processes, None)
    expected = results(folder / "alone", processes)
    rng, finished, done = random.Random(seed), 0, 0
    while done < kills:
        run = folder / f"killed_{finished}"
        killed = True
        while killed:
            kill = Kill.draw(rng) if done < kills else None
            start, last, killed = launch(run, kind, processes, kill)
            if killed:
                done += 1
                say(f"{kind}, {processes} process(es), kill {done}: went on {start}; killed in {last}")
        found = results(run, processes)
        for rank, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
            for part in theirs:
                assert ours[part] == theirs[part], (
                    f"{run}, process {rank}: another {part}\n{ours[part]}\n{theirs[part]}"
                )
        finished += 1
        say(f"{kind}, {processes} process(es): finished {start}; weights, log and FLOPs are the undisturbed run's")
    return finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work, args.kind)
    import tempfile

    sys.path[:0] = [str(HERE.parent), str(HERE.parents[2])]
    cases = [(kind, processes) for processes in (1, 2) for kind in KINDS]
    with tempfile.TemporaryDirectory() as folder:
        for i, (kind, processes) in enumerate(cases):
            kills = args.kills // len(cases) + (i < args.kills % len(cases))
            if kills:
                run_killed(Path(folder) / f"{kind}_{processes}", kind, processes, kills, args.seed + i)
    print(f"{args.kills} kills; every run resumed, and none differs from the undisturbed one.")


if __name__ == "__main__":
    main()
