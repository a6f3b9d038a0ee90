"""What the tests run on: constants of the tiny models, estimators by name, prompts and rollouts.

Rows differ in every way (prompt, steps, counted length): equal rows would hide wrong masks and wrong normalisers.
"""

from dataclasses import replace
from pathlib import Path

import torch
from oracles import left_pad, random_rollout, random_table, slow_decode, trajectories_rollout
from safetensors.torch import load_file

from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import (
    AnyOrder,
    BlockPseudoLikelihood,
    CoupledElbo,
    Elbo,
    ExactTrajectory,
    MeanField,
    PseudoLikelihood,
    SampledTrajectory,
    SandwichedBounds,
    StepMerge,
    TokenScores,
    TrajectoryPseudoLikelihood,
)
from trl_dllm.noise import hash64
from trl_dllm.rollout import Rollout


# Of `create_tiny_model`.
MASK, VOCAB, EOS = 3, 101, 1
SHIFT = {"llada": 0, "dream": 1}

PROMPTS = [[17, 60, 9], [44, 8, 71, 25, 90, 33, 12], [55], [81, 20, 20, 67, 5]]
SEEDS = torch.tensor([9, -(2**50), 77, 2**61])
CANVAS = 9
IDS = torch.tensor([[5, 90, 3, 3, 41, 3, 17], [3, 64, 64, 8, 3, 99, 100]])

REMASKING = ["low_confidence", "margin", "entropy", "random", "left_to_right"]
# About half of a step's candidates are above these on the tiny models.
THRESHOLDS = {"low_confidence": 0.15, "margin": 0.1, "entropy": -3.5, "random": 0.6}
CACHES = [None, "exact"]

TRAJECTORY = {
    "mean_field": MeanField(),
    "step_merge": StepMerge(3),
    "exact_trajectory": ExactTrajectory(),
    "agrpo 2": SampledTrajectory(2),
    "agrpo more than there are": SampledTrajectory(40),
    "any_order": AnyOrder(),
}
PKL = {
    "pkl": PseudoLikelihood(),
    "pkl 3": PseudoLikelihood(3),
    "pkl more than there are": PseudoLikelihood(40),
    "pkl_u": BlockPseudoLikelihood(4),
    "pkl_u 2 x 3": BlockPseudoLikelihood(3, 2),
    "pkl_u more views than positions": BlockPseudoLikelihood(2, 30),
    "pkl_u all": BlockPseudoLikelihood(CANVAS, 12),
    "pkl_u partition": BlockPseudoLikelihood(2, "partition"),
}
PKL_UNSHIFTED = {  # refused for families with shifted logits
    "pkl_t causal": TrajectoryPseudoLikelihood(),
    "pkl_t bidirectional": TrajectoryPseudoLikelihood("bidirectional"),
    "pkl_u isolated": BlockPseudoLikelihood(3, 2, "isolated"),
    "pkl_u isolated partition": BlockPseudoLikelihood(4, "partition", "isolated"),
}
ELBO = {
    "elbo": Elbo(3),
    "elbo stratified": Elbo(3, stratified=True),
    "coupled_elbo": CoupledElbo(4),
    "spg": SandwichedBounds(3, block_length=4, p_mask_clean=0.2),
}


def rollout_for_tests(seed: int = 0, **kwargs) -> Rollout:
    """Rows with different prompts, steps and counted lengths, EOS-cut ones and unrevealed positions among them."""
    return random_rollout(MASK, VOCAB, seed, canvas=CANVAS, **kwargs)


def many_rows(rows: int = 6000, counted=(1, 1, 0, 1, 1, 0)) -> Rollout:
    """Rows that differ in their seed alone, of a canvas revealed in one step without a prompt."""
    canvas = len(counted)
    return trajectories_rollout(
        random_table(1, 3, 0),
        [],
        prompt_ids=torch.zeros(rows, 0, dtype=torch.int64),
        prompt_mask=torch.zeros(rows, 0, dtype=torch.bool),
        completion_ids=torch.zeros(rows, canvas, dtype=torch.int64),
        unmask_step=torch.zeros(rows, canvas, dtype=torch.int64),
        logps=torch.zeros(rows, canvas, dtype=torch.float64),
        counted=torch.tensor(counted).bool().expand(rows, -1),
        view_seed=hash64(11, torch.arange(rows)),
    )


def sample(model, prompts=PROMPTS, seeds=SEEDS, width=None, batch_size=None, **settings) -> Rollout:
    """A rollout of `prompts` on a canvas of 12 in two blocks, decoded to its end."""
    settings = {"max_new_tokens": 12, "block_length": 6, "stop_at_eos": False, "eos_token_ids": (EOS,), **settings}
    ids, mask = left_pad(prompts, width)
    config = DiffusionGenerationConfig(**settings)
    return generate(model, ids, mask, config, seeds=seeds, batch_size=batch_size).validate()


def whole_canvas(rollout: Rollout) -> Rollout:
    """The rollout with everything counted that was revealed, what stands behind an EOS included."""
    return replace(rollout, counted=rollout.revealed)


def common_eos(model) -> tuple[int, int]:
    """End-of-sequence ids that a full decoding reveals in the first of three blocks of some rows only."""
    tokens = sample(model, max_new_tokens=12, block_length=4, diffusion_steps=6).completion_ids
    return int(tokens[0, 1]), int(tokens[2, 6])


def sample_any_order(model, cache="exact", prompts=PROMPTS, seeds=SEEDS, **kwargs) -> Rollout:
    """`sample` by any-order decoding."""
    return sample(model, prompts, seeds, decoding="any_order", cache=cache, **kwargs)


def forwards_of(model, draw=sample_any_order, **settings) -> tuple[Rollout, list[tuple[int, int]]]:
    """`draw`, and the (rows, columns) of each forward that it ran."""
    shapes = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        return draw(model, **settings), shapes
    finally:
        hook.remove()


def assert_equals_slow_decoder(
    model, rollout: Rollout, prompts=PROMPTS, seeds=SEEDS, atol=1e-5, of_prompt=lambda prompt: {}, **settings
) -> None:
    """The rollout, of `sample`, is what `slow_decode` draws with these settings and those that a prompt gives."""
    settings = {"canvas": 12, "block_length": 6, "mask": MASK, **settings}
    for row, prompt in enumerate(prompts):
        tokens, steps, logps = slow_decode(model, prompt, seed=int(seeds[row]), **settings, **of_prompt(prompt))
        assert rollout.unmask_step[row].tolist() == steps, f"steps of row {row}"
        assert rollout.completion_ids[row].tolist() == tokens, f"tokens of row {row}"
        torch.testing.assert_close(rollout.logps[row].double(), torch.tensor(logps).double(), atol=atol, rtol=0)


def assert_same_rollout(a: Rollout, b: Rollout, rows=slice(None), atol: float = 1e-5) -> None:
    """The given rows of `a` are `b`."""
    assert torch.equal(a.unmask_step[rows], b.unmask_step)
    assert torch.equal(a.completion_ids[rows], b.completion_ids)
    assert torch.equal(a.counted[rows], b.counted)
    torch.testing.assert_close(a.logps[rows], b.logps, atol=atol, rtol=0)


def assert_same_scores(got: TokenScores, want: TokenScores, atol: float = 1e-5) -> None:
    assert torch.equal(got.scored, want.scored)
    torch.testing.assert_close(got.logps, want.logps, atol=atol, rtol=0)
    torch.testing.assert_close(got.entropies, want.entropies, atol=atol, rtol=0)


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What a saved model's folder holds, by key."""
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}
