"""Completions of an outside engine: what a `rollout_func` must return, and the importance weights of its log-probs."""

import copy
import inspect
import math
from collections import Counter, defaultdict

import pytest
import torch
from helpers_grpo import as_rollout, build, losses, text_of, tiny, weights
from trl import GRPOTrainer

from trl_dllm import DiffusionGRPOTrainer
from trl_dllm.evaluation import tokenize_prompts
from trl_dllm.generation import generate
from trl_dllm.likelihood import ExactTrajectory, Plan, TokenScores, token_logps
from trl_dllm.trainer.engine import CORRECTIONS, importance_weights, read_rollout


LENGTH = 8
CORRECTION = {
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_max": 1.5,
    "vllm_importance_sampling_clip_min": 0.5,
}


class Engine:
    """A `rollout_func` that decodes with a model of its own, or with the trainer's, and the trainer's row seeds."""

    def __init__(self, model=None, change=lambda output: output, whole: bool = False):
        self.model, self.change, self.whole, self.prompts = model, change, whole, []

    def __call__(self, prompts, trainer):
        self.prompts.append(prompts)
        ids, mask = tokenize_prompts(trainer._tokenizer, prompts)
        saved = copy.copy(trainer._generation_round)
        seeds = trainer._row_seeds(len(prompts), "cpu")
        trainer._generation_round[:] = saved
        model = self.model or trainer.model
        rollout = generate(model, ids, mask, trainer.sampling, seeds=seeds, spec=trainer.spec)
        shown = torch.ones_like(rollout.counted) if self.whole else rollout.counted
        return self.change(
            {
                "prompt_ids": [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)],
                "completion_ids": self.cut(rollout.completion_ids, rollout.counted),
                "canvas_ids": rollout.completion_ids.tolist(),
                "unmask_step": rollout.unmask_step.tolist(),
                "logprobs": self.cut(rollout.logps, shown),
                "engine_name": "ours",
            }
        )

    @staticmethod
    def cut(table, kept):
        return [row[keep].tolist() for row, keep in zip(table, kept, strict=True)]


def other_model():
    """The trainer's model with weights of a little earlier on."""
    model, _ = tiny()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    return model


def run(folder, **settings):
    trainer = build(folder, **{"max_steps": 2, "beta": 0.04, "num_iterations": 2, **settings})
    trainer.train()
    return trainer


# ----------------------------------------------------------------------------------------------------- what it returns


@pytest.mark.parametrize(
    "settings", [{}, {"loss_tokens": "canvas"}, {"estimator": "mean_field", "p_mask_prompt": 0.3}]
)
def test_an_engine_that_draws_what_the_sampler_draws_makes_the_same_run(tmp_path, settings):
    """Rollouts, losses, metrics and weights; also what rewards are given."""
    seen = []

    def reward(completions, unmask_step, engine_name=None, **kwargs):
        seen.append((completions, unmask_step, engine_name))
        return [sum(map(ord, text_of(c))) % 7 / 7 for c in completions]

    mine = run(tmp_path / "a", reward_funcs=reward, **settings)
    ours, seen[:] = list(seen), []
    engine = Engine(change=lambda output: {**output, "logprobs": None})
    theirs = run(tmp_path / "b", reward_funcs=reward, rollout_func=engine, **settings)
    assert [entry[:2] for entry in seen] == [entry[:2] for entry in ours]
    assert {entry[2] and entry[2][0] for entry in seen} == {"ours"}, "an engine's own fields reach the rewards"
    assert losses(theirs) == losses(mine) and losses(theirs, "kl") == losses(mine, "kl")
    assert losses(theirs, "completions/mean_length") == losses(mine, "completions/mean_length")
    assert all(torch.equal(value, weights(mine)[name]) for name, value in weights(theirs).items())
    assert "sampling/mismatch_kl" not in theirs.state.log_history[0], "without log-probs there is nothing to compare"
    prompts = engine.prompts[0]
    assert len(prompts) == 8 and prompts[0] == prompts[3] != prompts[4], "a row for each completion"


def test_an_engine_of_a_block_causal_model_is_read_by_its_blocks(tmp_path):
    """Prompts reach into the first block, so that blocks do not begin at multiples of the block length."""

    def go(folder, **more):
        model, tokenizer = tiny("sdar")
        decoding = {"estimator": "exact_trajectory", "cache": "exact", "stop_at_eos": False}
        return run(tmp_path / folder, model=model, tokenizer=tokenizer, **decoding, **more)

    mine, theirs = go("a"), go("b", rollout_func=Engine())
    assert losses(theirs) == pytest.approx(losses(mine), abs=1e-6)
    assert max(losses(theirs, "sampling/mismatch_kl")) < 1e-6

    def in_other_blocks(output):
        steps = sorted(output["unmask_step"][0])
        return {**output, "unmask_step": [steps[::-1], *output["unmask_step"][1:]]}

    with pytest.raises(ValueError, match=r"row 0: .*revealed a position of block 1 \(block_length=4\)"):
        go("c", rollout_func=Engine(change=in_other_blocks))


def test_conversations_reach_the_engine_as_they_are(tmp_path):
    from helpers_grpo import chat_prompts

    engine = Engine()
    run(tmp_path, data=chat_prompts(), rollout_func=engine, max_steps=1)
    assert engine.prompts[0][0][0]["role"] == "user"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return build(tmp_path_factory.mktemp("engine"), rollout_func=Engine())


CANVAS = [5, 6, 7, 8, 9, 10, 11, 12]
STEPS = [0, 0, 1, 1, 2, 2, 3, 3]


def output_of(trainer, **changes) -> dict:
    """One row without an EOS; `changes` replace that row's fields."""
    row = {
        "prompt_ids": [5, 6],
        "completion_ids": CANVAS,
        "canvas_ids": CANVAS,
        "unmask_step": STEPS,
        "logprobs": [-1.0] * LENGTH,
    }
    row.update(changes)
    return {name: [value] for name, value in row.items()}


def test_a_trace_is_read(trainer):
    mask, eos = trainer.spec.mask_token_id, trainer.eos_token_ids[0]
    canvas = [5, eos, 7, 8, mask, mask, mask, mask]
    steps = [0, 0, 1, 1, -1, -1, -1, -1]
    output = output_of(trainer, completion_ids=[5, eos], canvas_ids=canvas, unmask_step=steps, logprobs=[-0.5, None])
    rollout = read_rollout(trainer, output, 1)
    assert rollout.completion_ids.tolist() == [canvas] and rollout.unmask_step.tolist() == [steps]
    assert rollout.counted.tolist() == [[True, True] + [False] * 6]
    expected = torch.tensor([[-0.5, *[math.nan] * 3, 0, 0, 0, 0]])
    torch.testing.assert_close(rollout.logps, expected, equal_nan=True)
    assert rollout.prompt_ids.tolist() == [[5, 6]] and rollout.temperature == trainer.args.temperature
    output["logprobs"] = [[-0.5, -0.25, -0.125, -1.0, *[math.nan] * 4]]
    assert read_rollout(trainer, output, 1).logps.tolist() == [[-0.5, -0.25, -0.125, -1.0, 0, 0, 0, 0]]
    output["logprobs"] = None
    assert read_rollout(trainer, output, 1).logps[0, :4].isnan().all()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"canvas_ids": CANVAS[:7]}, r"row 0: canvas_ids has 7 entries, and max_completion_length=8.*behind the EOS"),
        ({"unmask_step": [*STEPS, 4]}, r"row 0: unmask_step has 9 entries"),
        ({"canvas_ids": [*CANVAS[:7], 10**6]}, r"row 0: canvas_ids\[7\]=1000000 must be a whole number from 0 to"),
        ({"canvas_ids": [*CANVAS[:7], 12.0]}, r"canvas_ids\[7\]=12.0 must be a whole number"),
        ({"unmask_step": [*STEPS[:7], 8]}, r"unmask_step\[7\]=8 must be a whole number from -1 to 7"),
        ({"prompt_ids": [5, -1]}, r"prompt_ids\[1\]=-1 must be a whole number"),
        ({"prompt_ids": [5] * 5000}, r"row 0: 5000 prompt tokens and max_completion_length=8 are beyond"),
        ({"unmask_step": [-1, *STEPS[1:]]}, r"canvas_ids\[0\]=5 and unmask_step\[0\]=-1 contradict each other"),
        ({"canvas_ids": ["mask", *CANVAS[1:]]}, r"canvas_ids\[0\]=\d+ and unmask_step\[0\]=0 contradict each other"),
        (
            {"canvas_ids": [*CANVAS[:7], "mask"], "unmask_step": [*STEPS[:7], -1]},
            r"position 7 was never revealed, and no EOS stands before it.*every step",
        ),
        (
            {"canvas_ids": ["mask", "eos", *CANVAS[2:]], "unmask_step": [-1, *STEPS[1:]]},
            r"position 0 was never revealed, and no EOS stands before it",
        ),
        ({"completion_ids": CANVAS[:7]}, r"completion_ids has 7 tokens that are not those of canvas_ids"),
        ({"completion_ids": [4, *CANVAS[1:]]}, r"completion_ids has 8 tokens that are not those of canvas_ids"),
        ({"canvas_ids": ["eos", *CANVAS[1:]]}, r"completion_ids has 8 tokens .* first EOS, of which there are 1"),
        ({"unmask_step": [0, 0, 2, 2, 2, 2, 3, 3]}, r"nothing was revealed in step 1\. Number the steps from 0"),
        ({"unmask_step": [1, 1, 1, 1, 2, 2, 3, 3]}, r"nothing was revealed in step 0\."),
        (
            {"unmask_step": [0, 0, 1, 1, 0, 0, 1, 1]},
            r"step 0 revealed a position of block 1 \(block_length=4\).*only in step 1\. Count the steps over",
        ),
        ({"unmask_step": [0, 0, 2, 2, 2, 3, 1, 3]}, r"step 1 revealed a position of block 1"),
        ({"unmask_step": [0, 1, 2, 3, 4, 5, 6, 7]}, r"goes up to 7, and diffusion_steps=4\. Set diffusion_steps"),
        ({"logprobs": [-1.0] * 5}, r"logprobs has 5 numbers; it needs one for each of the 8 tokens"),
        ({"logprobs": [*[-1.0] * 7, 0.5]}, r"logprobs holds 0.5, which is no log-probability"),
        ({"logprobs": [*[-1.0] * 7, -math.inf]}, r"logprobs holds -inf"),
    ],
)
def test_a_trace_that_is_incomplete_or_contradicts_itself_is_refused(trainer, changes, match):
    stand_for = {"mask": trainer.spec.mask_token_id, "eos": trainer.eos_token_ids[0]}
    changes = {
        name: [stand_for.get(value, value) if isinstance(value, str) else value for value in row]
        for name, row in changes.items()
    }
    read_rollout(trainer, output_of(trainer), 1)
    with pytest.raises(ValueError, match=match):
        read_rollout(trainer, output_of(trainer, **changes), 1)


def test_missing_fields_and_rows_are_refused(trainer):
    output = output_of(trainer)
    for name in ("canvas_ids", "unmask_step", "completion_ids"):
        with pytest.raises(ValueError, match=f"returned no {name}: a diffusion model"):
            read_rollout(trainer, {k: v for k, v in output.items() if k != name}, 1)
        with pytest.raises(
            ValueError, match=f"returned 1 rows of {name if name != 'completion_ids' else 'prompt_ids'}"
        ):
            read_rollout(
                trainer,
                output if name == "completion_ids" else {**{k: v * 2 for k, v in output.items()}, name: output[name]},
                2,
            )


def test_settings_that_an_engine_does_not_go_with_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"top_k=3.*with rollout_func"):
        build(tmp_path, rollout_func=Engine(), top_k=3)
    with pytest.raises(ValueError, match=r"mode='sequence_mask' with loss_type='vespo'"):
        build(tmp_path, rollout_func=Engine(), loss_type="vespo")
    with pytest.raises(ValueError, match=r"vllm_importance_sampling_mode='often'"):
        build(tmp_path, vllm_importance_sampling_mode="often")
    # Without an engine these settings play no part, as in TRL without vLLM.
    build(tmp_path, loss_type="vespo")
    trainer = build(tmp_path, rollout_func=Engine())
    trainer.args.top_p = 0.5
    with pytest.raises(ValueError, match=r"top_p=0.5.*with rollout_func"):
        trainer.train()


def test_log_probs_that_are_the_old_policys_must_be_complete(tmp_path):
    settings = {"estimator": "exact_trajectory", "old_logps": "rollout", "num_iterations": 2}
    trainer = run(tmp_path, rollout_func=Engine(other_model()), **settings)
    assert trainer.state.log_history[0]["sampling/mismatch_kl"] > 0
    assert "sampling/importance_sampling_ratio/mean" not in trainer.state.log_history[0], "the ratio has them already"
    broken = Engine(change=lambda output: {**output, "logprobs": [[None, *row[1:]] for row in output["logprobs"]]})
    with pytest.raises(ValueError, match=r"no logprobs for some tokens, and old_logps='rollout'"):
        run(tmp_path, rollout_func=broken, **settings)


# --------------------------------------------------------------------------------------------------------- the weights


def test_the_modes_are_trls():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert all(f'"{mode}"' in source for mode in CORRECTIONS) and source.count("_truncate") and len(CORRECTIONS) == 4


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected"),
    [
        ("token_truncate", 0.5, 1.5, [[1.5, 0.5, 1.0], [1.25, 1.0, 1.0]]),
        ("token_truncate", None, 1.5, [[1.5, 0.25, 1.0], [1.25, 1.0, 1.0]]),
        ("token_truncate", 0.5, None, [[2.0, 0.5, 1.0], [1.25, 1.0, 1.0]]),
        ("token_truncate", None, None, [[2.0, 0.25, 1.0], [1.25, 1.0, 1.0]]),
        ("token_mask", 0.5, 1.5, [[0.0, 0.0, 1.0], [1.25, 1.0, 1.0]]),
        ("token_mask", None, 1.5, [[0.0, 0.25, 1.0], [1.25, 1.0, 1.0]]),
        ("token_mask", 0.5, None, [[2.0, 0.0, 1.0], [1.25, 1.0, 1.0]]),
        ("sequence_truncate", 0.75, 1.125, [[0.75], [1.125]]),
        ("sequence_mask", 0.75, 1.125, [[0.0], [0.0]]),
        ("sequence_mask", None, None, [[0.5], [1.25]]),
        ("token_mask", 0.25, 2.0, [[2.0, 0.25, 1.0], [1.25, 1.0, 1.0]]),  # bounds are inside
    ],
)
def test_weights_by_hand(mode, low, high, expected):
    ratio = torch.tensor([[2.0, 0.25, 1.0], [1.25, 1.0, 1.0]], dtype=torch.float64)
    found = importance_weights(ratio.log(), mode, low, high)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"])
def test_loss_and_gradient_equal_trls_own(trainer, monkeypatch, loss_type, mode, level):
    """TRL multiplies the loss of each token; we multiply the advantages. With a KL term, which neither weighs."""
    if loss_type == "vespo" and (mode.startswith("sequence") or level == "sequence"):
        pytest.skip("TRL refuses it")
    generator = torch.Generator().manual_seed(1)

    def draw():
        return torch.randn(4, LENGTH, generator=generator, dtype=torch.float64)

    counted = torch.tensor([[1] * 8, [1] * 3 + [0] * 5, [1] + [0] * 7, [1] * 6 + [0] * 2])
    difference = 0.5 * draw() * counted
    ratio = importance_weights(difference, mode, 0.7, 1.4)
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer, "importance_sampling_level", level)
    monkeypatch.setattr(trainer, "beta", 0.04)
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 2, raising=False)
    inputs = {
        "prompt_ids": torch.zeros(4, 2, dtype=torch.long),
        "prompt_mask": torch.ones(4, 2, dtype=torch.long),
        "completion_ids": torch.zeros(4, LENGTH, dtype=torch.long),
        "completion_mask": counted,
        "advantages": torch.tensor([1.0, -1.0, 0.5, -2.0], dtype=torch.float64),
        "num_items_in_batch": counted.sum(),
        "old_per_token_logps": draw(),
        "ref_per_token_logps": draw(),
    }
    logps = inputs["old_per_token_logps"] + 0.3 * draw()

    def evaluate(use_vllm, **changes):
        leaf = logps.clone().requires_grad_()
        twin = copy.copy(trainer)
        twin._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        twin.use_vllm, twin.vllm_importance_sampling_correction = use_vllm, True
        loss = GRPOTrainer._compute_loss(
            twin, TokenScores(leaf, leaf.detach().abs(), counted.bool()), {**inputs, **changes}
        )
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    theirs = evaluate(True, importance_sampling_ratio=ratio)
    if loss_type == "vespo":
        ours = evaluate(False, importance_sampling_ratio=ratio)
    else:
        ours = evaluate(False, advantages=inputs["advantages"][:, None] * ratio.expand(4, LENGTH))
    plain = evaluate(False)
    for mine, other, unweighted in zip(ours, theirs, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(other, unweighted), "the weights changed nothing"


def buffered(trainer):
    """The generation batch of the last cycle, in the rows' order."""
    parts = trainer._buffered_inputs
    return {
        name: torch.cat([part[name] for part in parts])
        for name in parts[0]
        if isinstance(parts[0][name], torch.Tensor) and parts[0][name].dim()
    }


@pytest.mark.parametrize("estimator", ["step_merge", "exact_trajectory", "mean_field"])
@pytest.mark.parametrize(
    "settings", [{}, {"p_mask_prompt": 0.3}, {"score_temperature": 0.5}, {"loss_tokens": "canvas"}]
)
def test_weights_are_of_exact_scores(tmp_path, estimator, settings):
    """π(y) over the engine's probability, π step by step, at the sampling temperature and with the whole prompt."""
    trainer = build(
        tmp_path,
        estimator=estimator,
        rollout_func=Engine(other_model(), whole="loss_tokens" in settings),
        learning_rate=0.0,
        num_iterations=2,
        temperature=0.8,
        **CORRECTION,
        **settings,
    )
    trainer.train()
    batch = buffered(trainer)
    rollout = as_rollout(trainer, batch)
    exact = token_logps(trainer.model, rollout, ExactTrajectory()).logps
    difference = (exact - rollout.logps).masked_fill(~rollout.counted, 0)
    expected = difference.exp().clamp(0.5, 1.5)
    assert batch["advantages"].shape == expected.shape
    unweighted = batch["advantages"] / expected
    torch.testing.assert_close(unweighted, unweighted[:, :1].expand_as(unweighted), rtol=1e-4, atol=1e-6)
    assert (unweighted[:, 0].abs() > 0.1).any() and (expected - 1).abs().max() > 0.05
    entry = trainer.state.log_history[0]
    counted = difference[rollout.counted]
    assert entry["sampling/mismatch_kl"] == pytest.approx((counted.exp() - 1 - counted).mean().item(), rel=1e-3)
    assert entry["sampling/mismatch_max"] == pytest.approx(counted.abs().max().item(), rel=1e-3)
    assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(
        expected[rollout.counted].mean().item(), rel=1e-4
    )


class ForwardCounter(DiffusionGRPOTrainer):
    """Counts the views that are scored without a gradient."""

    def __init__(self, *args, **kwargs):
        self.forwards = Counter()  # one object, which copies of the trainer share
        super().__init__(*args, **kwargs)

    def _score_view(self, *args, **kwargs):
        self.forwards["no_grad"] += not torch.is_grad_enabled()
        return super()._score_view(*args, **kwargs)


@pytest.mark.parametrize("estimator", ["exact_trajectory", "step_merge"])
def test_an_exact_estimators_old_log_probs_are_not_computed_twice(tmp_path, estimator):
    trainer = build(
        tmp_path, ForwardCounter, estimator=estimator, rollout_func=Engine(other_model()), num_iterations=2
    )
    trainer.train()
    wanted = {type(e): e for e in (trainer.estimator, ExactTrajectory())}.values()  # the exact one once
    expected = sum(
        len(Plan(e, as_rollout(trainer, batch), 0, 4, skipped=batch["skipped"]))
        for e in wanted
        for batch in trainer._buffered_inputs
    )
    assert trainer.forwards["no_grad"] == expected


def test_sequence_weights_and_unknown_log_probs(tmp_path):
    """NaN is a difference of 0, as in TRL; a sequence's weight stands at each of its tokens."""
    engine = Engine(
        other_model(), change=lambda output: {**output, "logprobs": [[None, *row[1:]] for row in output["logprobs"]]}
    )
    trainer = build(
        tmp_path,
        estimator="exact_trajectory",
        rollout_func=engine,
        learning_rate=0.0,
        num_iterations=2,
        vllm_importance_sampling_mode="sequence_truncate",
        vllm_importance_sampling_clip_max=1.2,
    )
    trainer.train()
    batch = buffered(trainer)
    rollout = as_rollout(trainer, batch)
    difference = (batch["old_per_token_logps"][:, 0] - rollout.logps).masked_fill(~rollout.counted, 0)
    difference[:, 0] = 0
    expected = difference.sum(dim=1).exp().clamp(max=1.2)
    ratio = batch["advantages"] / expected[:, None]
    assert trainer.state.log_history[0]["sampling/importance_sampling_ratio/max"] == pytest.approx(
        expected.max().item(), rel=1e-5
    )
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    plain = build(
        tmp_path,
        estimator="exact_trajectory",
        rollout_func=Engine(other_model()),
        learning_rate=0.0,
        num_iterations=2,
        vllm_importance_sampling_correction=False,
    )
    plain.train()
    by_seed = dict(zip(buffered(plain)["view_seed"].tolist(), buffered(plain)["advantages"].tolist(), strict=True))
    found = [by_seed[seed] for seed in batch["view_seed"].tolist()]
    torch.testing.assert_close(ratio[:, 0], torch.tensor(found), rtol=1e-4, atol=1e-6)


def test_the_off_policy_mask_compares_with_the_engine(tmp_path):
    batches = {}
    for estimator in ("exact_trajectory", "step_merge"):
        settings = {"estimator": estimator, "num_iterations": 2, "off_policy_mask_threshold": 0.1}
        trainer = build(tmp_path, rollout_func=Engine(other_model()), **settings)
        trainer.train()
        batches[estimator] = buffered(trainer)
    exact = batches["exact_trajectory"]
    assert torch.equal(exact["sampling_per_token_logps"].nan_to_num(), exact["rollout_logps"])
    assert "sampling_per_token_logps" not in batches["step_merge"], "its bias is no mismatch"


def test_vespo_is_given_the_ratio_and_wd1_is_weighed(tmp_path):
    vespo = run(tmp_path, rollout_func=Engine(other_model()), loss_type="vespo", beta=0.0, **CORRECTION)
    batch = buffered(vespo)
    assert batch["importance_sampling_ratio"].shape == (8, LENGTH) and batch["advantages"].dim() == 1
    wd1 = run(tmp_path, rollout_func=Engine(other_model()), loss_type="wd1", beta=0.0, **CORRECTION)
    assert buffered(wd1)["advantages"].shape == (8, LENGTH)


# ------------------------------------------------------------------------------------------------- approximate caches


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_an_approximate_cache_is_corrected(tmp_path, cache):
    model, tokenizer = tiny(num_layers=2)  # keys and values of the first layer are those of its own token
    settings = {"estimator": "exact_trajectory", "learning_rate": 0.0, "num_iterations": 2, **CORRECTION}
    trainer = build(tmp_path, model=model, tokenizer=tokenizer, cache=cache, **settings)
    trainer.train()
    batch = buffered(trainer)
    rollout = as_rollout(trainer, batch)
    difference = (batch["old_per_token_logps"][:, 0] - rollout.logps).masked_fill(~rollout.counted, 0)
    expected = difference.exp().clamp(0.5, 1.5)
    unweighted = batch["advantages"] / expected
    torch.testing.assert_close(unweighted, unweighted[:, :1].expand_as(unweighted), rtol=1e-4, atol=1e-6)
    assert trainer.state.log_history[0]["sampling/mismatch_kl"] > 1e-4
    off = run(tmp_path, cache=cache, vllm_importance_sampling_correction=False)
    assert "sampling/mismatch_kl" not in off.state.log_history[0]
    assert buffered(off)["advantages"].dim() == 1


def test_a_run_with_a_cache_is_the_run_without_where_the_cache_is_exact(tmp_path):
    """Blocks of one step: the weights are 1, to rounding."""
    settings = {"block_length": 2, "diffusion_steps": 4, "estimator": "exact_trajectory"}
    cached, plain = (run(tmp_path, cache=cache, **settings) for cache in ("dual", None))
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-4, abs=1e-6)
    assert cached.state.log_history[0]["sampling/mismatch_kl"] < 1e-10
