"""VRPO on TRL's DPO: the loss against a slow oracle, its draws, its reference, and real runs of TRL's trainer."""

import math
import weakref
from itertools import pairwise
from statistics import mean, variance

import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers_dpo import CHOSEN, PROMPTS, REJECTED, OneGraphTrainer, batch_of, build, config, pairs
from helpers_grpo import history, lora, losses, tiny, weights
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig

from trl_dllm import DiffusionDPOConfig, DiffusionDPOTrainer
from trl_dllm.generation.saved import read_decoding, save_decoding
from trl_dllm.models import MaskedDiffusionSpec, create_tiny_model
from trl_dllm.noise import Purpose, hash64, row_seeds, uniform
from trl_dllm.scripts.dpo import make_parser
from trl_dllm.trainer.dpo_config import LOSSES


torch.set_num_threads(1)


def perturbed(family="llada", amount=0.05, dtype=torch.float32):
    """A model beside `tiny`'s, as a reference is beside a policy that has moved."""
    model, _ = tiny(family)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + amount * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


# ---------------------------------------------------------------------------------------------------------- the loss


def terms(model, ids, counted, seed, spec, draws):
    """What each token of a row adds to the estimate of its bound, unpadded, a draw and a token at a time."""
    found = [torch.zeros((), dtype=model.dtype)] * len(ids)
    for draw in range(draws):
        number = 1 + int(float(uniform(seed, Purpose.VIEW, 0, draw, 0)) * len(counted))
        order = sorted(counted, key=lambda i: float(uniform(seed, Purpose.VIEW, 0, draw, 1, i)))
        masked = ids.clone()
        masked[order[:number]] = spec.mask_token_id
        logits = model(masked[None]).logits[0]
        for i in order[:number]:
            row = logits[i - spec.logits_shift].clone()
            row[spec.mask_token_id] = -math.inf
            found[i] = found[i] + len(counted) / number / draws * row.log_softmax(dim=0)[ids[i]]
    return torch.stack(found)


def all_terms(model, batch, spec, draws, seed=3, split=0):
    """The terms of each row of a batch, at its step 0."""
    found = []
    for ids, mask, completion in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        ids, completion = ids[mask.bool()], completion[mask.bool()].bool()
        completion[0] = False
        content = sum(int(hash64(i, token, int(c))) for i, (token, c) in enumerate(zip(ids, completion, strict=True)))
        content = (content + 2**63) % 2**64 - 2**63  # as int64 wraps
        row_seed = row_seeds(seed, split, 0, 0, torch.tensor(content))
        found.append(terms(model, ids, completion.nonzero().flatten().tolist(), row_seed, spec, draws))
    return found


def bounds(model, batch, spec, draws):
    return torch.stack([row.sum() for row in all_terms(model, batch, spec, draws)]).chunk(2)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_loss_and_gradient_equal_a_slow_oracle(family, draws, tmp_path):
    model, reference = tiny(family)[0].double(), perturbed(family, dtype=torch.float64)
    run = build(tmp_path, model=model, ref_model=reference, num_samples=draws, beta=0.4)
    batch = batch_of(run, len(PROMPTS))
    assert len({int(n) for n in batch["completion_mask"].sum(dim=1)}) > 6
    run.model.train()
    run.current_gradient_accumulation_steps = 1  # which Trainer sets as it trains
    loss = run.compute_loss(run.model, dict(batch))
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    spec = MaskedDiffusionSpec.from_model(model)
    chosen, rejected = bounds(model, batch, spec, draws)
    with torch.no_grad():
        ref_chosen, ref_rejected = bounds(reference, batch, spec, draws)
    expected = -logsigmoid(0.4 * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()
    expected.backward()
    assert abs(expected.item() - math.log(2)) > 1e-2, "the reference is another model"
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradient[name], p.grad, atol=1e-6, rtol=1e-6, msg=name)


COMBINED = {
    **{loss: {"loss_type": [loss]} for loss in LOSSES},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "VRPO's": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.05]},
    "ld_alpha": {"ld_alpha": 0.5},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "coupled": {"estimator": "coupled_elbo", "num_samples": 4},
    "precomputed": {"precompute_ref_log_probs": True},
}


@pytest.mark.parametrize("name", COMBINED)
def test_segments_have_the_loss_and_gradient_of_one_graph(name, tmp_path):
    found = []
    for kind in (DiffusionDPOTrainer, OneGraphTrainer):
        run = build(
            tmp_path, kind, tiny()[0].double(), ref_model=perturbed(dtype=torch.float64), max_steps=2, beta=0.3,
            gradient_accumulation_steps=2, **COMBINED[name],
        )  # fmt: skip
        run.train()
        found.append([losses(run), losses(run, "grad_norm"), weights(run)])
    (loss, norm, trained), (loss_too, norm_too, trained_too) = found
    assert len(loss) == 2 and min(norm) > 1e-4, "nothing would be compared"
    assert loss == pytest.approx(loss_too, rel=1e-6) and norm == pytest.approx(norm_too, rel=1e-6)
    for key, value in trained.items():
        torch.testing.assert_close(value, trained_too[key], rtol=0, atol=1e-10)


def test_tokens_beyond_the_shorter_answer_count_for_ld_alpha(tmp_path):
    """As much as their own terms of the bound, which in expectation are their share of it."""
    run = build(tmp_path, num_samples=2, ld_alpha=0.25)
    batch = batch_of(run, 4)
    run.model.eval()
    with torch.no_grad():
        rows = all_terms(run.model, batch, run.spec, 2, split=1)
    starts, lengths = batch["completion_mask"].argmax(dim=1).tolist(), batch["completion_mask"].sum(dim=1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2).tolist()
    assert any(length > common for length, common in zip(lengths.tolist(), shared, strict=True))
    expected = [
        row[: start + common].sum() + 0.25 * row[start + common :].sum()
        for row, start, common in zip(rows, starts, shared, strict=True)
    ]
    found = torch.cat(run.compute_ref_log_probs(run.model, batch))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("peft", [False, True])
def test_the_step_is_the_same_however_it_is_split(peft, tmp_path):
    results = []
    for size, accumulation, checkpointing in ((8, 1, False), (4, 2, True), (2, 4, False)):
        run = build(
            tmp_path, model=tiny()[0].double(), peft=lora(init_lora_weights=False) if peft else False, max_steps=3,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        run.train()
        results.append((losses(run), losses(run, "grad_norm"), losses(run, "rewards/margins"), weights(run)))
    for *numbers, trained in results[1:]:
        for found, expected in zip(numbers, results[0], strict=False):
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6) and len(found) == 3
        for key, value in trained.items():
            torch.testing.assert_close(value.double(), results[0][3][key].double(), rtol=0, atol=1e-6)


class Saved:
    """Bytes of the tensors that autograd keeps, and their peak."""

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor):
        kept = tensor.detach().clone()
        self.now += kept.nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(kept, self._free, kept.nbytes)
        return kept

    def _free(self, size):
        self.now -= size


def test_memory_does_not_grow_with_the_draws(tmp_path):
    peaks = {}
    for kind in (DiffusionDPOTrainer, OneGraphTrainer):
        for draws in (2, 12):
            run, saved = build(tmp_path, kind, num_samples=draws), Saved()
            run.model.train()
            run.current_gradient_accumulation_steps = 1
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept):
                run.compute_loss(run.model, batch_of(run, 4)).backward()
            peaks[kind, draws] = saved.peak
    assert peaks[DiffusionDPOTrainer, 12] < 1.1 * peaks[DiffusionDPOTrainer, 2]
    assert peaks[OneGraphTrainer, 12] > 4 * peaks[OneGraphTrainer, 2], "the control"


# --------------------------------------------------------------------------------------------------------- the draws


def test_shared_draws_have_at_most_a_third_of_the_variance_of_independent_ones(tmp_path):
    """Of the preference score, where policy and reference are near (weights differ by a tenth)."""
    reference = perturbed(amount=0.1)
    run = build(tmp_path, ref_model=reference, num_samples=4)
    batch = batch_of(run, 4)
    policy, other = [], []
    for seed in range(50):
        run.args.seed = seed
        policy.append(torch.stack(run.compute_ref_log_probs(run.model, batch)))
        other.append(torch.stack(run.compute_ref_log_probs(reference, batch)))
    shared = torch.stack([p - r for p, r in zip(policy, other, strict=True)])
    apart = torch.stack([p - r for p, r in zip(policy, other[1:] + other[:1], strict=True)])  # of another seed
    scores = [(found[:, 0] - found[:, 1]).T.tolist() for found in (shared, apart)]
    # The same mean, up to the independent draws' own error.
    error = mean(math.sqrt(variance(row) / len(row)) for row in scores[1])
    assert abs(mean(map(mean, scores[0])) - mean(map(mean, scores[1]))) < 3 * error
    for row, row_apart in zip(*scores, strict=True):
        assert 0 < variance(row) <= variance(row_apart) / 3


def test_draws_differ_between_steps_and_the_policys_are_the_references(tmp_path):
    seen = []

    class Watching(DiffusionDPOTrainer):
        def _score_view(self, model, rollout, attention_mask, number):
            view = self.estimator.view(rollout, number, rollout.view_seed, 0)
            seen.append((self.state.global_step, model is self.ref_model, number, view.input_ids))
            return super()._score_view(model, rollout, attention_mask, number)

    run = build(tmp_path, Watching, data=pairs(1).select(range(4)), max_steps=3, num_samples=2)
    run.train()
    by_step = [[entry for entry in seen if entry[0] == step] for step in range(3)]
    drawn = []
    for entries in by_step:
        # The reference, a first pass and an update, of two draws each.
        assert [(reference, number) for _, reference, number, _ in entries] == [
            (True, 0), (True, 1), (False, 0), (False, 1), (False, 0), (False, 1),
        ]  # fmt: skip
        ids = [ids for *_, ids in entries]
        assert all(torch.equal(ids[i], ids[i + 2]) for i in range(4)) and not torch.equal(ids[0], ids[1])
        drawn.append({tuple(row) for row in torch.cat(ids).tolist()})  # rows come in another order every epoch
    assert all(one != other for one, other in pairwise(drawn))


def test_rows_do_not_depend_on_their_batch_or_padding(tmp_path):
    run = build(tmp_path)
    batch = batch_of(run, 8)
    together = torch.stack(run.compute_ref_log_probs(run.model, batch), dim=1)
    for row in range(8):
        alone = run.data_collator([run.train_dataset[row]])
        assert alone["input_ids"].shape[1] <= batch["input_ids"].shape[1]
        found = torch.stack(run.compute_ref_log_probs(run.model, alone), dim=1)
        torch.testing.assert_close(found[0], together[row], rtol=1e-6, atol=1e-6)
    padded = build(tmp_path, pad_to_multiple_of=64)
    batch = batch_of(padded, 8)
    assert batch["input_ids"].shape[1] == 64
    batch["input_ids"][batch["attention_mask"] == 0] = 77  # what stands under the padding is never read
    found = torch.stack(padded.compute_ref_log_probs(padded.model, batch), dim=1)
    torch.testing.assert_close(found, together, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_first_token_of_a_row_is_context(family, tmp_path):
    data = Dataset.from_dict({"prompt": ["", ""], "chosen": ["ab", "q"], "rejected": ["abcd", "xy"]})
    run = build(tmp_path, model=tiny(family)[0], data=data, num_samples=8, per_device_train_batch_size=2)
    batch = batch_of(run)
    assert batch["completion_mask"][:, 0].all()
    rollout = run._rollout(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    for number in range(8):
        view = run.estimator.view(rollout, number, rollout.view_seed, 0)
        assert (view.input_ids[:, 0] == batch["input_ids"][:, 0]).all() and (view.targets[:, 0] == -100).all()
    run.train()
    assert all(map(math.isfinite, losses(run) + losses(run, "grad_norm")))


# ----------------------------------------------------------------------------------------------------- the reference


class FixedDraws(DiffusionDPOTrainer):
    """Reference beside the policy, on the draws that a reference computed in advance has."""

    _fixed_draws = True


@pytest.mark.parametrize("peft", [False, True])
def test_a_precomputed_reference_is_the_one_beside_the_policy(peft, tmp_path):
    found = []
    for kind, precomputed in ((FixedDraws, False), (DiffusionDPOTrainer, True)):
        run = build(
            tmp_path, kind, peft=lora(init_lora_weights=False) if peft else False, max_steps=3,
            precompute_ref_log_probs=precomputed, precompute_ref_batch_size=3, eval_dataset=pairs(1),
            per_device_eval_batch_size=3,
        )  # fmt: skip
        assert (run.ref_model is None) == (precomputed or peft)
        run.train()
        found.append([*losses(run), *losses(run, "grad_norm"), run.evaluate()["eval_loss"]])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert min(abs(value - math.log(2)) for value in found[0][1:3]) > 1e-4


def test_a_precomputed_reference_is_not_that_of_other_draws(tmp_path):
    build(tmp_path, data=pairs(1)).train_dataset.save_to_disk(tmp_path / "rows")
    rows, computed = load_from_disk(tmp_path / "rows"), []  # of which datasets keeps what is computed

    class Counting(DiffusionDPOTrainer):
        def compute_ref_log_probs(self, model, inputs):
            computed.append(1)
            return super().compute_ref_log_probs(model, inputs)

    def column(**settings) -> tuple[Tensor, int]:
        run = build(tmp_path, Counting, data=pairs(1), precompute_ref_log_probs=True, **settings)
        del computed[:]
        found = run._precompute_ref_logps(rows, "train", 4)
        return torch.tensor(found["ref_chosen_logps"]), len(computed)

    first, batches = column()
    again, none = column()
    assert torch.equal(first, again) and (batches, none) == (2, 0), "the file is read"
    others = [{"num_samples": 5}, {"seed": 4}, {"estimator": "coupled_elbo", "num_samples": 4}]
    for changes in (*others, {"max_length": 12}, {"ld_alpha": 0.0}):
        found, batches = column(**changes)
        assert batches == 2 and not torch.allclose(found, first), changes
        if changes == others[0]:
            plain = build(tmp_path, FixedDraws, data=pairs(1), num_samples=5)
            expected, _ = plain.compute_ref_log_probs(plain.model, batch_of(plain))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_adapters_reference_is_the_model_without_it(tmp_path):
    plain = build(tmp_path)
    run = build(tmp_path, peft=lora(init_lora_weights=False), max_steps=2)
    assert run.ref_model is None
    batch = batch_of(run, 4)
    for one, other in zip(
        run.compute_ref_log_probs(run.model, batch), plain.compute_ref_log_probs(plain.model, batch), strict=True
    ):
        torch.testing.assert_close(one, other)
    run.train()
    assert abs(losses(run)[0] - math.log(2)) > 1e-3, "the adapter is not nothing"


def test_the_reference_of_a_model_with_an_adapter_is_that_adapter(tmp_path):
    adapted = get_peft_model(tiny()[0], lora(init_lora_weights=False))
    run = build(tmp_path, model=adapted, max_steps=3)
    before = {name: p.clone() for name, p in adapted.named_parameters() if ".ref." in name}
    run.train()
    found = losses(run)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6) and abs(found[2] - math.log(2)) > 1e-3
    assert before and all(torch.equal(p, before[name]) for name, p in adapted.named_parameters() if name in before)


def test_a_reference_that_follows_the_policy_is_in_the_checkpoints(tmp_path):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 4, "save_strategy": "steps"}
    whole = build(tmp_path, save_steps=1, **settings)
    whole.train()
    resumed = build(tmp_path, save_steps=1, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole) and losses(whole)[3] != pytest.approx(math.log(2), abs=1e-6)


# ---------------------------------------------------------------------------------------------- real trainer runs


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("resumed_from", [1, 3])
def test_a_run_resumed_from_a_checkpoint_is_the_run_that_was_not_interrupted(resumed_from, peft, tmp_path):
    settings = {
        "peft": peft, "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch",
        "logging_steps": 2, "gradient_accumulation_steps": 2, "eval_dataset": pairs(1), "eval_strategy": "steps",
        "eval_steps": 3, "per_device_train_batch_size": 2,
    }  # fmt: skip
    whole = build(tmp_path, **settings)
    whole.train()
    resumed = build(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{resumed_from}"))
    assert history(resumed) == history(whole) and len(losses(whole)) == 3
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_evaluation_masks_a_row_alike_at_every_step_and_batch_size(tmp_path):
    found = []
    for size in (4, 8):
        run = build(
            tmp_path, ref_model=perturbed(), eval_dataset=pairs(1), learning_rate=0.0, max_steps=2,
            eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=size,
        )  # fmt: skip
        run.train()
        found += losses(run, "eval_loss")
    assert len(found) == 4 and found == pytest.approx([found[0]] * 4, abs=1e-5)
    assert abs(found[0] - math.log(2)) > 1e-3
    output = run.predict(run.eval_dataset)
    assert output.metrics["test_loss"] == pytest.approx(found[0], abs=1e-5) and output.predictions is None


def test_metrics_are_trls_but_for_those_of_a_next_token(tmp_path):
    run = build(tmp_path, model=tiny()[0].double(), ref_model=perturbed(dtype=torch.float64), beta=0.3)
    seen = []
    compute = run._compute_loss

    def computing(model, inputs, return_outputs):
        with torch.no_grad():
            spec = MaskedDiffusionSpec.from_model(model)
            seen.append([bounds(one, inputs, spec, 3) for one in (model, run.ref_model)])
        return compute(model, inputs, return_outputs)

    run._compute_loss = computing
    run.train()
    logged = run.state.log_history[0]
    (chosen, rejected), (ref_chosen, ref_rejected) = seen[0]
    assert logged["logps/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert logged["rewards/rejected"] == pytest.approx(0.3 * (rejected - ref_rejected).mean().item(), rel=1e-4)
    margins = (chosen - ref_chosen) - (rejected - ref_rejected)
    assert logged["rewards/margins"] == pytest.approx(0.3 * margins.mean().item(), rel=1e-4)
    assert logged["rewards/accuracies"] == (margins > 0).double().mean().item()
    assert 0 < logged["entropy"] < math.log(128) and logged["num_tokens"] > 0
    assert not logged.keys() & {"logits/chosen", "logits/rejected", "mean_token_accuracy"}


@pytest.mark.parametrize(("draws", "precomputed", "times"), [(1, False, 8), (3, False, 30), (3, True, 24)])
def test_operations_are_those_of_every_draw(draws, precomputed, times, tmp_path):
    """2 a forward and 4 a backward: with 3 draws 3 of the reference, 3 to find the loss and 3 to train."""
    run = build(tmp_path, num_samples=draws, precompute_ref_log_probs=precomputed)
    run.train()
    parameters = run.model.num_parameters(exclude_embeddings=True)
    batch = next(iter(run.get_train_dataloader()))
    assert run.floating_point_ops(batch) == times * parameters * batch["input_ids"].numel()


def even_or_odd(rows: range) -> Dataset:
    """Pairs whose chosen answer has the digits that the prompt asks for; rows differ in length."""
    digits = {"even": "02468", "odd": "13579"}
    prompts, chosen, rejected = [], [], []
    for row in rows:
        kind, other = ("even", "odd") if row % 2 else ("odd", "even")
        draw = [int(hash64(row, i)) % 5 for i in range(6)]
        length = 3 + row % 4
        prompts.append(f"{kind}:")
        chosen.append("".join(digits[kind][i] for i in draw[:length]))
        rejected.append("".join(digits[other][i] for i in reversed(draw[6 - length :])))
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})


def accuracy(run, data) -> float:
    """How often the chosen answer of a pair has the higher bound under the policy, by 32 draws."""
    run.estimator.num_samples, before = 32, run.estimator.num_samples
    run.model.eval()
    rows = run._prepare_dataset(data, run.processing_class, run.args, "held out")
    chosen, rejected = run.compute_ref_log_probs(run.model, run.data_collator(list(rows)))
    run.estimator.num_samples = before
    return (chosen > rejected).double().mean().item()


def test_training_improves_the_accuracy_on_preferences_that_were_held_out(tmp_path):
    model, _ = create_tiny_model(hidden_size=32, num_layers=2)
    held_out = even_or_odd(range(1000, 1032))
    run = build(
        tmp_path, model=model, data=even_or_odd(range(256)), eval_dataset=held_out, per_device_train_batch_size=16,
        max_steps=40, learning_rate=3e-3, optim="adamw_torch", num_samples=4, beta=0.2, max_grad_norm=1.0,
    )  # fmt: skip
    before = accuracy(run, held_out)
    run.train()
    after, reported = accuracy(run, held_out), run.evaluate()
    assert 0.25 < before < 0.75 and after > 0.9, (before, after)
    assert reported["eval_rewards/accuracies"] > 0.9 and reported["eval_rewards/margins"] > 0.5


def test_the_published_recipe_trains_on_a_tiny_model(tmp_path):
    small = "--max_steps 5 --max_length 64 --gradient_accumulation_steps 1 --learning_rate 1e-3 --warmup_steps 0"
    here = (
        f"--output_dir {tmp_path} --save_strategy no --disable_tqdm true --use_cpu true --bf16 false --logging_steps 1"
    )
    argv = ["--config", "llada_8b/dpo/vrpo", *small.split(), *here.split()]
    _, args, _ = make_parser().parse_args_and_config(argv)
    model, tokenizer = tiny()
    run = DiffusionDPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer)
    run.train()
    found = losses(run)
    assert len(found) == 5 and all(map(math.isfinite, found)) and min(losses(run, "grad_norm")) > 1e-6
    assert found[0] > math.log(2) + 0.05, "the SFT loss is in it"


def test_a_stock_config_runs_and_a_wrong_one_is_refused(tmp_path):
    model, tokenizer = tiny()
    stock = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, save_strategy="no")
    run = DiffusionDPOTrainer(model, args=stock, train_dataset=pairs(), processing_class=tokenizer)
    run.train()
    assert isinstance(run.args, DiffusionDPOConfig) and run.args.num_samples == 8
    stock.use_weighting = True
    with pytest.raises(ValueError, match="use_weighting"):
        DiffusionDPOTrainer(model, args=stock, train_dataset=pairs(), processing_class=tokenizer)


def test_conversations(tmp_path):
    def messages(role, texts):
        return [[{"role": role, "content": text}] for text in texts]

    columns = {"chosen": messages("assistant", CHOSEN), "rejected": messages("assistant", REJECTED)}
    split = build(tmp_path, data=Dataset.from_dict({"prompt": messages("user", PROMPTS), **columns}))
    whole = {
        name: [user + answer for user, answer in zip(messages("user", PROMPTS), answers, strict=True)]
        for name, answers in columns.items()
    }
    joined = build(tmp_path, data=Dataset.from_dict(whole))
    for one, other in zip(batch_of(split).values(), batch_of(joined).values(), strict=True):
        assert torch.equal(one, other)
    split.train()
    assert losses(split)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_what_is_saved_says_how_it_was_trained_and_how_it_is_decoded(tmp_path):
    start, out = tmp_path / "start", tmp_path / "out"
    model, tokenizer = tiny()
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    save_decoding({"max_new_tokens": 24, "block_length": 8, "diffusion_steps": 12}, start)
    run = DiffusionDPOTrainer(str(start), args=config(out), train_dataset=pairs())
    run.train()
    run.save_model()
    run.create_model_card()
    assert read_decoding(out) == read_decoding(start)
    card = (out / "README.md").read_text()
    assert "2505.19223" in card and "max_new_tokens=24" in card and "`num_samples=3`" in card
    assert card.count("```bibtex") >= 2 and "Direct Preference Optimization" in card


# ------------------------------------------------------------------------------------------------------------ errors


def test_arguments_that_do_not_apply(tmp_path):
    with pytest.raises(ValueError, match="virtual tokens"):
        build(tmp_path, peft=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="sync_ref_model=True with an adapter"):
        build(tmp_path, peft=True, sync_ref_model=True)
    with pytest.raises(ValueError, match=r"logits_shift=1.*same family"):
        build(tmp_path, ref_model=tiny("dream")[0])
    model, tokenizer = tiny()
    given = {"train_dataset": pairs(), "processing_class": tokenizer}
    with pytest.raises(ValueError, match="compute_metrics"):
        DiffusionDPOTrainer(model, args=config(tmp_path), compute_metrics=lambda prediction: {}, **given)
    with pytest.raises(TypeError, match="DiffusionDPOConfig"):
        DiffusionDPOTrainer(model, args={"beta": 1}, **given)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompt": ["a"], "chosen": ["b"]}, "needs prompt\\+chosen\\+rejected or chosen\\+rejected"),
        ({"prompt": ["a"], "chosen": ["b"], "rejected": [None]}, "train_dataset row 0: rejected=None"),
        ({"prompt": ["a"] * 9, "chosen": ["b"] * 9, "rejected": [[]] * 9}, "rejected=\\[\\] has no messages"),
        ({"prompt": ["a long prompt"], "chosen": ["b"], "rejected": ["c"]}, "max_length=5 leaves no answer"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_weights_load(data, message, checkpoint, no_weights, tmp_path):
    given = {"args": config(tmp_path, max_length=5), "train_dataset": Dataset.from_dict(data)}
    with pytest.raises(ValueError, match=message):
        DiffusionDPOTrainer(checkpoint(), **given)


def test_a_stream_has_no_precomputed_reference(checkpoint, no_weights, tmp_path):
    args = config(tmp_path, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match=r"precompute_ref_log_probs=True .* train_dataset is a stream"):
        DiffusionDPOTrainer(checkpoint(), args=args, train_dataset=pairs().to_iterable_dataset())


def test_a_reference_that_processes_share_is_on_a_disk(checkpoint, no_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(DiffusionDPOConfig, "world_size", 2)
    args = config(tmp_path, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match=r"precompute_ref_log_probs=True on 2 processes.*save_to_disk"):
        DiffusionDPOTrainer(checkpoint(), args=args, train_dataset=pairs())


def test_an_autoregressive_model_is_refused_before_its_weights_load(tmp_path, no_weights):
    _, tokenizer = tiny()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is_causal"):
        DiffusionDPOTrainer(str(tmp_path), args=config(tmp_path / "out"), train_dataset=pairs())


def test_a_block_causal_model_is_refused_before_its_weights_load(checkpoint, no_weights, tmp_path):
    model_config = tiny("sdar")[0].config
    model_config.architectures = ["SDARForCausalLM"]
    with pytest.raises(ValueError, match=r"DPO does not apply to a block-causal model.*block_size="):
        DiffusionDPOTrainer(checkpoint(model_config), args=config(tmp_path), train_dataset=pairs())


def test_a_bound_that_is_not_finite_ends_the_run(tmp_path):
    run = build(tmp_path, max_steps=2)
    score = run._score_view

    def scoring(*args):
        scores = score(*args)
        return scores.map(lambda table: table * torch.nan) if run.state.global_step == 1 else scores

    run._score_view = scoring
    with pytest.raises(FloatingPointError, match=r"Step 2: the loss is not finite, in row 0 .*log_probs"):
        run.train()
