"""The tiled head against full logits (docs/methods.md §1.1)."""

import math

import pytest
import torch
from oracles import sharp_model, token_distribution
from torch import nn

from trl_dllm.models import TILE_ROWS, apply_head, entropy, hidden_rows, hidden_rows_and_head, log_probs, unwrap
from trl_dllm.models import head as head_module
from trl_dllm.models.head import in_tiles, kept_rows


MASK = 3


def inputs(seed=0, rows=3, width=11):
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(4, 101, (rows, width), generator=generator)}


def gather_log_prob(logits, target):
    log_p = log_probs(logits, MASK, 0.8)
    return torch.stack([log_p.gather(1, target[:, None]).squeeze(1), entropy(log_p)], dim=1)


def slow_gather_log_prob(logits, target):
    out = []
    for row, t in zip(logits.double(), target.tolist(), strict=True):
        p = token_distribution(row, MASK, 0.8)
        rest = p[[v for v in range(len(p)) if v != MASK]]
        out.append(torch.stack([p[t].log(), -(rest * rest.log()).sum()]))
    return torch.stack(out)


def rows_and_targets(count, total=33, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(total, (count,), generator=generator)  # repeated rows are allowed
    return rows, torch.randint(4, 101, (count,), generator=generator)


def compare_with_full_logits(model, count, atol=1e-6):
    """Values and gradients of every trainable parameter."""
    rows, target = rows_and_targets(count)
    weights = torch.randn(count, 2, generator=torch.Generator().manual_seed(2))
    parameters = [p for p in model.parameters() if p.requires_grad]
    got = apply_head(model, inputs(), rows, gather_log_prob, target)
    got_grads = torch.autograd.grad((got * weights).sum(), parameters)
    logits = model(**inputs(), use_cache=False).logits.flatten(0, 1)
    want = slow_gather_log_prob(logits[rows], target)
    want_grads = torch.autograd.grad((want * weights).sum(), parameters)
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=0)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=atol * max(1.0, b.abs().max().item()), rtol=0)
    assert any(g.abs().max() > 1e-3 for g in want_grads)


@pytest.mark.parametrize("count", [1, 7, TILE_ROWS, TILE_ROWS + 1, 3 * TILE_ROWS - 1])
def test_values_and_gradients_equal_full_logits(family, count):
    compare_with_full_logits(sharp_model(family), count)


def test_tied_embeddings(family):
    model = sharp_model(family, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    compare_with_full_logits(model, 70)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_through_peft_lora(family, targets):
    """Also with an adapter on the head itself."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    base = sharp_model(family, dtype=torch.float64)
    wrapped = peft.get_peft_model(base, config).double().eval()
    assert unwrap(wrapped) is base
    compare_with_full_logits(wrapped, 70)


def test_unwrap_sees_through_wrappers():
    model = sharp_model("llada")
    wrapper = nn.Module()
    wrapper.module = torch.compile(model)
    assert unwrap(wrapper) is model and unwrap(model) is model


def test_gradient_checkpointed_model(family):
    model = sharp_model(family).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compare_with_full_logits(model, 70)


def test_without_gradients_nothing_requires_any(family):
    model = sharp_model(family)
    rows, target = rows_and_targets(5)
    with torch.no_grad():
        assert not apply_head(model, inputs(), rows, gather_log_prob, target).requires_grad
    assert apply_head(model, inputs(), rows, gather_log_prob, target).requires_grad


def test_no_rows_still_reach_every_parameter(family):
    """A process with nothing to score gives every weight a zero gradient, or sharded training waits for ever."""
    model = sharp_model(family)
    empty = torch.zeros(0, dtype=torch.int64)
    out = apply_head(model, inputs(), empty, gather_log_prob, empty)
    assert out.shape == (0, 2)
    out.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.eq(0).all(), name


def test_several_rows_reduced_together(family):
    """Rows of shape (n, k): guidance takes the conditional and the unconditional row at once."""
    model = sharp_model(family)
    pairs = torch.tensor([[0, 32], [5, 6], [31, 2]])
    with torch.no_grad():
        got = apply_head(model, inputs(), pairs, lambda logits: logits[:, 0] - 2 * logits[:, 1])
        logits = model(**inputs(), use_cache=False).logits.flatten(0, 1)
    torch.testing.assert_close(got, logits[pairs[:, 0]] - 2 * logits[pairs[:, 1]], atol=1e-6, rtol=0)


def test_hidden_rows_are_what_the_head_reads(family):
    """One forward; projected by the head they are the full logits, and the head is as it was."""
    model, rows = sharp_model(family), torch.tensor([31, 0, 0, 12])
    with torch.no_grad():
        hidden = hidden_rows(model, inputs(), rows)
        logits = model(**inputs(), use_cache=False).logits.flatten(0, 1)
    assert hidden.shape == (4, 32) and "forward" not in model.lm_head.__dict__
    torch.testing.assert_close(model.lm_head(hidden), logits[rows], atol=1e-9, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_is_copied_while_it_is_whole(bias):
    """A sharded model's head is whole within its forward alone: what is returned projects behind it, and later."""
    model, rows = sharp_model("llada", dtype=torch.float32), torch.tensor([31, 0, 12])
    model.lm_head = nn.Linear(32, model.lm_head.out_features, bias=bias)
    whole = {name: p.data for name, p in model.lm_head.named_parameters()}
    with torch.no_grad():
        logits = model(**inputs(), use_cache=False).logits.flatten(0, 1)

    def scatter(*args):
        for name, p in model.lm_head.named_parameters():
            p.data = whole[name][:0]

    def gather(*args):
        for name, p in model.lm_head.named_parameters():
            p.data = whole[name].clone()

    scatter()
    model.lm_head.register_forward_pre_hook(gather)
    model.lm_head.register_forward_hook(scatter)
    with torch.no_grad():
        hidden, project = hidden_rows_and_head(model, inputs(), rows)
    assert model.lm_head.weight.numel() == 0 and hidden.shape == (3, 32)
    torch.testing.assert_close(project(hidden), logits[rows], atol=1e-6, rtol=0)
    assert "forward" not in model.lm_head.__dict__


def test_no_cache_is_made_unless_one_is_given():
    """A cache of a training batch would be gigabytes that nobody reads."""
    model, rows, seen = sharp_model("llada"), torch.arange(2), []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        for settings in ({}, {"use_cache": True}):
            apply_head(model, inputs() | settings, rows, lambda logits: logits[:, :1])
            hidden_rows(model, inputs() | settings, rows)
    hook.remove()
    assert [kwargs["use_cache"] for kwargs in seen] == [False, False, True, True]


class Lookup(nn.Module):
    """A model whose hidden states are given, so that only the head computes."""

    def __init__(self, hidden, vocab=509, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.hidden = nn.Parameter(hidden.to(dtype))
        self.head = nn.Linear(hidden.shape[-1], vocab, bias=False, dtype=dtype)
        self.head.weight.data = torch.randn(vocab, hidden.shape[-1], generator=generator).to(dtype)

    def get_output_embeddings(self):
        return self.head

    def forward(self, use_cache=None):
        return type("Output", (), {"logits": self.head(self.hidden)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_row_has_the_same_bits_in_every_batch(dtype):
    """A tile always has the same number of rows: neither their number nor the neighbours change a row's numbers."""
    hidden = torch.randn(300, 48, generator=torch.Generator().manual_seed(4))
    target = torch.randint(4, 509, (300,), generator=torch.Generator().manual_seed(5))

    def numbers(rows, h=hidden):
        with torch.no_grad():
            return apply_head(Lookup(h[None], dtype=dtype), {}, rows, gather_log_prob, target[rows])

    whole = numbers(torch.arange(300))
    assert torch.equal(numbers(torch.tensor([17])), whole[17:18])
    assert torch.equal(numbers(torch.arange(299)), whole[:299])
    some = torch.tensor([250, 3, 3, 64, 128, 63])
    assert torch.equal(numbers(some), whole[some])


def test_tiles_are_of_few_sizes():
    """What `reduce` sees is a multiple of 8 rows up to 64, by what the call wants, with its arguments padded alike."""
    seen = []

    def reduce(logits, target):
        seen.append((logits.shape[0], target.shape[0]))
        return logits[:, :1]

    model = Lookup(torch.randn(1, 200, 8))
    sizes = {0: [8], 1: [8], 8: [8], 9: [16], 17: [24], 33: [40], 64: [64], 65: [40] * 2, 130: [48] * 3, 200: [56] * 4}
    for count, tiles in sizes.items():
        seen.clear()
        rows = torch.arange(count)
        with torch.no_grad():
            assert apply_head(model, {}, rows, reduce, rows).shape == (count, 1)
        assert seen == [(size, size) for size in tiles] and in_tiles(count) == sum(tiles)


@pytest.mark.parametrize(("keep", "kept"), [(True, 0), (True, 1), (True, 2), (True, 3), (False, 0)])
def test_tiles_beyond_the_budget_are_recomputed_in_the_backward_pass(monkeypatch, keep, kept):
    """To the same bits; those that are kept are not."""
    rows, calls = torch.arange(2 * TILE_ROWS + 1), []
    tile = 48 * 509 * 4 * 2
    monkeypatch.setattr(head_module, "KEPT_BYTES", (kept if keep else 3) * tile + tile - 1)

    def reduce(logits):
        calls.append(torch.is_grad_enabled())
        return gather_log_prob(logits, torch.zeros(len(logits), dtype=torch.int64))

    def gradients():
        model = Lookup(torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(0)))
        out = apply_head(model, {}, rows, reduce, keep=keep)
        assert len(calls) == 3
        out.sum().backward()
        return out, model.hidden.grad, model.head.weight.grad

    found = gradients()
    assert len(calls) == 6 - kept and all(calls) and found[1][0, rows].ne(0).all()
    calls.clear()
    monkeypatch.setattr(head_module, "KEPT_BYTES", 0)
    assert all(map(torch.equal, found, gradients())) and len(calls) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("differentiable", [False, True], ids=["log-probs", "entropies"])
def test_what_is_kept_for_the_backward_pass_fits_the_budget(monkeypatch, dtype, differentiable):
    """Bytes of the storages that autograd holds behind the forward, without the head's weights and hidden states."""
    vocab, rows = 2003, torch.arange(200)
    model, target = Lookup(torch.randn(1, 200, 8), vocab, dtype), torch.arange(200)

    def reduce(logits, target):
        log_p = log_probs(logits, MASK, 0.8)
        return torch.stack(
            [log_p.gather(1, target[:, None])[:, 0], entropy(log_p if differentiable else log_p.detach())], dim=1
        )

    def held(budget: int) -> int:
        storages, found = {}, [model.hidden.untyped_storage(), model.head.weight.untyped_storage()]
        monkeypatch.setattr(head_module, "KEPT_BYTES", budget)

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            found.append(tensor)  # its address is nobody else's meanwhile
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            apply_head(model, {}, rows, reduce, target)
        return sum(size for at, size in storages.items() if at not in [s.data_ptr() for s in found[:2]])

    item = max(dtype.itemsize, 4)
    small = held(0)
    assert small < 200 * 8 * item * 8, "tiles that are computed again leave their arguments alone"
    for tiles in (1, 3, 4):
        budget = tiles * 56 * vocab * item * 2
        assert (tiles - 1) / 4 * 56 * 4 * vocab * item < held(budget + 100) - small <= budget + tiles * 8 * 1024
    assert kept_rows(200, vocab, dtype) == 224


def test_the_budget_at_the_vocabulary_of_llada():
    assert kept_rows(6 * 32, 126_464, torch.bfloat16) == 192 and kept_rows(1152, 126_464, torch.bfloat16) == 256
    assert kept_rows(6 * 32, 126_464, torch.float64) == 128 and kept_rows(0, 126_464, torch.float32) == 8


def test_forward_is_restored_after_the_call_and_after_an_error():
    model = sharp_model("llada")
    head = model.get_output_embeddings()
    rows, target = rows_and_targets(3)
    before = model(**inputs()).logits
    apply_head(model, inputs(), rows, gather_log_prob, target)
    assert "forward" not in head.__dict__

    def fails(logits, target):
        raise RuntimeError("reduce failed")

    with pytest.raises(RuntimeError, match="reduce failed"):
        apply_head(model, inputs(), rows, fails, target)
    assert "forward" not in head.__dict__
    assert torch.equal(before, model(**inputs()).logits)


def test_a_forward_that_somebody_else_patched_is_used_and_put_back():
    """TRL's cast of the head to float32 replaces `lm_head.forward` on the instance."""
    model = sharp_model("llada")
    head = model.get_output_embeddings()
    plain = head.forward
    head.forward = patched = lambda hidden: 2 * plain(hidden)
    rows = torch.arange(4)
    with torch.no_grad():
        got = apply_head(model, inputs(), rows, lambda logits: logits)
        assert head.forward is patched
        del head.forward
        torch.testing.assert_close(got, 2 * model(**inputs()).logits.flatten(0, 1)[rows], atol=1e-5, rtol=0)


def test_global_generator_is_left_alone():
    model, state = sharp_model("llada"), torch.get_rng_state()
    rows, target = rows_and_targets(3)
    apply_head(model, inputs(), rows, gather_log_prob, target).sum().backward()
    assert torch.equal(state, torch.get_rng_state())


# -------------------------------------------------------------------------------------- log_probs and entropy


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_is_at_least_float32(given, expected):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(given)
    log_p = log_probs(logits, MASK, 0.7)
    assert log_p.dtype == expected and entropy(log_p).dtype == expected
    for row, got in zip(logits.double(), log_p.double(), strict=True):
        want = token_distribution(row, MASK, 0.7)
        keep = torch.arange(50) != MASK
        tolerance = 1e-12 if expected == torch.float64 else 1e-5
        torch.testing.assert_close(got[keep], want[keep].log(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("temperature", [0, 0.3, 1, 2.5])
def test_the_mask_is_excluded_and_entropies_are_finite(temperature):
    """Temperature 0 is scored at 1; the mask has probability 0 and contributes 0, not NaN."""
    logits = torch.tensor([[1.0, 2.0, -1.0, 80.0], [0.0, 0.0, 0.0, 0.0], [300.0, -300.0, 0.0, 1.0]])
    log_p = log_probs(logits, MASK, temperature)
    assert log_p.isfinite().all()
    assert log_p.exp()[:, MASK].eq(0).all()
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(3))
    scale = temperature or 1
    weights = [math.exp(x / scale) for x in (1.0, 2.0, -1.0)]
    p = [w / sum(weights) for w in weights]
    assert log_p[0, 1].item() == pytest.approx(math.log(p[1]), abs=1e-6)
    assert entropy(log_p)[0].item() == pytest.approx(-sum(q * math.log(q) for q in p), abs=1e-6)
    assert entropy(log_p)[1].item() == pytest.approx(math.log(3), abs=1e-6)
    assert entropy(log_p)[2].item() == pytest.approx(0, abs=1e-6)


def test_gradients_past_the_mask_are_finite_and_zero_there():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    log_p = log_probs(logits, MASK, 0.6)
    (gradient,) = torch.autograd.grad(log_p[:, 0].sum() + entropy(log_p).sum(), logits)
    assert gradient.isfinite().all()
    assert gradient[:, MASK].eq(0).all() and gradient[:, 0].abs().min() > 0
    assert torch.autograd.gradcheck(lambda x: entropy(log_probs(x, MASK, 0.6)), logits)
