"""What training writes of its completions: trajectories as JSON lines, and pages that show some of them."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_grpo import PROMPTS, build, text_prompts, tiny

from trl_dllm.likelihood import ExactTrajectory, token_logps
from trl_dllm.step_maps import read_lines, read_rollout
from trl_dllm.tasks.base import Grid
from trl_dllm.trace import read_page
from trl_dllm.trainer.completions import ROLLOUTS, TRACES, _by_name, newest_trace


def test_the_trajectories_of_training_are_written_where_they_are_asked_for(tmp_path):
    """One file a generation batch, not of evaluations, and again the same when it is drawn again."""
    settings = {
        "max_steps": 3,
        "num_iterations": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "loss_tokens": "canvas",
    }
    build(tmp_path / "silent", **settings, eval_dataset=text_prompts(2)).train()
    assert not (tmp_path / "silent" / ROLLOUTS).exists()
    texts = []
    for _ in range(2):
        seen = []

        def reward(completions, unmask_step, seen=seen, **kwargs):
            seen.append((completions, unmask_step))
            return [float(len(completion) % 3) for completion in completions]

        model, tokenizer = tiny()
        untrained = copy.deepcopy(model)
        trainer = build(
            tmp_path / "run",
            model=model,
            tokenizer=tokenizer,
            save_rollouts=True,
            reward_funcs=reward,
            eval_dataset=text_prompts(2),
            **settings,
        )
        trainer.train()
        paths = sorted((tmp_path / "run" / ROLLOUTS).iterdir())
        assert [path.name for path in paths] == ["step-000000-0-0.jsonl", "step-000002-0-0.jsonl"]
        texts.append([path.read_text() for path in paths])
    assert texts[0] == texts[1]
    lines = [line for _, line in read_lines(paths[0])]
    assert [line["completion"] for line in lines] == seen[0][0], "cut behind the EOS, as the rewards see it"
    assert {line["global_step"] for line in lines} == {0} and {line["decoding"] for line in lines} == {"denoising"}
    assert [line["rewards"] for line in lines] == [{"reward": float(len(line["completion"]) % 3)} for line in lines]
    assert {line["block_length"] for line in lines} == {4}
    rollout = read_rollout(paths[0], trainer.spec.mask_token_id)
    assert rollout.unmask_step.tolist() == seen[0][1] and len({line["prompt"] for line in lines}) > 1
    with torch.no_grad():
        scores = token_logps(untrained, rollout, ExactTrajectory())
    torch.testing.assert_close(scores.logps, rollout.logps * rollout.counted, atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------------------------- pages


def pages(folder) -> list[str]:
    return sorted(path.name for path in (Path(folder) / TRACES).glob("*"))


def test_a_page_is_written_every_so_many_steps_and_the_card_links_the_newest(tmp_path):
    """With the trajectories, rewards and advantages that were trained on, and what the task lays out."""
    seen = []

    def reward(completions, unmask_step, **kwargs):
        values = [None if "k" in text else float(len(text)) for text in completions]
        seen.append((completions, unmask_step, values))
        return values

    def layout(text, row):
        return Grid(1, (0 if text else None,), (row["answer"],), (None,)) if len(text) != 1 else None

    trainer = build(
        tmp_path,
        reward_funcs=reward,
        max_steps=5,
        learning_rate=1e-5,
        trace_steps=2,
        save_rollouts=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=5,
    )
    trainer.layout = layout
    trainer.train()
    assert pages(tmp_path) == ["step-0.html", "step-2.html", "step-4.html"]
    assert "[traces/step-4.html](traces/step-4.html)" in (tmp_path / "README.md").read_text()
    assert newest_trace(tmp_path) == Path("traces/step-4.html")
    for batch in (0, 2, 4):
        page, rollout = (
            read_page(tmp_path / TRACES / f"step-{batch}.html"),
            read_rollout(tmp_path / ROLLOUTS / f"step-{batch:06d}-0-0.jsonl"),
        )
        texts, steps, values = seen[batch]
        (model,), shown = page["models"], [row for (row,) in page["examples"]]
        assert len(shown) == 8 < len(texts) == 16, "some of them"
        assert model["facts"]["step"] == batch and model["facts"]["diffusion_steps"] == 4
        lines = read_lines(tmp_path / ROLLOUTS / f"step-{batch:06d}-0-0.jsonl")
        for i, row in enumerate(shown):
            assert row["step"] == steps[i] and row["ids"] == rollout.completion_ids[i].tolist()
            assert [value is None for value in row["logp"]] == [step < 0 for step in steps[i]]
            assert [value or 0 for value in row["logp"]] == pytest.approx(rollout.logps[i].tolist(), abs=6e-5)
            assert row["counted"] == rollout.counted[i].int().tolist() and row["blocks"] == [0, 4]
            assert row["rewards"]["reward"] == values[i] and set(row["rewards"]) == {"reward", "advantage"}
            assert row["estimates"] == []
            text = "".join(model["vocab"][str(token)] for token in row["prompt"])
            assert text in PROMPTS and (row["grid"] is None) is (len(texts[i]) == 1)
            if row["grid"]:
                (cell,) = row["grid"]["cells"]
                assert cell["given"] == text[::-1] and cell["text"] == (texts[i][0] if texts[i] else None)
        # Advantages sum to 0 over each group of four.
        known = [row["rewards"]["advantage"] for row in shown]
        assert sum(known[:4]) == pytest.approx(0, abs=1e-3) and any(known)
        assert len(lines) == 16
    assert any(None in values for *_, values in seen)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"trace_steps": 3, "max_steps": 5, "num_iterations": 2}, [0, 4]),
        ({"trace_steps": 1, "max_steps": 3, "steps_per_generation": 1, "per_device_train_batch_size": 4}, [0, 1, 2]),
    ],
    ids=["off", "cycles of two steps", "two batches a step"],
)
def test_pages_are_of_the_first_batch_at_or_behind_a_multiple(tmp_path, settings, expected):
    more = {"eval_dataset": text_prompts(1), "eval_strategy": "steps", "eval_steps": 2, "save_rollouts": True}
    trainer = build(tmp_path, **settings, **more)
    trainer.train()
    assert pages(tmp_path) == [f"step-{step}.html" for step in expected]
    for step in expected:
        first = read_rollout(tmp_path / ROLLOUTS / f"step-{step:06d}-0-0.jsonl")
        shown = read_page(tmp_path / TRACES / f"step-{step}.html")["examples"]
        assert [row["ids"] for (row,) in shown] == first.completion_ids[:8].tolist()
    assert newest_trace(tmp_path) == (Path(f"traces/step-{expected[-1]}.html") if expected else None)


def test_each_process_has_the_rewards_of_its_own_rows():
    """TRL gathers them over the processes, a block of rows each."""
    rewards = torch.tensor([[1.0, 2.0], [3.0, torch.nan], [5.0, 6.0], [7.0, 8.0]])
    of = SimpleNamespace(num_processes=2, process_index=1)
    trainer = SimpleNamespace(accelerator=of, reward_func_names=["a", "b"])
    assert _by_name(trainer, rewards, 2) == [{"a": 5.0, "b": 6.0}, {"a": 7.0, "b": 8.0}]
    of.process_index = 0
    assert _by_name(trainer, rewards, 2)[1] == {"a": 3.0, "b": None}
    assert len(_by_name(trainer, rewards, 1)) == 1


def test_the_newest_page_is_the_one_of_the_latest_step(tmp_path):
    (tmp_path / TRACES).mkdir()
    for name in ("step-9.html", "step-10.html", "step-x.html", "other.html"):
        (tmp_path / TRACES / name).touch()
    assert newest_trace(tmp_path) == Path("traces/step-10.html")
    assert newest_trace(tmp_path / "nowhere") is None


def test_trace_steps_is_a_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match="trace_steps=0 must be at least 1, or None for no pages"):
        build(tmp_path, trace_steps=0)
    with pytest.raises(ValueError, match=r"trace_steps=0\.5 must be a whole number"):
        build(tmp_path, trace_steps=0.5)
