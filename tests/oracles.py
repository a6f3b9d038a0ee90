"""Slow, plain re-computations that the tests compare the library with.

Nothing here pads, batches or vectorises over rows: one row, one forward, one token at a time, in float64. The library
is used for two things only: to make the tiny models, and for the uniforms of `trl_dllm.noise` (tested by itself in
test_noise.py).
"""

import itertools
import math
from collections import namedtuple
from fractions import Fraction
from types import SimpleNamespace

import torch
from torch import nn

from trl_dllm.models import create_tiny_model
from trl_dllm.noise import Purpose, uniform
from trl_dllm.rollout import Rollout


MASK64 = 2**64 - 1


# ------------------------------------------------------------------------------------------------- statistics


def chi_square_p(observed, expected) -> float:
    """P-value of Pearson's test; `expected` are counts."""
    observed, expected = torch.as_tensor(observed).double(), torch.as_tensor(expected).double()
    assert expected.min() >= 5, "too few expected counts for a chi-square test"
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2).item()


def ks_p(draws) -> float:
    """P-value (asymptotic) of the Kolmogorov-Smirnov test against the uniform distribution on [0, 1)."""
    draws = torch.as_tensor(draws).double().flatten().sort().values
    n = len(draws)
    grid = torch.arange(n).double()
    distance = torch.maximum((grid + 1) / n - draws, draws - grid / n).max().item() * math.sqrt(n)
    return 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * distance) ** 2) for k in range(1, 101))


# ------------------------------------------------------------------------------------------------------ noise


def splitmix_finaliser(x: int) -> int:
    """splitmix64's finaliser on Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def slow_hash(*keys: int) -> int:
    """`noise.hash64` for one set of keys, as an unsigned integer."""
    golden, state = 0x9E3779B97F4A7C15, 0
    for key in keys:
        state = splitmix_finaliser(((state ^ splitmix_finaliser((key + golden) & MASK64)) + golden) & MASK64)
    return state


# ----------------------------------------------------------------------------------------------------- models


def sharp_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float64, attn_implementation="sdpa", **kwargs):
    """A tiny model whose predictions are far from uniform and depend on every weight, in eval mode."""
    model, _ = create_tiny_model(family, hidden_size=32, num_layers=2, seed=seed, **kwargs)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(14.0)
            else:  # norms are all ones and biases all zeros on initialisation, which hides mix-ups
                parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
    model.set_attn_implementation(attn_implementation)
    return model.to(dtype).eval()


class TableModel(nn.Module):
    """A brute-force masked diffusion model that the library takes for a transformers one.

    The canvas is its state: `table[state, position]` holds the logits of a position, so every conditional is a free
    parameter. Prompts are accepted and ignored. The last token of the vocabulary is the mask unless told otherwise.

    Args:
        table (`Tensor` of shape (V ** L, L, V)): logits; state = Σ_i token_i V^i.
    """

    def __init__(self, table: torch.Tensor, mask_token_id: int | None = None, eos_token_id: int | None = None):
        super().__init__()
        _, self.canvas, vocab = table.shape
        assert len(table) == vocab**self.canvas
        self.table = nn.Parameter(table.clone())
        self.lm_head = nn.Linear(vocab, vocab, bias=False, dtype=table.dtype)
        self.lm_head.weight = nn.Parameter(torch.eye(vocab, dtype=table.dtype), requires_grad=False)
        self.config = SimpleNamespace(
            is_causal=False,
            mask_token_id=vocab - 1 if mask_token_id is None else mask_token_id,
            eos_token_id=eos_token_id,
            vocab_size=vocab,
            hidden_size=vocab,
            num_hidden_layers=1,
            num_attention_heads=1,
            model_type="table",
            _attn_implementation="eager",
        )
        self.config.get_text_config = lambda: self.config

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        canvas, vocab = self.canvas, self.config.vocab_size
        state = (input_ids[:, -canvas:] * vocab ** torch.arange(canvas)).sum(dim=1)
        hidden = self.table[state]  # (B, L, V)
        prompt = hidden.new_zeros(len(hidden), input_ids.shape[1] - canvas, vocab)
        return SimpleNamespace(logits=self.lm_head(torch.cat([prompt, hidden], dim=1)))

    def conditional(self, canvas: tuple[int, ...], position: int, temperature: float = 1.0) -> torch.Tensor:
        """Log-probs (V,) of a position's value given a canvas, -inf for the mask; read straight from the table."""
        state = sum(token * self.config.vocab_size**i for i, token in enumerate(canvas))
        logits = self.table[state, position] / temperature
        real = [v for v in range(self.config.vocab_size) if v != self.config.mask_token_id]
        out = torch.full_like(logits, -torch.inf)
        out[real] = logits[real] - logits[real].exp().sum().log()
        return out


def random_table(canvas: int, vocab: int, seed: int, scale: float = 1.5, **kwargs) -> TableModel:
    """A table whose conditionals belong to no joint distribution."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(vocab**canvas, canvas, vocab, generator=generator, dtype=torch.float64)
    return TableModel(scale * table, **kwargs)


def joint_table(canvas: int, vocab: int, seed: int) -> TableModel:
    """A table whose conditionals all come from one random joint distribution over the canvas (mask = last token)."""
    real, mask = vocab - 1, vocab - 1
    generator = torch.Generator().manual_seed(seed)
    joint = (2 * torch.randn(*[real] * canvas, generator=generator, dtype=torch.float64)).exp()
    joint = joint / joint.sum()
    table = torch.randn(vocab**canvas, canvas, vocab, generator=generator, dtype=torch.float64)
    for state in itertools.product(range(vocab), repeat=canvas):
        index = sum(token * vocab**i for i, token in enumerate(state))
        for position in range(canvas):
            for value in range(real):
                keys = [slice(None) if token == mask else token for token in state]
                keys[position] = value
                table[index, position, value] = joint[tuple(keys)].sum().log()
    return TableModel(table)


# ------------------------------------------------------------------------------------------------ enumeration

Trajectory = namedtuple("Trajectory", "tokens steps order_prob log_prob")


def enumerate_trajectories(
    model: TableModel, remasking: str, schedule: list[int], block_length: int | None = None, temperature: float = 1.0
) -> list[Trajectory]:
    """Every trajectory of a value-independent order: canvas, steps, the order's probability, the values' log-prob.

    `schedule` is how many positions a block reveals at each step. `log_prob` keeps its graph to the table.
    """
    length, mask, vocab = model.canvas, model.config.mask_token_id, model.config.vocab_size
    block_length = block_length or length
    assert sum(schedule) == block_length and length % block_length == 0
    real = [v for v in range(vocab) if v != mask]

    def choices(canvas, masked, count):
        if remasking == "random":
            subsets = list(itertools.combinations(masked, count))
            return [(subset, 1 / len(subsets)) for subset in subsets]
        if remasking == "left_to_right":
            return [(tuple(masked[:count]), 1.0)]
        key = {}
        for position in masked:
            p = sorted(model.conditional(canvas, position)[real].exp().tolist(), reverse=True)
            key[position] = p[0] - p[1] if remasking == "margin" else sum(q * math.log(q) for q in p)
        return [(tuple(sorted(masked, key=lambda position: (-key[position], position))[:count]), 1.0)]

    out = []

    def grow(canvas, steps, step, order_prob, log_prob):
        if step == len(schedule) * (length // block_length):
            out.append(Trajectory(canvas, steps, order_prob, log_prob))
            return
        block = step // len(schedule)
        masked = [i for i in range(block * block_length, (block + 1) * block_length) if canvas[i] == mask]
        for subset, prob in choices(canvas, masked, schedule[step % len(schedule)]):
            for values in itertools.product(real, repeat=len(subset)):
                new, when, total = list(canvas), list(steps), log_prob
                for position, value in zip(subset, values, strict=True):
                    total = total + model.conditional(canvas, position, temperature)[value]
                    new[position], when[position] = value, step
                grow(tuple(new), tuple(when), step + 1, order_prob * prob, total)

    grow((mask,) * length, (-1,) * length, 0, 1.0, torch.zeros((), dtype=torch.float64))
    return out


def probabilities(trajectories: list[Trajectory]) -> torch.Tensor:
    """Probability of each trajectory."""
    return torch.tensor([t.order_prob * t.log_prob.exp().item() for t in trajectories], dtype=torch.float64)


def trajectories_rollout(model: TableModel, trajectories: list[Trajectory], **kwargs) -> Rollout:
    """The trajectories as the rows of a rollout with an empty prompt."""
    tokens = torch.tensor([t.tokens for t in trajectories])
    rows = len(tokens)
    return Rollout(
        **{
            "prompt_ids": torch.zeros(rows, 0, dtype=torch.int64),
            "prompt_mask": torch.zeros(rows, 0, dtype=torch.bool),
            "completion_ids": tokens,
            "unmask_step": torch.tensor([t.steps for t in trajectories]),
            "logps": torch.zeros(tokens.shape, dtype=torch.float64),
            "counted": torch.ones(tokens.shape, dtype=torch.bool),
            "view_seed": torch.arange(rows),
            "mask_token_id": model.config.mask_token_id,
            **kwargs,
        }
    )


def segment_cuts(steps: int, segments: int) -> list[int]:
    """b_n = floor(n T / N) for n = 0..N, in exact arithmetic."""
    return [math.floor(Fraction(n * steps, segments)) for n in range(segments + 1)]


def canvas_before(tokens, steps, cut: int, mask: int) -> tuple[int, ...]:
    """The canvas as it stood before decoding step `cut`."""
    return tuple(t if 0 <= s < cut else mask for t, s in zip(tokens, steps, strict=True))


# ---------------------------------------------------------------------------- one row of a transformers model


def full_logits(model, ids: list[int]) -> torch.Tensor:
    """All logits (S, V) of one unpadded row, float64, from the plain forward of the model."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()


def token_distribution(logits: torch.Tensor, mask: int, temperature: float = 1.0) -> torch.Tensor:
    """Probabilities (V,) without the mask, from one row of logits; differentiable."""
    keep = [v for v in range(len(logits)) if v != mask]
    scaled = logits[keep] / (temperature or 1.0)
    weights = (scaled - scaled.max()).exp()
    return torch.zeros_like(logits).index_put((torch.tensor(keep),), weights / weights.sum())


def unpadded(rollout: Rollout, row: int) -> list[int]:
    """The prompt of a row without its padding."""
    return [t for t, m in zip(rollout.prompt_ids[row].tolist(), rollout.prompt_mask[row].tolist(), strict=True) if m]


def slow_decode(
    model,
    prompt: list[int],
    *,
    canvas: int,
    block_length: int,
    seed: int,
    remasking: str,
    mask: int,
    shift: int,
    temperature: float = 1.0,
    schedule: list[int] | None = None,
    threshold: float | None = None,
    eos: tuple[int, ...] = (),
    stop_at_eos: bool = False,
    cfg_scale: float = 0.0,
    starts: list[int] | None = None,
    grows: bool = False,
    logits_of=full_logits,
):
    """Decode one row by itself, docs/methods.md §3.1 word for word; returns tokens, steps and log-probs as lists.

    `starts` are the blocks' first positions; where the canvas `grows`, what stands behind the block is not shown.
    """
    tokens, steps, logps, step = [mask] * canvas, [-1] * canvas, [0.0] * canvas, 0
    bounds = [*(range(0, canvas, block_length) if starts is None else starts), canvas]
    for start, end in itertools.pairwise(bounds):
        in_block, step_in_block = range(start, end), 0
        shown = end if grows else canvas
        while any(tokens[i] == mask for i in in_block):
            with torch.no_grad():
                logits = logits_of(model, prompt + tokens[:shown])
                if cfg_scale:
                    blind = logits_of(model, [mask] * len(prompt) + tokens[:shown])
                    logits = blind + (cfg_scale + 1) * (logits - blind)
            proposals = []
            for i in in_block:
                if tokens[i] != mask:
                    continue
                row = logits[len(prompt) + i - shift]
                plain, tempered = (
                    token_distribution(row, mask).tolist(),
                    token_distribution(row, mask, temperature).tolist(),
                )
                if temperature == 0:
                    token = max(range(len(plain)), key=lambda v: plain[v])
                else:
                    point, token = uniform(seed, Purpose.TOKEN, step, i).item(), 0
                    total = tempered[0]
                    while total <= point:
                        token += 1
                        total += tempered[token]
                ranked = sorted((p for v, p in enumerate(plain) if v != mask), reverse=True)
                score = {
                    "low_confidence": plain[token],
                    "margin": ranked[0] - ranked[1],
                    "entropy": sum(p * math.log(p) for p in ranked if p > 0),
                    "random": uniform(seed, Purpose.ORDER, step, i).item(),
                    "left_to_right": -i,
                }[remasking]
                proposals.append((score, i, token, math.log(tempered[token])))
            proposals.sort(key=lambda proposal: (-proposal[0], proposal[1]))
            if threshold is None:
                kept = proposals[: schedule[step_in_block]]
            else:
                kept = [p for n, p in enumerate(proposals) if n == 0 or p[0] > threshold]
            for _, i, token, logp in kept:
                tokens[i], steps[i], logps[i] = token, step, logp
            step, step_in_block = step + 1, step_in_block + 1
        if stop_at_eos and any(token in eos for token in tokens):
            break
    return tokens, steps, logps


def slow_step_merge(model, rollout: Rollout, segments: int | None, shift: int, temperature: float = 1.0):
    """StepMerge (None: the exact trajectory) one token at a time: log-probs and entropies, (B, L), with a graph."""
    rows, canvas = rollout.completion_ids.shape
    mask = rollout.mask_token_id
    logps = [[torch.zeros((), dtype=torch.float64)] * canvas for _ in range(rows)]
    entropies = [[torch.zeros((), dtype=torch.float64)] * canvas for _ in range(rows)]
    for row in range(rows):
        tokens, steps = rollout.completion_ids[row].tolist(), rollout.unmask_step[row].tolist()
        prompt, total = unpadded(rollout, row), 1 + max(steps)
        cuts = segment_cuts(total, segments) if segments else list(range(total + 1))
        cache = {}
        for i, step in enumerate(steps):
            if not rollout.counted[row, i]:
                continue
            cut = max(b for b in cuts if b <= step)
            if cut not in cache:
                cache[cut] = full_logits(model, prompt + list(canvas_before(tokens, steps, cut, mask)))
            p = token_distribution(cache[cut][len(prompt) + i - shift], mask, temperature)
            logps[row][i] = p[tokens[i]].log()
            entropies[row][i] = -sum(q * q.log() for v, q in enumerate(p) if v != mask)
    return torch.stack([torch.stack(r) for r in logps]), torch.stack([torch.stack(r) for r in entropies])


# --------------------------------------------------------------------------------------------------------- blocks


def block_starts(prompt: int, canvas: int, size: int, alignment: str) -> list[int]:
    """First positions of a canvas's blocks; counted from the prompt's first token, or from the canvas's."""
    return [i for i in range(canvas) if i == 0 or (i + (prompt if alignment == "position" else 0)) % size == 0]


def block_causal_logits(size: int, prompt: int, alignment: str):
    """`full_logits` of a block-causal model: a row sees its own block and those before it, by a mask of all pairs."""

    def logits(model, ids: list[int]) -> torch.Tensor:
        block = [(p - (prompt if alignment == "canvas" else 0)) // size for p in range(len(ids))]
        mask = torch.tensor([[[[k <= q for k in block] for q in block]]])
        return model(input_ids=torch.tensor([ids]), attention_mask=mask, use_cache=False).logits[0].double()

    return logits


def slow_block_views(model, rollout: Rollout, shown, scored) -> torch.Tensor:
    """Log-probs (B, L) of a block-causal model, one block at a time behind finished ones; with a graph.

    `shown(row, i)` says whether the block's own position i shows its token, `scored(row, i)` whether it is scored.
    """
    canvas, blocks, scores = rollout.completion_ids.shape[1], rollout.blocks, {}
    for row in range(len(rollout)):
        prompt, tokens = unpadded(rollout, row), rollout.completion_ids[row].tolist()
        starts = block_starts(len(prompt), canvas, blocks.size, blocks.alignment)
        logits = block_causal_logits(blocks.size, len(prompt), blocks.alignment)
        for start, end in itertools.pairwise([*starts, canvas]):
            here = [tokens[i] if shown(row, i) else rollout.mask_token_id for i in range(start, end)]
            out = logits(model, prompt + tokens[:start] + here)
            for i in range(start, end):
                if scored(row, i):
                    p = token_distribution(out[len(prompt) + i], rollout.mask_token_id)
                    scores[row, i] = p[tokens[i]].log()
    return assemble(rollout, scores)


# -------------------------------------------------------------------------------------------------- views of a rollout


def hits(estimator, rollout: Rollout, n: int, iteration: int = 0) -> torch.Tensor:
    """Positions that view n scores, bool (B, L); its targets are the canvas's tokens."""
    view = estimator.view(rollout, n, rollout.view_seed, iteration)
    chosen = view.targets != -100
    out = torch.zeros_like(rollout.counted, dtype=torch.int64)
    out.scatter_add_(1, view.index, chosen.long())
    assert out.max() <= 1
    tokens = rollout.completion_ids.gather(1, view.index)
    assert torch.equal(view.targets[chosen], tokens[chosen])
    return out.bool()


def canvas_of(estimator, rollout: Rollout, n: int, iteration: int = 0) -> torch.Tensor:
    """What view n shows of the canvas, (B, L)."""
    view = estimator.view(rollout, n, rollout.view_seed, iteration)
    return view.input_ids[:, rollout.prompt_ids.shape[1] :]


def masked_score(model, rollout: Rollout, row: int, chosen, shift, temperature=1.0, logits=full_logits):
    """log p(y_i | the row's canvas without `chosen`), for each i of `chosen`; with a graph."""
    prompt, tokens = unpadded(rollout, row), rollout.completion_ids[row].tolist()
    canvas = [rollout.mask_token_id if i in chosen else t for i, t in enumerate(tokens)]
    out = logits(model, prompt + canvas)
    return {
        i: token_distribution(out[len(prompt) + i - shift], rollout.mask_token_id, temperature)[tokens[i]].log()
        for i in sorted(chosen)
    }


def assemble(rollout: Rollout, scores: dict) -> torch.Tensor:
    """The dictionary {(row, position): log-prob} as (B, L), of the counted positions."""
    zero = torch.zeros((), dtype=torch.float64)
    rows, canvas = rollout.completion_ids.shape
    scores = {place: value for place, value in scores.items() if rollout.counted[place]}
    return torch.stack([torch.stack([scores.get((r, i), zero) for i in range(canvas)]) for r in range(rows)])


def slow_views(
    model, rollout: Rollout, estimator, shift: int, temperature: float = 1.0, logits=full_logits, iteration: int = 0
) -> torch.Tensor:
    """Every view's set, read off its targets, scored one row at a time: log-probs (B, L) with a graph."""
    scores = {}
    for n in range(estimator.num_views(rollout)):
        chosen = hits(estimator, rollout, n, iteration)
        for row in range(len(rollout)):
            members = chosen[row].nonzero().flatten().tolist()
            if members:
                for i, value in masked_score(model, rollout, row, members, shift, temperature, logits).items():
                    assert (row, i) not in scores, "a position was scored twice"
                    scores[row, i] = value
    return assemble(rollout, scores)


def codes(table: torch.Tensor) -> torch.Tensor:
    """Each row of a bool table (B, L) as a number."""
    return (table.long() * 2 ** torch.arange(table.shape[1])).sum(dim=1)


# ---------------------------------------------------------------------------------------------------- any-order models


def next_logits(model, prompt: list[int], before: list[tuple[int, int]], positions: list[int]) -> torch.Tensor:
    """Logits (n, V), float64: what an any-order model says of each of `positions` after (position, token)s in order.

    A row is prompt, tokens in their order, one mask. The prompt sees the prompt; the others also what stands before
    them. The rows share everything but the mask's position, so none of them is padded.
    """
    ids = prompt + [token for _, token in before] + [model.config.mask_token_id]
    size, dtype = len(ids), model.dtype
    seen = [[k < len(prompt) or k <= q for k in range(size)] for q in range(size)]
    for q in range(len(prompt)):
        seen[q] = [k < len(prompt) for k in range(size)]
    bias = torch.tensor([[0.0 if s else torch.finfo(dtype).min for s in line] for line in seen], dtype=dtype)
    places = list(range(len(prompt))) + [len(prompt) + position for position, _ in before]
    inputs = {
        "input_ids": torch.tensor([ids] * len(positions)),
        "position_ids": torch.tensor([[*places, len(prompt) + position] for position in positions]),
        "attention_mask": bias.expand(len(positions), 1, -1, -1),
    }
    return model(**inputs, use_cache=False).logits[:, -1].double()


def slow_any_order(model, rollout: Rollout, temperature: float = 1.0):
    """The exact any-order likelihood one token at a time: log-probs and entropies, (B, L), with a graph."""
    zero, mask = torch.zeros((), dtype=torch.float64), rollout.mask_token_id
    logps, entropies = [], []
    for row in range(len(rollout)):
        tokens, steps = rollout.completion_ids[row].tolist(), rollout.unmask_step[row].tolist()
        order = sorted((i for i, s in enumerate(steps) if s >= 0), key=lambda i: (steps[i], i))
        logps.append([zero] * len(tokens))
        entropies.append([zero] * len(tokens))
        for i in (i for i in order if rollout.counted[row, i]):
            before = [(j, tokens[j]) for j in order if steps[j] < steps[i]]
            p = token_distribution(next_logits(model, unpadded(rollout, row), before, [i])[0], mask, temperature)
            logps[-1][i] = p[tokens[i]].log()
            entropies[-1][i] = -sum(q * q.log() for v, q in enumerate(p) if v != mask)
    return torch.stack([torch.stack(r) for r in logps]), torch.stack([torch.stack(r) for r in entropies])


# ---------------------------------------------------------------------------------------------------- batches


def left_pad(prompts: list[list[int]], width: int | None = None, pad: int = 0):
    """`(prompt_ids, prompt_mask)` of a left-padded batch."""
    width = max(map(len, prompts)) if width is None else width
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], dtype=torch.int64).reshape(len(prompts), width)
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts]).reshape(len(prompts), width)
    return ids, mask.bool()


def random_rollout(
    mask: int,
    vocab: int,
    seed: int,
    canvas: int = 9,
    prompt_lengths=(4, 1, 7, 2, 5),
    num_steps=(9, 3, 1, 6, 4),
    width: int | None = None,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Rollout:
    """Rows that differ in prompt length, number of steps, and which positions were revealed; steps are in no order.

    Row 0 reveals one position a step in a random order; the others leave some positions masked and some steps unused.
    """
    generator = torch.Generator().manual_seed(seed)

    def randint(high):
        return int(torch.randint(high, (), generator=generator))

    def token():
        value = randint(vocab - 1)
        return value + (value >= mask)

    tokens, steps = [], []
    for row, total in enumerate(num_steps):
        order = torch.randperm(canvas, generator=generator).tolist()
        when = [-1] * canvas
        revealed = canvas if row == 0 else max(1, canvas - 1 - randint(3))
        for rank, position in enumerate(order[:revealed]):
            # Row 0's steps are a permutation; the others' are drawn, the last step always taken.
            when[position] = total - 1 if rank == 0 else (rank - 1 if row == 0 else randint(total))
        steps.append(when)
        tokens.append([token() if s >= 0 else mask for s in when])
    prompt_ids, prompt_mask = left_pad([[token() for _ in range(n)] for n in prompt_lengths], width)
    steps, tokens = torch.tensor(steps), torch.tensor(tokens)
    counted = (steps >= 0) & (
        torch.arange(canvas) < torch.tensor([canvas - row for row in range(len(steps))])[:, None]
    )
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=tokens,
        unmask_step=steps,
        logps=torch.zeros(steps.shape, dtype=dtype),
        counted=counted,
        view_seed=torch.randint(2**62, (len(steps),), generator=generator),
        mask_token_id=mask,
        temperature=temperature,
    ).validate()
