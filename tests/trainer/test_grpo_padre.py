"""PADRE and the ELBO family on real TRL: docs/methods.md §4, and identities 6 and 10 of its §7."""

import copy
import itertools
import math
from collections import Counter

import pytest
import torch
from helpers_grpo import OneGraphTrainer, as_rollout, build, lora, losses, moved, reward, tiny, weights
from test_segmented_backward import peak
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import trl_dllm.likelihood.pseudo
import trl_dllm.trainer.loss
from trl_dllm import DiffusionGRPOTrainer
from trl_dllm.likelihood import (
    ESTIMATORS,
    BlockPseudoLikelihood,
    CoupledElbo,
    Elbo,
    MeanField,
    PseudoLikelihood,
    StepMerge,
    TrajectoryPseudoLikelihood,
    token_logps,
)
from trl_dllm.models import TILE_ROWS


SEPARABLE = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
CANVAS, TEMPERATURE, BETA = 4, 0.8, 0.3
LENGTHS = (4, 2, 3, 1)  # counted positions of each row: equal ones would hide wrong normalisers


def perturb(model, seed=1, scale=0.2):
    """Move the weights that are trained, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * p.abs().mean().clamp(min=0.05) * torch.randn(p.shape, generator=generator))


def make_trainer(folder, estimator, peft=False, trainer_class=DiffusionGRPOTrainer, moved_away=True, **settings):
    model, tokenizer = tiny(num_layers=2)
    trainer = build(
        folder,
        trainer_class,
        model=model,
        tokenizer=tokenizer,
        estimator=estimator,
        peft=peft,
        **{
            "temperature": TEMPERATURE,
            "max_completion_length": CANVAS,
            "block_length": CANVAS,
            "diffusion_steps": 2,
            "gradient_accumulation_steps": 1,
            "beta": BETA,
            "use_bias_correction_kl": False,
            **settings,
        },
    )
    trainer.model.double().train()
    if getattr(trainer, "ref_model", None) is not None:
        trainer.ref_model.double()
    if moved_away:
        perturb(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def reference_of(trainer):
    """The reference's logits as a function of its inputs: the model below the adapter, or the reference model."""

    def logits(**inputs):
        if trainer.ref_model is not None:
            return trainer.ref_model(**inputs).logits
        with trainer.model.disable_adapter():
            return trainer.model(**inputs).logits

    return logits


def micro_batch(trainer, seed=0, canvas=CANVAS, lengths=LENGTHS, vocab=None, prompt=3):
    """Hand-made rows of different counted lengths, with old and reference log-probs away from the policy's."""
    generator = torch.Generator().manual_seed(seed)
    rows, mask = len(lengths), trainer.spec.mask_token_id
    vocab = vocab or trainer.model.config.vocab_size
    tokens = torch.randint(5, vocab, (rows, canvas), generator=generator)
    steps = torch.randint(2, (rows, canvas), generator=generator)
    steps[:, 0] = 1
    steps[1, -1], tokens[1, -1] = -1, mask
    counted = (torch.arange(canvas) < torch.tensor(lengths)[:, None]) & (steps >= 0)
    prompt_mask = torch.ones(rows, prompt, dtype=torch.int64)
    prompt_mask[0, 0] = 0
    inputs = {
        "prompt_ids": torch.randint(5, vocab, (rows, prompt), generator=generator),
        "prompt_mask": prompt_mask,
        "completion_ids": tokens,
        "completion_mask": counted.long(),
        "unmask_step": steps,
        "counted": counted,
        "rollout_logps": torch.zeros(rows, canvas, dtype=torch.float64),
        "view_seed": torch.arange(rows) + 17,
        "advantages": torch.tensor([1.3, -0.7, 0.4, -1.0], dtype=torch.float64)[:rows],
        "num_items_in_batch": counted.sum(),
    }
    return inputs


def with_old_and_ref(trainer, inputs, estimator, iteration=0):
    rollout = as_rollout(trainer, inputs)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        logps = token_logps(trainer.model, rollout, estimator, TEMPERATURE, iteration=iteration).logps
        noise = torch.randn(logps.shape, generator=generator, dtype=torch.float64)
        old = (logps + 0.4 * noise).masked_fill(~rollout.counted, 0)
        out = {**inputs, "old_per_token_logps": old[:, None]}
        if trainer.ref_model is not None:
            ref = token_logps(trainer.ref_model, rollout, estimator, TEMPERATURE, iteration=iteration).logps
            out["ref_per_token_logps"] = ref.masked_fill(~rollout.counted, 0)[:, None]
    return out


def flat(parameters, gradients):
    pairs = zip(parameters, gradients, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def gradient(trainer, inputs):
    """(loss, flat gradient) of a micro-step."""
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    trainer.accelerator.backward(loss)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    return loss.detach().item(), flat(parameters, [p.grad for p in parameters])


# ------------------------------------------------------------------------------------------------------- identity 6


def every_draw(monkeypatch):
    """Yield once for each order of the canvas, with the library made to draw it: each row's counted positions are
    then drawn in every order equally often."""

    def ranks(order):
        def random_ranks(keep, *_):
            return order.expand(keep.shape).masked_fill(~keep, 99).argsort(dim=1, stable=True).argsort(dim=1)

        return random_ranks

    for order in itertools.permutations(range(CANVAS)):
        monkeypatch.setattr(trl_dllm.likelihood.pseudo, "random_ranks", ranks(torch.tensor(order)))
        yield


def mean_and_full(monkeypatch, folder, estimator, full, **settings):
    trainer = make_trainer(folder, estimator, **settings)
    inputs = with_old_and_ref(trainer, micro_batch(trainer), full)
    found = [gradient(trainer, inputs) for _ in every_draw(monkeypatch)]
    assert len(found) == 24
    mean_loss = sum(loss for loss, _ in found) / 24
    mean = torch.stack([g for _, g in found]).mean(dim=0)
    spread = torch.stack([g for _, g in found]).std(dim=0).max().item()
    trainer.estimator = full
    loss, expected = gradient(trainer, inputs)
    scale = expected.abs().max().item()
    assert scale > 1e-6 and spread > 1e-2 * scale, "the draws must differ"
    return abs(mean_loss - loss) / abs(loss), (mean - expected).abs().max().item() / scale


KL = {
    "no KL": {"beta": 0.0},
    "k3": {},
    "k3 corrected": {"use_bias_correction_kl": True},
    "full": {"kl_estimator": "full"},
}


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("loss_type", SEPARABLE)
def test_identity_6_the_mean_gradient_of_all_draws_is_the_full_one(monkeypatch, tmp_path, loss_type, kl):
    """PKL with K = 2, rows of 4, 2, 3 and 1 counted positions, clipped ratios among them."""
    settings = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    loss_error, error = mean_and_full(
        monkeypatch, tmp_path, PseudoLikelihood(2), PseudoLikelihood(), loss_type=loss_type, **settings, **KL[kl]
    )
    assert error < 1e-5 and loss_error < 1e-5, (loss_error, error)


@pytest.mark.parametrize("number", [1, 3])
def test_identity_6_for_other_numbers_of_positions(monkeypatch, tmp_path, number):
    _, error = mean_and_full(monkeypatch, tmp_path, PseudoLikelihood(number), PseudoLikelihood(), loss_type="dapo")
    assert error < 1e-5


@pytest.mark.parametrize("loss_type", ["bnpo", "dr_grpo"])
def test_identity_6_fails_if_the_mask_is_merely_shrunk(monkeypatch, tmp_path, loss_type):
    """The control: without n / k and with shrunk normalisers the expectation is another gradient."""
    monkeypatch.setattr(
        trl_dllm.trainer.loss, "sub_sample_weights", lambda mask, scored, _: (mask.bool() & scored).long()
    )
    _, error = mean_and_full(monkeypatch, tmp_path, PseudoLikelihood(2), PseudoLikelihood(), loss_type=loss_type)
    assert error > 1e-2


# ------------------------------------------------------------------------------------------------------------ refusals

SUB_SAMPLED = {
    "pkl": {"estimator": "pkl", "estimator_kwargs": {"num_positions": 2}},
    "pkl_u": {"estimator": "pkl_u", "estimator_kwargs": {"block_size": 2}},
}
COMPLETE = {
    "pkl": {"estimator": "pkl"},
    "pkl_u": {"estimator": "pkl_u", "estimator_kwargs": {"block_size": 2, "num_views": "partition"}},
}
COUPLED_TOKENS = [
    {"importance_sampling_level": "sequence"},
    {"importance_sampling_level": "sequence_token"},
    {"loss_type": "luspo"},
    {"loss_type": "vespo"},
    {"off_policy_mask_threshold": 0.5},
    {"top_entropy_quantile": 0.5},
]


@pytest.mark.parametrize("settings", COUPLED_TOKENS, ids=str)
@pytest.mark.parametrize("name", SUB_SAMPLED)
def test_losses_that_couple_tokens_are_refused_when_positions_are_left_out(tmp_path, name, settings):
    (field, value), *_ = settings.items()
    with pytest.raises(ValueError, match=rf"{field}='?{value}"):
        build(tmp_path, **SUB_SAMPLED[name], **settings)
    with pytest.raises(ValueError, match=rf"{field}='?{value}"):
        estimator = ESTIMATORS[name](**SUB_SAMPLED[name]["estimator_kwargs"])
        build(tmp_path, estimator=estimator, **settings)
    build(tmp_path, **COMPLETE[name], **settings)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"kl_estimator": "full"}, "kl_estimator='full' with beta=0"),
        ({"kl_estimator": "k2"}, "kl_estimator='k2' is unknown"),
        ({"ratio_denominator": "reference"}, "ratio_denominator='reference' is unknown"),
        ({"loss_type": "wd1", "beta": 0.1}, "beta=0.1 with loss_type='wd1'"),
        ({"loss_type": "wd1", "ratio_denominator": "ref"}, "ratio_denominator='ref' with loss_type='wd1'"),
        ({"estimator": "pkl", "estimator_kwargs": {"positions": 3}}, "did you mean 'num_positions'"),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path, settings, match):
    with pytest.raises(ValueError, match=match):
        build(tmp_path, **settings)


def test_full_kl_is_refused_where_the_adapter_trains_the_output_head(tmp_path):
    """The reference is projected by the model's own head, beside the policy. (TRL refuses LoRA on the head.)"""
    settings = {"peft": lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), "beta": 0.04}
    with pytest.raises(ValueError, match="a copy of that head"):
        build(tmp_path, kl_estimator="full", **settings)
    build(tmp_path, kl_estimator="k3", **settings)


def test_isolated_masks_and_pkl_t_are_refused_for_shifted_families(tmp_path):
    for estimator, kwargs in (("pkl_t", None), ("pkl_u", {"mask_attention": "isolated"})):
        model, tokenizer = tiny("dream")
        with pytest.raises(ValueError, match="logits_shift=1"):
            build(tmp_path, model=model, tokenizer=tokenizer, estimator=estimator, estimator_kwargs=kwargs)


# -------------------------------------------------------------------------------------------------- full-vocabulary KL


def brute_force_kl(trainer, inputs, estimator):
    """Σ_v p (log p - log q) from full logits of every view, (B, L) of the counted positions, with a graph."""
    rollout, mask = as_rollout(trainer, inputs), trainer.spec.mask_token_id
    reference = reference_of(trainer)
    rows = [[torch.zeros((), dtype=torch.float64)] * rollout.counted.shape[1] for _ in range(len(rollout))]
    for n in range(estimator.num_views(rollout)):
        view = estimator.view(rollout, n, rollout.view_seed, 0)
        for row in range(len(rollout)):
            pad = int((~rollout.prompt_mask[row]).sum())
            inputs = {
                "input_ids": view.input_ids[row : row + 1, pad:],
                "position_ids": view.position_ids[row : row + 1, pad:],
                "attention_mask": view.attention.allowed()[row, pad:, pad:][None, None],
            }
            columns = (view.targets[row] != -100).nonzero().flatten().tolist()
            columns = [c for c in columns if rollout.counted[row, view.index[row, c]]]
            if not columns:
                continue
            keep = [v for v in range(trainer.model.config.vocab_size) if v != mask]
            with torch.no_grad():
                theirs = reference(**inputs)[0].double()
            mine = trainer.model(**inputs).logits[0].double()
            for c in columns:
                p, q = ((x[c - pad, keep] / TEMPERATURE).softmax(dim=0) for x in (mine, theirs))
                i = int(view.index[row, c])
                rows[row][i] = rows[row][i] + (p * (p / q).log()).sum()
    return torch.stack([torch.stack(r) for r in rows])


def normalised(loss_type, values, inputs):
    """A per-token table as each loss normalises it, by hand."""
    mask = inputs["completion_mask"]
    number = mask.sum(dim=1)
    sums = (values * mask).sum(dim=1)
    return {
        "grpo": (sums / number).mean(),
        "sapo": (sums / number).mean(),
        "bnpo": sums.sum() / number.sum(),
        "dr_grpo": sums.sum() / mask.numel(),
        "dapo": sums.sum() / inputs["num_items_in_batch"],
        "cispo": sums.sum() / inputs["num_items_in_batch"],
        "vespo": sums.sum() / inputs["num_items_in_batch"],
        "luspo": sums.mean(),
    }[loss_type]


CASES = [(loss, PseudoLikelihood()) for loss in (*SEPARABLE, "luspo", "vespo")]
CASES += [
    ("grpo", MeanField()),
    ("dapo", StepMerge(2)),
    ("luspo", StepMerge(2)),
    ("grpo", TrajectoryPseudoLikelihood()),
]


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type, estimator", CASES, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_full_kl_and_its_gradient_are_those_of_full_logits(tmp_path, loss_type, estimator, peft):
    """PADRE's D_KL(π_θ ‖ π_ref) of each scored position; loss with β minus loss without is β times its average."""
    trainer = make_trainer(tmp_path, estimator, peft=peft, loss_type=loss_type, kl_estimator="full")
    inputs = with_old_and_ref(trainer, micro_batch(trainer), estimator)
    inputs.pop("ref_per_token_logps", None)  # k3's, which must not be read
    trainer.beta = 0.0
    loss_without, without = gradient(trainer, inputs)
    trainer.beta = BETA
    trainer._metrics["train"].clear()
    loss, total = gradient(trainer, inputs)
    kl = brute_force_kl(trainer, inputs, estimator)
    expected = BETA * normalised(loss_type, kl, inputs)
    assert expected.item() > 1e-3
    assert loss - loss_without == pytest.approx(expected.item(), rel=1e-5)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    want = torch.autograd.grad(expected, parameters, allow_unused=True)
    want = flat(parameters, want)
    assert (total - without - want).abs().max() < 1e-4 * want.abs().max()  # a difference of larger numbers
    (logged,) = trainer._metrics["train"]["kl"]
    mask = inputs["completion_mask"]
    assert logged == pytest.approx(((kl.detach() * mask).sum() / mask.sum()).item(), rel=1e-5)


FILTERS = {
    "off-policy mask": {"off_policy_mask_threshold": 0.05},
    "entropy quantile": {"top_entropy_quantile": 0.5},
    "entropy bonus": {"entropy_coef": 0.1},
}


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("name", FILTERS)
def test_filters_and_the_entropy_bonus_go_with_the_full_kl(tmp_path, name, loss_type):
    """They see all views together, and the KL counts at every counted token, whatever they leave out."""
    found = []
    settings = {"kl_estimator": "full", "loss_type": loss_type}
    for trainer_class in (DiffusionGRPOTrainer, OneGraphTrainer):
        trainer = make_trainer(
            tmp_path, StepMerge(2), trainer_class=trainer_class, max_completion_length=6, block_length=6, **settings
        )
        inputs = with_old_and_ref(trainer, micro_batch(trainer, canvas=6, lengths=(6, 5, 3, 6)), StepMerge(2))
        inputs["old_per_token_logps"][3] += 0.3  # off-policy as a whole; row 1 is so in one of its views alone
        _, plain = gradient(trainer, inputs)
        for field, value in FILTERS[name].items():
            setattr(trainer, field, value)
        trainer._entropy_bonus_enabled = name == "entropy bonus"
        assert not trainer._separable
        found.append(gradient(trainer, inputs))
        assert (found[-1][1] - plain).abs().max() > 1e-3 * plain.abs().max(), "nothing was filtered"
    (loss, segmented), (one_loss, one_graph) = found
    assert loss == pytest.approx(one_loss, rel=1e-6)
    assert (segmented - one_graph).abs().max() < 1e-6 * one_graph.abs().max()
    kl = brute_force_kl(trainer, inputs, StepMerge(2)).detach()
    trainer.beta = 0.0
    without, _ = gradient(trainer, inputs)
    assert loss - without == pytest.approx((BETA * normalised(loss_type, kl, inputs)).item(), rel=1e-5)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("estimator", [PseudoLikelihood(2), MeanField(), Elbo(2)], ids=lambda e: type(e).__name__)
def test_identity_10_full_kl_of_an_identical_reference_is_zero(tmp_path, estimator, peft):
    trainer = make_trainer(tmp_path, estimator, peft=peft, kl_estimator="full", moved_away=False)
    inputs = micro_batch(trainer)
    inputs["advantages"] = torch.zeros(4, dtype=torch.float64)
    loss, zero = gradient(trainer, inputs)
    assert loss == 0 and trainer._metrics["train"]["kl"] == [0.0]
    inputs["advantages"] = torch.ones(4, dtype=torch.float64)
    _, scale = gradient(trainer, inputs)
    assert zero.abs().max() < 1e-10 * scale.abs().max()


class LargestTensor(TorchDispatchMode):
    """The largest number of elements of any result of an operation with the vocabulary as its last dimension."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.largest, self.tiles = vocab, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and self.vocab in tensor.shape:
                self.largest, self.tiles = max(self.largest, tensor.numel()), self.tiles + 1
        return out


@pytest.mark.parametrize("estimator", [PseudoLikelihood(2), MeanField()], ids=["pkl", "mean_field"])
def test_full_kl_makes_no_tensor_beyond_one_tile_of_the_vocabulary(tmp_path, estimator):
    """80 rows are scored; neither policy's logits of more than a tile's rows exist, in the backward pass either."""
    vocab, canvas = 1009, 48
    model, tokenizer = tiny(vocab_size=vocab)
    trainer = build(
        tmp_path, model=model, tokenizer=tokenizer, estimator=estimator, kl_estimator="full", beta=BETA,
        max_completion_length=canvas, block_length=canvas, diffusion_steps=24, gradient_accumulation_steps=1,
    )  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = micro_batch(trainer, canvas=canvas, lengths=(48, 20, 40, 30), vocab=vocab)
    with LargestTensor(vocab) as seen:
        gradient(trainer, inputs)
    assert seen.tiles > 10 and seen.largest <= TILE_ROWS * vocab, (seen.largest, TILE_ROWS * vocab)


@pytest.mark.parametrize("denominator", ["old", "ref"])
def test_full_kl_scores_the_reference_at_generation_only_for_the_ratio(tmp_path, denominator):
    """It is run beside the policy; its log-probs of the tokens are needed for `ratio_denominator: ref` alone."""
    trainer = build(
        tmp_path,
        Recorder,
        estimator="step_merge",
        num_segments=3,
        kl_estimator="full",
        beta=0.04,
        ratio_denominator=denominator,
        num_iterations=2,
        max_steps=2,
    )
    trainer.train()
    batch = trainer.trained
    assert ("ref_per_token_logps" in batch) == (denominator == "ref") and "old_per_token_logps" in batch
    # The old policy is scored by its first update; the reference once, for each of two micro-batches.
    assert trainer.calls["trained"] == 2 * trainer.calls["per pass"]
    assert trainer.calls["scored"] == (trainer.calls["per pass"] if denominator == "ref" else 0)
    tokens, parameters = 8 * 8, sum(p.numel() for p in trainer.model.parameters())
    steps = int(batch["unmask_step"].max()) + 1
    cycle = tokens * parameters * (2 * steps + 2 * 3 + 2 * 3 * (6 + 2))
    assert losses(trainer, "flops_paper")[0] == cycle


@pytest.mark.parametrize("estimator", ["pkl", "elbo"])
def test_memory_does_not_grow_with_the_number_of_positions(tmp_path, estimator):
    name = "num_positions" if estimator == "pkl" else "num_samples"
    one, sixteen = (peak(tmp_path, estimator=estimator, estimator_kwargs={name: number}) for number in (1, 16))
    assert sixteen <= 1.25 * one, (sixteen, one)


# -------------------------------------------------------------------------------------------------- ratio_denominator


class Recorder(DiffusionGRPOTrainer):
    """Keeps each generation batch as it was scored, and counts what is run for it."""

    def __init__(self, *args, **kwargs):
        self.batches, self.calls = [], Counter()
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        outputs = super()._generate_and_score_completions(inputs)
        self.batches.append({key: value for key, value in outputs.items() if torch.is_tensor(value)})
        return outputs

    @property
    def trained(self) -> dict:
        """The last generation batch as it was trained on, in the order of the buffer."""
        parts = self._buffered_inputs
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0] if parts[0][key].dim()}

    def _score_view(self, *args, **kwargs):
        self.calls["trained" if torch.is_grad_enabled() else "scored"] += 1
        self.calls["per pass"] += torch.is_grad_enabled() and self._inner_iteration == 0
        return super()._score_view(*args, **kwargs)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_the_denominator_is_the_references_log_probs(tmp_path, peft, beta):
    """PADRE Eq. 14 and Algorithm 1 line 8 as printed; the reference is loaded at β = 0 too."""
    model, tokenizer = tiny()
    initial = copy.deepcopy(model).eval()
    trainer = build(
        tmp_path, Recorder, model=model, tokenizer=tokenizer, peft=peft, beta=beta, ratio_denominator="ref",
        estimator="pkl", estimator_kwargs={"num_positions": 3}, num_iterations=2, max_steps=4, p_mask_prompt=0.15,
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    assert moved(before, trainer) and trainer.beta == trainer.args.beta == beta
    assert (trainer.ref_model is None) == peft
    assert len(trainer.batches) == 2
    for batch in (trainer.trained,):
        old = batch["old_per_token_logps"]
        assert old.shape[1] == 2 and not torch.equal(old[:, 0], old[:, 1])
        for k in range(2):
            scores = token_logps(
                initial, as_rollout(trainer, batch), trainer.estimator, iteration=k, p_mask_prompt=0.15
            )
            torch.testing.assert_close(old[:, k], scores.logps.detach(), atol=1e-5, rtol=0)
    assert ("kl" in trainer.state.log_history[0]) == (beta > 0)
    # Ratio 1 only until the first update.
    policy = token_logps(trainer.model, as_rollout(trainer, batch), trainer.estimator, p_mask_prompt=0.15).logps
    assert (policy - old[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_the_gradient_with_the_references_denominator(tmp_path, loss_type):
    """By hand: -A min(r, clip r) with r = π_θ / π_ref."""
    trainer = make_trainer(
        tmp_path, PseudoLikelihood(), loss_type=loss_type, ratio_denominator="ref", beta=0.0, epsilon_high=0.4
    )
    inputs = with_old_and_ref(trainer, micro_batch(trainer), PseudoLikelihood())
    inputs["old_per_token_logps"] = inputs["ref_per_token_logps"]
    _, got = gradient(trainer, inputs)
    logps = token_logps(trainer.model, as_rollout(trainer, inputs), PseudoLikelihood(), TEMPERATURE).logps
    ratio = (logps - inputs["ref_per_token_logps"][:, 0]).exp()
    advantage = inputs["advantages"][:, None]
    if loss_type == "grpo":
        table = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.4) * advantage)
    else:
        table = -ratio.clamp(max=0.4).detach() * advantage * logps
    parameters = list(trainer.model.parameters())
    want = torch.autograd.grad(normalised(loss_type, table, inputs), parameters, allow_unused=True)
    want = flat(parameters, want)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


# ------------------------------------------------------------------------------------------------------------- wd1


class GradientsBeforeTheStep(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.seen.append((weights, {name: p.grad.detach().clone() for name, p in model.named_parameters()}))


@pytest.mark.parametrize("estimator", ["mean_field", "step_merge"])
def test_wd1_has_the_gradients_of_its_definition(tmp_path, estimator):
    """-Σ w⁺ log π + Σ w⁻ log π with w± = softmax(±A) in the group, averaged over groups and divided by L; two groups
    of four rows, each of them split over two micro-batches; two inner iterations, no ratio, no old log-probs."""
    rewards, callback = [], GradientsBeforeTheStep()

    def recorded(completions, **kwargs):
        rewards.append(reward(completions))
        return rewards[-1]

    # A copy of the model before accelerate ties its forward to the instance.
    model, tokenizer = tiny()
    initial = copy.deepcopy(model)
    trainer = build(
        tmp_path, Recorder, model=model, tokenizer=tokenizer, estimator=estimator, loss_type="wd1", beta=0.0,
        scale_rewards="none", num_iterations=2, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        num_generations=4, max_steps=2, reward_funcs=recorded, callbacks=[callback], max_grad_norm=1e9,
        p_mask_prompt=0.2, learning_rate=0.05,
    )  # fmt: skip
    trainer.train()
    views = trainer.estimator.num_views(as_rollout(trainer, trainer.batches[0]))
    assert trainer.calls["scored"] == 0, "no old log-probs are computed"
    assert 0 < trainer.calls["trained"] <= 2 * 4 * views
    (batch,) = trainer.batches
    assert "old_per_token_logps" not in batch and len(rewards) == 1
    r = torch.tensor(rewards[0]).view(2, 4)
    weight = r.softmax(dim=1) - (-r).softmax(dim=1)
    assert weight.abs().max() > 0.1
    assert len(callback.seen) == 2
    for k, (state, got) in enumerate(callback.seen):
        initial.load_state_dict(state, strict=False)
        logps = token_logps(
            initial, as_rollout(trainer, batch), trainer.estimator, iteration=k, p_mask_prompt=0.2
        ).logps
        total = (logps * batch["counted"]).sum(dim=1).view(2, 4)
        loss = -(weight * total).sum(dim=1).mean() / trainer.args.max_completion_length
        want = torch.autograd.grad(loss, list(initial.parameters()))
        scale = max(g.abs().max() for g in want)
        for (name, _), g in zip(initial.named_parameters(), want, strict=True):
            assert (got[name] - g).abs().max() < 2e-5 * scale, (k, name)


# ----------------------------------------------------------------------------------------------------- whole cycles

CYCLES = {
    "mean_field": {},
    "step_merge": {},
    "exact_trajectory": {},
    "agrpo": {"num_steps": 2},
    "any_order": {"decoding": "any_order"},
    "pkl": {"num_positions": 3},
    "pkl_u": {"block_size": 2, "num_views": 2},
    "pkl_t": {},
    "elbo": {"num_samples": 3},
    "coupled_elbo": {},
    "spg": {"block_length": 4, "beta": 0.0, "ratio_denominator": "current"},
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_trains(tmp_path, name):
    kwargs = dict(CYCLES[name])
    settings = {"beta": 0.04} | {
        key: kwargs.pop(key) for key in ("decoding", "beta", "ratio_denominator") if key in kwargs
    }
    trainer = build(
        tmp_path, estimator=name, estimator_kwargs=kwargs or None, num_iterations=2, max_steps=2,
        p_mask_prompt=0.15, **settings,
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    assert all(map(math.isfinite, losses(trainer))) and moved(before, trainer)
    if settings["beta"]:
        assert losses(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "estimator, loss_type, level",
    [
        (PseudoLikelihood(3), "dapo", "token"),
        (BlockPseudoLikelihood(2, 2), "bnpo", "token"),
        (BlockPseudoLikelihood(2, "partition"), "grpo", "sequence"),
        (Elbo(3), "grpo", "sequence"),
        (Elbo(2), "dapo", "token"),
        (CoupledElbo(2), "grpo", "token"),
        (CoupledElbo(4), "luspo", "sequence"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_gradients_of_one_view_at_a_time_are_those_of_one_graph(tmp_path, estimator, loss_type, level):
    found = []
    for trainer_class in (DiffusionGRPOTrainer, OneGraphTrainer):
        trainer = make_trainer(
            tmp_path, estimator, trainer_class=trainer_class, loss_type=loss_type, importance_sampling_level=level
        )
        inputs = with_old_and_ref(trainer, micro_batch(trainer), estimator)
        found.append(gradient(trainer, inputs))
    (loss, segmented), (one_loss, one_graph) = found
    assert loss == pytest.approx(one_loss, rel=1e-6)
    assert one_graph.abs().max() > 1e-6
    assert (segmented - one_graph).abs().max() < 1e-6 * one_graph.abs().max()


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_views_of_very_improbable_tokens_have_the_gradients_of_one_graph(tmp_path, beta):
    """float32, and old log-probs below -88: exp(0 - old) would be infinite where a view scores nothing, and its slope
    times the zero there no number."""
    found = []
    for trainer_class in (DiffusionGRPOTrainer, OneGraphTrainer):
        trainer = make_trainer(tmp_path, StepMerge(2), trainer_class=trainer_class, score_temperature=0.02, beta=beta)
        trainer.model.float()
        inputs = {k: v.float() if v.is_floating_point() else v for k, v in micro_batch(trainer).items()}
        rollout = as_rollout(trainer, inputs)
        with torch.no_grad():
            old = token_logps(trainer.model, rollout, StepMerge(2), 0.02).logps
        noise = 0.1 * torch.randn(old.shape, generator=torch.Generator().manual_seed(5))
        inputs["old_per_token_logps"] = (old + noise).masked_fill(~rollout.counted, 0)[:, None]
        inputs["ref_per_token_logps"] = inputs["old_per_token_logps"]
        views = [StepMerge(2).view(rollout, n, rollout.view_seed, 0).targets.ne(-100).any(dim=1) for n in range(2)]
        assert (old[rollout.counted] < -88).float().mean() > 0.5 and all(view.any() for view in views)
        found.append(gradient(trainer, inputs))
    (loss, segmented), (one_loss, one_graph) = found
    assert loss == pytest.approx(one_loss, rel=1e-5)
    assert one_graph.isfinite().all() and one_graph.abs().max() > 0
    assert (segmented - one_graph).abs().max() < 1e-5 * one_graph.abs().max()


@pytest.mark.parametrize("redraw", [True, False])
@pytest.mark.parametrize("name", ["pkl", "pkl_u", "elbo", "coupled_elbo"])
def test_views_are_drawn_anew_in_each_inner_iteration_unless_told_otherwise(tmp_path, name, redraw):
    """Old and reference log-probs are stacked, one for each draw, and are those of `token_logps` at that iteration."""
    model, tokenizer = tiny()
    initial = copy.deepcopy(model).eval()
    trainer = build(
        tmp_path, Recorder, model=model, tokenizer=tokenizer, estimator=name, estimator_kwargs=CYCLES[name] or None,
        num_iterations=3, max_steps=3, beta=0.04, redraw_views=redraw,
    )  # fmt: skip
    calls = []
    view = trainer.estimator.view

    def recorded(rollout, n, seeds, k):
        calls.append((torch.is_grad_enabled(), k))
        return view(rollout, n, seeds, k)

    trainer.estimator.view = recorded
    trainer.train()
    seen = set(calls)
    batch = trainer.trained
    draws = 3 if redraw else 1
    for key in ("old_per_token_logps", "ref_per_token_logps"):
        assert batch[key].shape == (8, draws, 8)
        for k in range(draws):
            scores = token_logps(initial, as_rollout(trainer, batch), trainer.estimator, iteration=k)
            torch.testing.assert_close(batch[key][:, k], scores.logps.detach(), atol=1e-5, rtol=0)
    assert {k for trained, k in seen if trained} == set(range(draws))
    assert {k for trained, k in seen if not trained} == set(range(draws))
    if redraw:
        assert not torch.equal(batch["old_per_token_logps"][:, 0], batch["old_per_token_logps"][:, 1])


def test_a_resumed_run_draws_the_same_positions(tmp_path):
    settings = {
        "estimator": "pkl", "estimator_kwargs": {"num_positions": 3}, "num_iterations": 2, "beta": 0.04,
        "kl_estimator": "full", "p_mask_prompt": 0.15,
    }  # fmt: skip
    whole = build(tmp_path / "whole", max_steps=4, **settings)
    whole.train()
    first = build(tmp_path / "cut", max_steps=4, save_strategy="steps", save_steps=2, **settings)
    first.train()
    resumed = build(tmp_path / "cut", max_steps=4, save_strategy="steps", save_steps=2, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    expected = weights(whole)
    for name, value in weights(resumed).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


# --------------------------------------------------------------------------------------------------------- identity 14


def elbo_batch(folder, **kwargs):
    """A trainer on `Elbo(3)` whose policy has moved from the reference, and a micro-batch of it."""
    trainer = make_trainer(folder, Elbo(3), **kwargs)
    inputs = with_old_and_ref(trainer, micro_batch(trainer), trainer.estimator)
    inputs["old_per_token_logps"] = inputs["ref_per_token_logps"]
    return trainer, inputs


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_identity_14_an_elbos_ratio_is_that_of_its_mean_at_the_token_and_at_the_sequence_level(tmp_path, loss_type):
    """exp((ELBO - ELBO_old) / n) for every token of a row: one number, so both levels have one loss and one gradient.

    Weighted log-probs of single positions, which a token-level ratio exponentiated, differ by nats where these differ
    by hundredths.
    """
    found = {}
    for level in ("token", "sequence"):
        trainer, inputs = elbo_batch(tmp_path, loss_type=loss_type, importance_sampling_level=level)
        rollout = as_rollout(trainer, inputs)
        with torch.no_grad():
            logps = token_logps(trainer.model, rollout, Elbo(3), TEMPERATURE).logps
        for row, counted in zip(logps, rollout.counted, strict=True):
            assert row[counted].unique().numel() == 1 and row[~counted].eq(0).all()
        found[level] = gradient(trainer, inputs)
    assert found["token"][0] == pytest.approx(found["sequence"][0], rel=1e-6)
    token, sequence = found["token"][1], found["sequence"][1]
    assert (token - sequence).abs().max() < 1e-5 * token.abs().max()


def test_identity_14_k3_of_an_elbo_stays_small_where_policies_are_near(tmp_path):
    """Weighted differences of single positions made k3 explode (a KL of 5e4 at the second step, measured)."""
    trainer = build(
        tmp_path,
        estimator="elbo",
        estimator_kwargs={"num_samples": 2},
        beta=0.04,
        num_iterations=4,
        max_steps=8,
        learning_rate=1e-3,
    )
    trainer.train()
    kls, norms = losses(trainer, "kl"), losses(trainer, "grad_norm")
    assert kls[0] == 0 and max(kls) < 0.05 and max(norms) < 1e3, (kls, norms)
