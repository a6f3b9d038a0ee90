"""The one output head of sampler, scorer and reports: logits exist for the rows that are asked for, a tile at a time.

A masked diffusion model is called for a few of its positions, but its vocabulary is large: at LLaDA's shapes the (B,
S, V) logits of one micro-batch take gigabytes, of which the scorer needs a tenth. `apply_head` calls the *wrapped*
model (DDP, DeepSpeed, PEFT, accelerate's autocast), and redirects the forward of the innermost output head for that
one call: it selects the rows, pads them to tiles of 8 to 64 rows and reduces each tile's logits to a few numbers
before the next is made. Because the result leaves through the model's own output, the hooks of every wrapper see a
normal forward.

A row's numbers have the same bits in tiles of one size whatever else is in them; tiles are of few sizes, by the number
of rows that a call wants. So sampler and scorer agree in every bit where their tiles have one size, and to rounding
where not. Whether a tile is kept for the backward pass (`KEPT_BYTES`) changes no bit.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


TILE_ROWS = 64
_MULTIPLE = 8  # rows; a tile has that many, or a multiple

# What a forward keeps of its logits for the backward pass, in bytes: whole tiles, and what does not fit is computed
# again, tile by tile. At LLaDA's vocabulary of 126,464 it is 256 rows.
KEPT_BYTES = 256 * 2**20
# Tables of logits' size that a reduction keeps: log-probs, and their exponentials where entropies have gradients.
_KEPT_TABLES = 2


def tile_rows(count: int) -> int:
    """Rows of a tile in a call that wants `count`: a multiple of 8 up to 64, so that the fewest tiles are filled best.

    At a large vocabulary a tile of 64 for a few rows would cost more than the rest of a small model.
    """
    tiles = max(1, -(-count // TILE_ROWS))
    return max(1, -(-count // (tiles * _MULTIPLE))) * _MULTIPLE


def in_tiles(count: int) -> int:
    """Rows that the head is applied to, for `count` that are wanted: whole tiles, and at least one."""
    size = tile_rows(count)
    return max(1, -(-count // size)) * size


def kept_rows(count: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Rows of the tiles of a call for `count` whose logits the backward pass finds as they were (`KEPT_BYTES`)."""
    size = tile_rows(count)
    tile = size * vocab_size * torch.promote_types(dtype, torch.float32).itemsize * _KEPT_TABLES
    return min(in_tiles(count), KEPT_BYTES // tile * size)


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside any of DDP, FSDP, DeepSpeed's engine, torch.compile and PEFT."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        elif isinstance(getattr(model, "module", None), nn.Module):  # DDP, FSDP, DeepSpeed
            model = model.module
        elif hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        else:
            return model


def apply_head(
    model: nn.Module,
    inputs: dict,
    rows: Tensor,
    reduce: Callable[..., Tensor],
    *row_args: Tensor,
    keep: bool = True,
) -> Tensor:
    """Run `model(**inputs)` and reduce the logits of the chosen rows.

    Args:
        model (`nn.Module`): a causal-LM class of transformers, wrapped or not.
        inputs (`dict`): its forward arguments, without `labels`.
        rows (`Tensor` of shape (n,) or (n, k), int64): indices into the B·S rows of hidden states; n may be 0. With
            (n, k) each result is reduced from k rows together (guidance needs two).
        reduce (`Callable`): `(logits (tile[, k], V), *args (tile, ...)) -> (tile, C)`; must not depend on which rows
            share a tile.
        *row_args (`Tensor` of shape (n, ...)): per-row arguments of `reduce`.
        keep (`bool`): with gradients enabled, keep the logits of as many tiles as `KEPT_BYTES` has room for, where
            `reduce` saves no more than two tables of their size. The others' are computed again in the backward pass.

    Returns:
        `Tensor` of shape (n, C). One forward.
    """
    head = unwrap(model).get_output_embeddings()
    project = head.forward

    def redirected(hidden: Tensor) -> Tensor:
        chosen = hidden.reshape(-1, hidden.shape[-1])[rows]
        count, size = chosen.shape[0], tile_rows(chosen.shape[0])
        vocab_size = getattr(head, "out_features", None)
        kept = kept_rows(count, vocab_size, hidden.dtype) if keep and vocab_size and rows.dim() == 1 else 0
        # At least one tile even for no rows: a process with nothing to score must give the head's weights a (zero)
        # gradient like the others, or sharded training waits for it for ever.
        padding = in_tiles(count) - count
        chosen = torch.cat([chosen, chosen.new_zeros(padding, *chosen.shape[1:])])
        args = [torch.cat([arg, arg.new_zeros(padding, *arg.shape[1:])]) for arg in row_args]

        def tile(hidden_rows: Tensor, *tile_args: Tensor) -> Tensor:
            return reduce(project(hidden_rows), *tile_args)

        outputs = []
        for start in range(0, count + padding, size):
            part = [tensor[start : start + size] for tensor in (chosen, *args)]
            again = torch.is_grad_enabled() and start >= kept
            outputs.append(checkpoint(tile, *part, use_reentrant=False) if again else tile(*part))
        return torch.cat(outputs)[:count]

    with _redirect(head, redirected):
        return model(**{"use_cache": False, **inputs}).logits


def hidden_rows(model: nn.Module, inputs: dict, rows: Tensor) -> Tensor:
    """Hidden states before the head at the chosen rows, (n, H), from one forward; for another call to project."""
    head = unwrap(model).get_output_embeddings()
    with _redirect(head, lambda hidden: hidden.reshape(-1, hidden.shape[-1])[rows]):
        return model(**{"use_cache": False, **inputs}).logits


def hidden_rows_and_head(model: nn.Module, inputs: dict, rows: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`hidden_rows`, and the head with a copy of its weights, for a model that is sharded over processes.

    Within the model's forward the weights are whole. To gather them later, once a tile, would wait for ever where
    another process has fewer tiles. Takes the head's V x H numbers of memory as long as it is held.
    """
    head = unwrap(model).get_output_embeddings()
    whole: list[Tensor | None] = []

    def redirected(hidden: Tensor) -> Tensor:
        whole.extend(None if p is None else p.detach().clone() for p in (head.weight, head.bias))
        return hidden.reshape(-1, hidden.shape[-1])[rows]

    with _redirect(head, redirected):
        hidden = model(**{"use_cache": False, **inputs}).logits
    weight, bias = whole
    assert weight is not None
    # TRL's cast of a head to float32 takes the hidden states along.
    return hidden, lambda hidden: nn.functional.linear(hidden.to(weight.dtype), weight, bias)


_redirections: list[Callable[[Tensor], Tensor]] = []  # of the calls that are running, the innermost last


@torch.compiler.disable
def _redirected(hidden: Tensor) -> Tensor:
    """The forward of every redirected head: under torch.compile it has to be one and the same object."""
    return _redirections[-1](hidden)


@contextmanager
def _redirect(module: nn.Module, forward: Callable[[Tensor], Tensor]):
    """Replace `module.forward` during a call; what was there before (a method, TRL's fp32 cast) returns."""
    before = module.__dict__.get("forward")
    module.forward = _redirected
    _redirections.append(forward)
    try:
        yield
    finally:
        _redirections.pop()
        if before is None:
            del module.forward
        else:
            module.forward = before


def log_probs(logits: Tensor, mask_token_id: int, temperature: float = 1.0) -> Tensor:
    """Log-probs over the vocabulary without the mask token, (…, V), in at least float32.

    The mask token is never a legal sample. Its entry is a large negative number, not -inf, so that p·log p is 0 and
    not NaN. A temperature of 0 (greedy decoding) is scored at 1.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature not in (0, 1):
        logits = logits / temperature
    mask = torch.full((1,), mask_token_id, device=logits.device)
    return logits.index_fill(-1, mask, torch.finfo(logits.dtype).min / 4).log_softmax(dim=-1)


def restrict(log_p: Tensor, support: Tensor) -> Tensor:
    """Log-probs (n, K) of the tokens that `support` (n, K) names, normalised among them; -1 names none."""
    values = log_p.gather(1, support.long().clamp(min=0))
    return values.masked_fill(support < 0, torch.finfo(values.dtype).min / 4).log_softmax(dim=-1)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy in nats of rows of `log_probs`, (…,)."""
    return -(log_p.exp() * log_p).sum(dim=-1)
