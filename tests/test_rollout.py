"""A rollout's checks, slices and stacks, and where a completion ends."""

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
    assert (got.sum(1) < rollout.revealed.sum(1)).any()
