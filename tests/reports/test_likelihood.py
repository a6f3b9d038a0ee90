"""The likelihood report against full logits, one token at a time (docs/methods.md §6)."""

import json
import math

import pytest
import torch
from cases import MASK, SHIFT, VOCAB, sample
from oracles import canvas_before, full_logits, random_rollout, segment_cuts, token_distribution, unpadded
from torch.utils._python_dispatch import TorchDispatchMode

from trl_dllm import cli
from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import AnyOrder, Elbo, ExactTrajectory, MeanField, PseudoLikelihood, StepMerge, token_logps
from trl_dllm.models import TILE_ROWS, MaskedDiffusionSpec, create_tiny_model
from trl_dllm.noise import hash64
from trl_dllm.reports.likelihood import default_estimators, likelihood_report


TEMPERATURE = 0.8


def slow_report(model, rollout, shift, canvas_of):
    """Mean log-prob, gap, D, KL and L·ε, token by token; `canvas_of(tokens, steps, i)` is the estimate's canvas."""
    logps, gaps, kls, by_row, worst = [], [], [], [], 0.0
    real = [v for v in range(VOCAB) if v != MASK]
    for row in range(len(rollout)):
        tokens, steps, prompt = (
            rollout.completion_ids[row].tolist(),
            rollout.unmask_step[row].tolist(),
            unpadded(rollout, row),
        )
        total = 0.0
        for i in rollout.counted[row].nonzero().flatten().tolist():
            canvases = canvas_before(tokens, steps, steps[i], MASK), canvas_of(tokens, steps, i)
            q, p = (
                token_distribution(full_logits(model, prompt + list(c))[len(prompt) + i - shift], MASK, TEMPERATURE)[
                    real
                ]
                for c in canvases
            )
            at = real.index(tokens[i])
            logps.append(p[at].log().item())
            gaps.append((q[at] / p[at]).log().item())
            kls.append((q * (q / p).log()).sum().item())
            worst = max(worst, (q / p).log().max().item())
            total += gaps[-1]
        by_row.append(total)
    mean = len(logps)
    return sum(logps) / mean, sum(gaps) / mean, sum(by_row) / len(by_row), sum(kls) / mean, len(tokens) * worst


def all_others(tokens, steps, i):
    return tuple(MASK if j == i else t for j, t in enumerate(tokens))


def cut_of(segments):
    def canvas(tokens, steps, i):
        cut = max(b for b in segment_cuts(1 + max(steps), segments) if b <= steps[i])
        return canvas_before(tokens, steps, cut, MASK)

    return canvas


@pytest.mark.parametrize("batch_size", [None, 2])
def test_every_number_equals_brute_force(models, family, batch_size):
    model, rollout = models(family), random_rollout(MASK, VOCAB, 1, temperature=TEMPERATURE)
    cases = {
        "mean field": (MeanField(), cut_of(1)),
        "three": (StepMerge(3), cut_of(3)),
        "exact": (ExactTrajectory(), cut_of(99)),
        "pkl": (PseudoLikelihood(), all_others),
    }
    lines = likelihood_report(model, rollout, {name: e for name, (e, _) in cases.items()}, batch_size=batch_size)
    for line in lines:
        estimator, canvas_of = cases[line.name]
        with torch.no_grad():
            logp, gap, divergence, kl, bound = slow_report(model, rollout, SHIFT[family], canvas_of)
        assert line.logp == pytest.approx(logp, abs=1e-5)
        assert line.gap == pytest.approx(gap, abs=1e-5) and line.kl == pytest.approx(kl, abs=1e-5)
        assert line.divergence == pytest.approx(divergence, abs=1e-4)
        assert line.forwards == estimator.num_views(rollout)
        if line.name == "pkl":
            assert line.bound is None
        else:
            assert line.bound == pytest.approx(bound, abs=1e-4) and line.bound >= line.divergence - 1e-6
    assert lines[0].kl > 0.05 and lines[0].kl_error > 0 and abs(lines[2].kl) < 1e-9


def test_weighted_and_sub_sampled_estimators_agree_with_their_scores(models):
    """An ELBO's log-probs carry their weights; a sub-sample's D is scaled up to all counted positions."""
    model, rollout = models("llada"), random_rollout(MASK, VOCAB, 2, temperature=TEMPERATURE)
    (elbo, some) = likelihood_report(model, rollout, {"elbo": Elbo(4), "some": PseudoLikelihood(3)})
    with torch.no_grad():
        exact = token_logps(model, rollout, ExactTrajectory()).logps
        scores = token_logps(model, rollout, PseudoLikelihood(3))
    total = rollout.counted.sum(dim=1)
    gap = ((exact - scores.logps) * scores.scored).sum(dim=1) / scores.scored.sum(dim=1) * total
    assert some.divergence == pytest.approx(gap.mean().item(), abs=1e-5)
    with torch.no_grad():
        bound = token_logps(model, rollout, Elbo(4)).logps.sum() / total.sum()
    assert elbo.logp == pytest.approx(bound.item(), abs=1e-5), "weights R / l sum to R in each draw"


def test_any_order_decoding_is_compared_with_its_own_conditionals(models):
    """The mask rows of `AnyOrder` are the truth there, and its own KL is zero."""
    model = models("llada")
    ids, mask = torch.tensor([[5, 6, 7], [9, 8, 20]]), torch.ones(2, 3).bool()
    config = DiffusionGenerationConfig(max_new_tokens=8, block_length=8, diffusion_steps=4, decoding="any_order")
    rollout = generate(model, ids, mask, config, hash64(1, torch.arange(2)))
    chosen = default_estimators(rollout, MaskedDiffusionSpec(MASK))
    lines = {line.name: line for line in likelihood_report(model, rollout, chosen, exact=AnyOrder())}
    assert abs(lines["PKL-T = AnyOrder"].kl) < 1e-9 and lines["exact trajectory"].kl > 1e-3
    assert lines["PKL-T = AnyOrder"].logp == pytest.approx(rollout.logps[rollout.counted].mean().item(), abs=1e-5)


def test_shifted_families_are_reported_without_what_they_have_no_row_for(models):
    rollout = random_rollout(MASK, VOCAB, 3)
    assert (
        len(default_estimators(rollout, MaskedDiffusionSpec(MASK)))
        - len(default_estimators(rollout, MaskedDiffusionSpec(MASK, 1)))
        == 3
    )
    lines = likelihood_report(models("dream"), rollout)
    assert all(math.isfinite(line.kl) and line.kl >= -1e-9 for line in lines)


class Largest(TorchDispatchMode):
    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.numel = vocab, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and self.vocab in tensor.shape:
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_is_larger_than_one_tile_of_the_vocabulary():
    vocab = 1009
    model, _ = create_tiny_model(hidden_size=16, num_layers=1, vocab_size=vocab)
    rollout = random_rollout(MASK, vocab, 4, canvas=40, dtype=torch.float32)
    assert rollout.counted.sum() > 2 * TILE_ROWS
    with Largest(vocab) as seen:
        likelihood_report(model.eval(), rollout)
    assert 0 < seen.numel <= TILE_ROWS * vocab


def test_the_command_prints_a_table_and_writes_json_and_png(tmp_path, capsys):
    model, tokenizer = create_tiny_model(hidden_size=16, num_layers=1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = f"report --model_name_or_path {tmp_path / 'model'} --task sudoku --num_examples 6 --max_new_tokens 8"
    cli.main([*words.split(), "--diffusion_steps", "4", "--block_length", "4", "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    for name in ("mean field (d1)", "StepMerge N=2", "exact trajectory", "PKL", "PKL-U m=4", "PKL-T = AnyOrder", "KL"):
        assert name in printed
    data = json.loads((tmp_path / "out" / "likelihood.json").read_text())
    assert data["n"] == 6 and data["generation"]["temperature"] == 1.0
    lines = {line["name"]: line for line in data["estimators"]}
    assert abs(lines["exact trajectory"]["kl"]) < 1e-6 and lines["mean field (d1)"]["forwards"] == 1
    assert (tmp_path / "out" / "likelihood.png").stat().st_size > 5000


def test_a_truncated_draw_is_refused(models):
    rollout = sample(models("llada"), temperature=0.9, top_k=2)
    with pytest.raises(ValueError, match="drawn with top_k, top_p or min_p"):
        likelihood_report(models("llada"), rollout)
