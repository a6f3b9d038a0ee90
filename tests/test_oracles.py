"""The oracles themselves: what the other tests take for true."""

import math

import pytest
import torch
from cases import rollout_for_tests
from oracles import enumerate_trajectories, joint_table, random_table, token_distribution


def test_oracle_joint_is_consistent():
    """Left to right and any other order give a canvas the same probability; an arbitrary table does not."""
    for model, consistent in ((joint_table(3, 3, seed=1), True), (random_table(3, 3, seed=1), False)):
        trajectories = enumerate_trajectories(model, "random", [1, 1, 1])
        by_canvas = {}
        for t in trajectories:
            by_canvas.setdefault(t.tokens, []).append(t.log_prob.item())
        assert all((max(v) - min(v) < 1e-10) == consistent for v in by_canvas.values())


def test_oracle_distribution_leaves_the_mask_out():
    p = token_distribution(torch.tensor([0.0, 1.0, 9.0]).double(), mask=2, temperature=0.5)
    assert p[2] == 0 and math.isclose(p[1] / p[0], math.exp(2)) and math.isclose(p.sum(), 1)


@pytest.mark.parametrize("seed", range(10))
def test_rollouts_for_tests_differ_in_every_way(seed):
    """Equal rows would hide wrong masks and wrong normalisers."""
    rollout = rollout_for_tests(seed)
    assert not torch.equal(rollout.counted, rollout.revealed) and not rollout.revealed.all()
    assert len(rollout.counted.sum(dim=1).unique()) > 2
    assert len(rollout.num_steps.unique()) == len(rollout.prompt_mask.sum(dim=1).unique()) == len(rollout)
