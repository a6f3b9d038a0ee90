"""Trajectories as JSON lines: what is read is what was written, and what is no trajectory is refused with its line."""

import json
from dataclasses import fields, replace

import pytest
import torch
from cases import MASK, VOCAB, rollout_for_tests, sample
from oracles import sharp_model

from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import AnyOrder, ExactTrajectory, token_logps
from trl_dllm.models import create_tiny_model
from trl_dllm.step_maps import read_lines, read_rollout, write_rollout


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().strip("\n").split("\n")]


def same(got, want) -> None:
    """But for the row seeds, and for the width of the padding."""
    width = int(want.prompt_mask.sum(dim=1).max())
    want = replace(want, prompt_ids=want.prompt_ids[:, -width:], prompt_mask=want.prompt_mask[:, -width:])
    for f in fields(want):
        ours, theirs = getattr(got, f.name), getattr(want, f.name)
        if f.name == "prompt_ids":
            ours, theirs = ours * got.prompt_mask, theirs * want.prompt_mask
        if f.name in ("view_seed", "num_forwards", "flops"):
            continue
        if f.name == "logps":
            theirs = theirs.float()
        if f.name == "support" and theirs is not None:  # as wide as the widest
            theirs = theirs[..., : ours.shape[-1]]
        equal = torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs
        assert equal, f.name


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.9, "diffusion_steps": 6},
        {"temperature": 1.0, "confidence_threshold": 0.2},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
        {"decoding": "any_order", "cache": "exact"},
    ],
    ids=str,
)
def test_what_is_read_is_what_was_written(models, tmp_path, settings):
    """Rows of different prompts, lengths and steps; and it is scored as what was drawn."""
    model, path = models("llada", torch.float32), tmp_path / "folder" / "rollouts.jsonl"
    rollout = sample(model, eos_token_ids=tuple(range(30, 45)), stop_at_eos=True, **settings)
    assert not rollout.revealed.all() and not torch.equal(rollout.counted, rollout.revealed)
    write_rollout(path, rollout)
    found = read_rollout(path, MASK, VOCAB)
    same(found, rollout)
    estimator = AnyOrder() if "decoding" in settings else ExactTrajectory()
    with torch.no_grad():
        scores = token_logps(model, found, estimator)
    assert torch.equal(scores.logps, token_logps(model, rollout, estimator).logps)
    torch.testing.assert_close(scores.logps, found.logps * found.counted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("alignment", ["position", "canvas"])
def test_blocks_are_read_back_too(tmp_path, alignment):
    """Of a block-causal model; a canvas that the model was shown in blocks is scored in the same."""
    model, path = sharp_model("sdar", block_size=4), tmp_path / "rollouts.jsonl"
    model.config.block_alignment = alignment
    rollout = sample(model, block_length=4, cache="exact", diffusion_steps=9, temperature=0.8)
    write_rollout(path, rollout)
    found = read_rollout(path, rollout.mask_token_id)
    same(found, rollout)
    assert found.blocks == rollout.blocks and found.blocks.alignment == alignment
    with torch.no_grad():
        scores = token_logps(model, found, ExactTrajectory())
    torch.testing.assert_close(scores.logps, rollout.logps * rollout.counted, atol=1e-4, rtol=0, check_dtype=False)


@pytest.mark.parametrize("seed", range(3))
def test_any_rollout_without_gaps_is_read_back(tmp_path, seed):
    rollout = rollout_for_tests(seed=seed)
    used = [sorted(set(row.tolist()) - {-1}) for row in rollout.unmask_step]
    steps = [
        [-1 if s < 0 else all_.index(s) for s in row]
        for row, all_ in zip(rollout.unmask_step.tolist(), used, strict=True)
    ]
    prefix = rollout.revealed & (rollout.revealed.cumsum(dim=1) <= rollout.counted.sum(dim=1, keepdim=True))
    rollout = replace(rollout, unmask_step=torch.tensor(steps), counted=prefix)
    write_rollout(tmp_path / "a.jsonl", rollout, group=["a", "b\u2028", "c", "d", "e"], global_step=7)
    same(read_rollout(tmp_path / "a.jsonl"), rollout)
    found = lines(tmp_path / "a.jsonl")
    assert [line["group"] for line in found] == ["a", "b\u2028", "c", "d", "e"] and {
        line["global_step"] for line in found
    } == {7}


def test_a_line_has_sglangs_step_maps_and_text(tmp_path):
    model, tokenizer = create_tiny_model(hidden_size=16, num_layers=1)
    config = DiffusionGenerationConfig(8, block_length=4, diffusion_steps=4, temperature=1.0)
    prompts = tokenizer(["1+2=", "7="], return_tensors="pt", padding=True)
    rollout = generate(model, prompts["input_ids"], prompts["attention_mask"], config)
    write_rollout(tmp_path / "a.jsonl", rollout, tokenizer)
    found = lines(tmp_path / "a.jsonl")
    assert [line["prompt"] for line in found] == ["1+2=", "7="]
    for row, line in enumerate(found):
        assert line["step_maps"] == (rollout.unmask_step[row] + 1).tolist() and min(line["step_maps"]) in (0, 1)
        assert line["completion"] == tokenizer.decode(line["completion_ids"], skip_special_tokens=True)
        assert line["logprobs"] == rollout.logps[row].tolist() and line["steps"] == 4


GOOD = {"prompt_ids": [5, 6], "canvas_ids": [7, 8, 1, MASK], "step_maps": [1, 1, 2, 0], "mask_token_id": MASK}


def write(tmp_path, *rows):
    path = tmp_path / "theirs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_foreign_line_needs_three_fields(tmp_path):
    path = write(tmp_path, GOOD, "", {**GOOD, "completion_ids": [7, 8], "logprobs": [-0.5, None]})
    rollout = read_rollout(path)
    assert rollout.unmask_step.tolist() == [[0, 0, 1, -1]] * 2
    assert rollout.counted.tolist() == [[True, True, True, False], [True, True, False, False]]
    assert rollout.logps[0, :3].isnan().all() and rollout.logps[0, 3] == 0
    assert rollout.logps[1, 0] == -0.5 and rollout.logps[1, 1:3].isnan().all()
    assert (rollout.temperature, rollout.steps) == (1.0, None)
    assert len(set(rollout.view_seed.tolist())) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "it is no JSON: "),
        ("[3]", r"it is no JSON object: '\[3\]'"),
        ({"step_maps": ...}, "no step_maps: a likelihood is that of a trajectory"),
        ({"canvas_ids": ..., "prompt_ids": ...}, "no prompt_ids, canvas_ids: "),
        ({"canvas_ids": "abcd"}, "canvas_ids='abcd' must be a list"),
        ({"canvas_ids": [7, 8, 1]}, "canvas_ids has 3 entries, and the canvas of the first line 4"),
        ({"canvas_ids": [7, 8, 101, MASK]}, r"canvas_ids\[2\]=101 must be a whole number from 0 to 100"),
        ({"prompt_ids": [5, 6.5]}, r"prompt_ids\[1\]=6.5 must be a whole number"),
        ({"step_maps": [1, 1, 2, -1]}, r"step_maps\[3\]=-1 must be a whole number from 0 to 4"),
        ({"step_maps": [1, 1, 2, 2]}, r"canvas_ids\[3\]=3 and unmask_step\[3\]=1 contradict each other"),
        ({"step_maps": [1, 0, 2, 0]}, r"canvas_ids\[1\]=8 and unmask_step\[1\]=-1 contradict each other"),
        ({"step_maps": [1, 1, 3, 0]}, "unmask_step says that nothing was revealed in step 1"),
        ({"completion_ids": [7, 9]}, "completion_ids has 2 tokens that are not those of canvas_ids"),
        ({"logprobs": [-1, -1]}, "logprobs has 2 numbers; it needs one for each of the 3 tokens"),
        ({"logprobs": [-1, -1, 0.5]}, "logprobs holds 0.5, which is no log-probability"),
        ({"logprobs": [-1, -1, "x"]}, "logprobs holds 'x', which is no log-probability"),
        ({"temperature": "hot"}, "temperature='hot' must be a number of at least 0"),
        ({"temperature": 0.5}, "temperature=0.5 differs from the first line's, 1.0"),
        ({"steps": 1}, "step_maps goes up to 2, and steps=1"),
        ({"steps": True}, "steps=True must be a whole number of at least 1"),
        ({"mask_token_id": 4}, "mask_token_id=4, and the model's is 3"),
        ({"support": [[7], [8], [1], []]}, "support stands in some lines and not in others"),
        ({"support": [[7], [9], [1], []]}, r"support\[1\] leaves out the token that was drawn, 8"),
        ({"support": [[7], [8]]}, "support has 2 entries"),
        ({"blocks": 4}, "blocks=4 must be null or say size, alignment and causal"),
        ({"blocks": {"size": 0, "causal": True}}, "blocks: size=0 must be a whole number of at least 1"),
        ({"blocks": {"size": 2, "causal": True, "alignment": "left"}}, "block_alignment='left' is unknown"),
        ({"blocks": {"size": 2, "causal": True}, "step_maps": [2, 1, 1, 0]}, "step 0 revealed a position of block 1"),
        (
            {"blocks": {"size": 1, "causal": True}, "canvas_ids": [7, MASK, 8, MASK], "step_maps": [2, 0, 1, 0]},
            "step 0 revealed a position of block 2",
        ),
        ({"support": [7, 8, 1, 3]}, r"support\[0\]=7 must be a list of ids"),
    ],
    ids=str,
)
def test_what_is_no_trajectory_is_refused_with_its_line(tmp_path, change, message):
    bad = change
    if isinstance(change, dict):
        bad = {name: value for name, value in {**GOOD, **change}.items() if value is not ...}
    path = write(tmp_path, GOOD, "", bad)
    with pytest.raises(ValueError, match=rf"theirs.jsonl, line 3: {message}"):
        read_rollout(path, MASK, VOCAB)


def test_a_canvas_without_positions_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: canvas_ids=\[\] has no positions"):
        read_rollout(write(tmp_path, {**GOOD, "canvas_ids": [], "step_maps": [], "steps": 4}))


def test_a_file_without_lines_or_mask_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"theirs\.jsonl has no lines: a trajectory is a line with prompt_ids"):
        read_lines(write(tmp_path, ""))
    anonymous = {name: value for name, value in GOOD.items() if name != "mask_token_id"}
    with pytest.raises(ValueError, match="line 1: mask_token_id=None must be a whole number"):
        read_rollout(write(tmp_path, anonymous))
    assert read_rollout(write(tmp_path, anonymous), MASK).mask_token_id == MASK
