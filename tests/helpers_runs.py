"""Folders of training runs, for the tests of what is read from them and drawn."""

import json

from trl_dllm.fingerprint import Fingerprint


MEANING = {"command": "grpo", "task": "sudoku", "reward_funcs": ["solved"], "estimator": "step_merge", "seed": 0}


def log(rewards, every=1, held_out=(), **columns) -> list[dict]:
    """Of a run with 100 operations and 3 seconds a step; the second of four parts of a step's time is the rest."""
    entries = []
    for i, reward in enumerate(rewards, 1):
        profile = {"profile/sampling_seconds": 2.0, "profile/rest_seconds": 1.0}
        values = {name: column[i - 1] for name, column in columns.items()}
        entries.append({"step": i * every, "reward": reward, "flops": 100.0 * i * every, **profile, **values})
    entries += [{"step": step, "eval_reward": value} for step, value in held_out]
    return [*sorted(entries, key=lambda entry: entry["step"]), {"step": len(rewards) * every, "train_runtime": 7.0}]


def save(folder, entries, checkpoint=None, **meaning) -> str:
    """A run's folder, or with `checkpoint=n` what a killed one leaves; with a fingerprint if a seed is given."""
    place = folder if checkpoint is None else folder / f"checkpoint-{checkpoint}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    if meaning.get("seed") is not None:
        Fingerprint({**MEANING, **meaning}).write(place)
    return str(folder)
