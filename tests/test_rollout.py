"""A rollout's checks, slices and stacks, and where a completion ends."""

from dataclasses import replace

import pytest
import torch
from cases import MASK, rollout_for_tests

from trl_dllm.rollout import Rollout, count_until_eos


def test_rollout_checks_shapes_and_values():
    good = rollout_for_tests()
    fields = {name: getattr(good, name) for name in good.__dataclass_fields__}
    for change, match in [
        ({"unmask_step": good.unmask_step[:, 1:]}, r"unmask_step has shape \(5, 8\).*\(5, 9\)"),
        ({"prompt_mask": good.prompt_mask[:, 1:]}, "prompt_ids.*prompt_mask"),
        ({"prompt_ids": good.prompt_ids[:4], "prompt_mask": good.prompt_mask[:4]}, r"prompt_ids \(4, 7\).*\(5, P\)"),
        ({"view_seed": good.view_seed[:2]}, "view_seed"),
        ({"prompt_mask": good.prompt_mask.flip(1)}, "left-padded"),
        ({"unmask_step": torch.zeros_like(good.unmask_step)}, "revealed whose token is the mask"),
        ({"unmask_step": torch.full_like(good.unmask_step, -1)}, "positions never revealed must hold"),
        ({"counted": torch.ones_like(good.counted)}, "counted includes a position that was never revealed"),
    ]:
        with pytest.raises(ValueError, match=match):
            Rollout(**{**fields, **change}).validate()


def test_rollout_slices_and_stacks():
    rollout = rollout_for_tests()
    stacked = Rollout.cat([rollout[slice(0, 2)], rollout[torch.tensor([2, 3, 4])]])
    for name, value in rollout._tensors().items():
        assert torch.equal(getattr(stacked, name), value), name
    assert len(rollout[rollout.num_steps > 3]) == 3 and stacked.mask_token_id == MASK
    assert rollout.num_steps.tolist() == [9, 3, 1, 6, 4]
    assert torch.equal(stacked.revealed, stacked.completion_ids != MASK)


def test_counters_add_up_and_tensors_move_together():
    rollout = rollout_for_tests()
    parts = [replace(rollout, num_forwards=3, flops=10), replace(rollout, num_forwards=4, flops=7, temperature=0.5)]
    both = Rollout.cat(parts)
    assert (len(both), both.num_forwards, both.flops, both.temperature) == (10, 7, 17, rollout.temperature)
    moved = rollout.to("meta")
    tensors = {name for name, value in vars(rollout).items() if isinstance(value, torch.Tensor)}
    assert {name for name, value in vars(moved).items() if getattr(value, "is_meta", False)} == tensors
    assert len(tensors) == 7 and moved.mask_token_id == MASK


def test_masks_of_integers_become_booleans():
    """As tokenizers and TRL's buffer give them."""
    rollout = rollout_for_tests()
    other = replace(rollout, prompt_mask=rollout.prompt_mask.long(), counted=rollout.counted.int()).validate()
    assert torch.equal(other.prompt_mask, rollout.prompt_mask) and other.prompt_mask.dtype == torch.bool
    assert torch.equal(other.counted, rollout.counted) and other.counted.dtype == torch.bool


def test_count_until_eos_by_loops():
    """Revealed positions up to and including the first revealed EOS; several ids; none."""
    rollout = rollout_for_tests(seed=5, num_steps=(9,) * 8, prompt_lengths=(2,) * 8)
    for eos in ((), tuple(range(60, 90))):
        got = count_until_eos(rollout.completion_ids, rollout.unmask_step, eos)
        for row in range(8):
            ended, expected = False, []
            for token, step in zip(
                rollout.completion_ids[row].tolist(), rollout.unmask_step[row].tolist(), strict=True
            ):
                expected.append(step >= 0 and not ended)
                ended = ended or (step >= 0 and token in eos)
            assert got[row].tolist() == expected
    mask = count_until_eos(rollout.completion_ids, rollout.unmask_step, (MASK,))
    assert torch.equal(mask, rollout.revealed), "a position never revealed ends nothing, whatever it holds"
    assert (got.sum(1) < rollout.revealed.sum(1)).any()
