"""Attention patterns: the rule against loops, and every backend's form against a dense mask."""

from dataclasses import replace

import pytest
import torch
from cases import rollout_for_tests
from oracles import left_pad
from torch import nn

from trl_dllm.models import NEVER, Attention, Layout, attention_mask, order_levels, view_inputs


def random_pattern(rows=3, size=10, seed=0):
    """Levels in 0..4 with a third of the keys NEVER, and queries that see nothing (-1) or everything."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randint(0, 5, (rows, size), generator=generator)
    key = key.masked_fill(torch.rand(rows, size, generator=generator) < 0.3, NEVER)
    return Attention(level=key, reach=torch.randint(-1, 6, (rows, size), generator=generator))


def slow_rule(attention: Attention) -> list:
    rows, size = attention.level.shape
    segment = torch.zeros_like(attention.level) if attention.segment is None else attention.segment
    out = []
    for b in range(rows):
        table = []
        for q in range(size):
            level = 0 if attention.reach is None else attention.reach[b, q].item()
            own = [0, segment[b, q].item()]
            table.append(
                [(attention.level[b, k].item() <= level and segment[b, k] in own) or q == k for k in range(size)]
            )
        out.append(table)
    return out


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_rule_equals_loops(seed, segments):
    """Row q sees column k iff level[k] <= reach[q] and segment[k] is 0 or its own, or q is k."""
    attention = random_pattern(seed=seed)
    if segments:
        generator = torch.Generator().manual_seed(seed)
        attention = replace(attention, segment=torch.randint(0, 4, attention.level.shape, generator=generator))
    assert attention.allowed().tolist() == slow_rule(attention)
    assert attention[1:].allowed().tolist() == slow_rule(attention)[1:]


def test_padding_pattern_equals_loops_and_is_a_2d_mask_everywhere():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    attention = Attention.padding(mask)
    assert attention.reach is None and attention[0:1].reach is None
    assert attention.allowed().tolist() == slow_rule(attention)
    expected = [[[bool(mask[b, k]) or q == k for k in range(4)] for q in range(4)] for b in range(3)]
    assert attention.allowed().tolist() == expected
    for implementation in ("sdpa", "eager", "flex_attention", "flash_attention_2"):
        assert torch.equal(attention_mask(attention, implementation, torch.float32), mask)


def test_rule_of_a_chunk_behind_a_cache_equals_loops():
    """`column` says which column each of the few rows is; a row sees itself there, whatever the levels say."""
    generator = torch.Generator().manual_seed(3)
    full = random_pattern(rows=4, size=10)
    column = torch.stack([torch.randperm(10, generator=generator)[:3] for _ in range(4)])
    chunk = Attention(level=full.level, reach=torch.randint(-1, 6, (4, 3), generator=generator), column=column)
    expected = [
        [[chunk.level[b, k] <= chunk.reach[b, q] or k == column[b, q] for k in range(10)] for q in range(3)]
        for b in range(4)
    ]
    assert chunk.allowed().tolist() == expected
    assert chunk[1:3].allowed().tolist() == expected[1:3]
    first = Attention(level=full.level, reach=chunk.reach)
    assert torch.equal(first.allowed(), Attention(full.level, chunk.reach, torch.arange(3).expand(4, -1)).allowed())


def test_order_levels_by_loops():
    """Tokens are ordered by step, then from left to right; below a token are the prompt and earlier steps."""
    steps = rollout_for_tests().unmask_step
    level, below = order_levels(steps)
    for row, line in enumerate(steps.tolist()):
        for i, step in enumerate(line):
            if step < 0:
                assert level[row, i] == NEVER and below[row, i] == 0, "a position never revealed sees the prompt alone"
                continue
            assert 0 <= below[row, i] < level[row, i] < NEVER, "the prompt has level 0"
            for j, other in enumerate(line):
                if other >= 0:
                    assert (level[row, j] <= level[row, i]) == ((other, j) <= (step, i))
                    assert (level[row, j] <= below[row, i]) == (other < step)
    assert any(len(set(line)) < len(line) for line in steps.tolist()), "there should be ties"


def test_inputs_of_a_layout(models):
    """`view_inputs`: the mask that the model's own attention takes; dense on demand."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    ids, positions = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 0, 1], [0, 1, 2]])
    layout = Layout(ids, positions, Attention.padding(mask))
    for attn in ("eager", "sdpa"):
        model = models("llada", torch.float32, attn)
        inputs = view_inputs(nn.ModuleDict({"module": model}), layout)
        assert inputs["input_ids"] is ids and inputs["position_ids"] is positions
        assert torch.equal(inputs["attention_mask"], mask)
        dense = view_inputs(model, layout, dense=True)["attention_mask"]
        assert dense.dtype == (torch.float32 if attn == "eager" else torch.bool)
        assert torch.equal(dense == 0 if attn == "eager" else dense, layout.attention.allowed()[:, None])


def test_no_row_is_empty():
    """An empty softmax is NaN: a row that sees nothing sees itself."""
    attention = Attention(level=torch.full((1, 4), NEVER), reach=torch.full((1, 4), -1))
    assert torch.equal(attention.allowed()[0], torch.eye(4, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forms_of_the_backends(dtype):
    """sdpa: bool; eager: additive with finfo.min (bool is silently wrong there, -inf gives NaN)."""
    attention = random_pattern()
    allowed = torch.tensor(slow_rule(attention))[:, None]
    sdpa, eager = (attention_mask(attention, name, dtype) for name in ("sdpa", "eager"))
    assert sdpa.dtype == torch.bool and torch.equal(sdpa, allowed)
    assert eager.dtype == dtype
    assert eager[allowed].eq(0).all() and eager[~allowed].eq(torch.finfo(dtype).min).all()


def test_flash_attention_is_refused_with_a_remedy():
    with pytest.raises(
        ValueError, match=r"attn_implementation='flash_attention_2'.*'sdpa', 'flex_attention' or 'eager'"
    ):
        attention_mask(random_pattern(), "flash_attention_2", torch.float32)


def dense_reference(model, ids, positions, allowed):
    """Hidden states with a dense additive mask written here, one row at a time."""
    out = []
    for row in range(len(ids)):
        minimum = torch.finfo(model.dtype).min
        bias = torch.tensor([[0.0 if seen else minimum for seen in line] for line in allowed[row]], dtype=model.dtype)
        inputs = {"input_ids": ids[row : row + 1], "position_ids": positions[row : row + 1], "use_cache": False}
        out.append(model.model(attention_mask=bias[None, None], **inputs).last_hidden_state)
    return torch.cat(out)


def check_backend(models, family, implementation, size=10, segments=False):
    attention = random_pattern(size=size)
    generator = torch.Generator().manual_seed(7)
    if segments:
        attention = replace(attention, segment=torch.randint(0, 3, attention.level.shape, generator=generator))
    ids = torch.randint(4, 101, attention.level.shape, generator=generator)
    positions = torch.randint(0, size // 2, attention.level.shape, generator=generator)  # repeated, in no order
    with torch.no_grad():
        want = dense_reference(models(family, torch.float32, "eager"), ids, positions, slow_rule(attention))
        model = models(family, torch.float32, implementation)
        assert model.config._attn_implementation == implementation
        mask = attention_mask(attention, implementation, torch.float32)
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "use_cache": False}
        got = model.model(**inputs).last_hidden_state
        full = model.model(**{**inputs, "attention_mask": None}).last_hidden_state
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (full - want).abs().max() > 0.1, "the pattern should matter"


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_backend_equals_dense_reference(models, family, implementation, segments):
    check_backend(models, family, implementation, segments=segments)


@pytest.mark.slow
@pytest.mark.parametrize("segments", [False, True])
def test_flex_attention_equals_dense_reference(models, segments):
    """Forward only: flex_attention has no backward on a CPU. Slow: it compiles for about 40 seconds."""
    check_backend(models, "llada", "flex_attention", segments=segments)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_left_padding_changes_nothing(models, family, implementation):
    """Identity 7 (docs/methods.md §7): a padded row in a batch equals the row by itself, positions too."""
    model = models(family, torch.float32, implementation)
    prompts = [[5, 9, 77, 20, 64], [33], [90, 14, 8]]
    ids, mask = left_pad(prompts, width=7)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        form = attention_mask(Attention.padding(mask), implementation, torch.float32)
        padded = model(input_ids=ids, attention_mask=form, position_ids=positions, use_cache=False).logits
        for row, prompt in enumerate(prompts):
            alone = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
            torch.testing.assert_close(padded[row, -len(prompt) :], alone, atol=5e-5, rtol=0)


def test_models_are_bidirectional(models, family):
    """The last token changes the first row's output."""
    model = models(family)
    with torch.no_grad():
        a, b = (model(input_ids=torch.tensor([[5, 6, 7, last]])).logits[0, 0] for last in (8, 70))
    assert (a - b).abs().max() > 1e-3
