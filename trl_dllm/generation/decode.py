"""Drawing completions: the entry point of every decoder."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..models import MaskedDiffusionSpec, unwrap
from ..models.spec import check_positions
from ..noise import Purpose, hash64
from ..rollout import Rollout
from .any_order import AnyOrderDecoding, CachedAnyOrderDecoding
from .block_cache import BlockCachedDenoising
from .block_causal import BlockCausalDenoising, CachedBlockCausalDenoising
from .config import DiffusionGenerationConfig
from .denoising import Denoising


class LogitsNotFinite(FloatingPointError):
    """A model whose logits were NaN or infinite while it decoded `rows`: any token could have been drawn."""

    what = "the model's logits are not finite while it decodes"

    def __init__(self, rows: list[int]):
        self.rows = rows
        shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
        super().__init__(
            f"{self.what}, in {len(rows)} row(s) of the batch: {shown}. Its weights may be damaged, or the run "
            "that made them may have diverged; where float16 overflows, bfloat16 does not."
        )


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    config: DiffusionGenerationConfig,
    seeds: Tensor | None = None,
    spec: MaskedDiffusionSpec | None = None,
    batch_size: int | None = None,
    still_running: Callable[[bool], bool] = bool,
    stop: Callable[[list[int]], bool] | None = None,
) -> Rollout:
    """Draw one completion a row.

    Exact sampling in at least float32. Nothing global is seeded or read: the same model, prompt and row seed give the
    same completion in every batch, up to rounding.

    Args:
        model (`nn.Module`): a masked diffusion model, wrapped or not.
        prompt_ids (`Tensor` of shape (B, P), int64): left-padded prompts; P may be 0 for an unshifted family.
        prompt_mask (`Tensor` of shape (B, P)): 1 on prompt tokens, 0 on padding.
        config (`DiffusionGenerationConfig`): decoding settings.
        seeds (`Tensor` of shape (B,), int64, *optional*): one seed a row, also kept as `view_seed`; None hashes the
            row numbers, so two calls draw the same.
        spec (`MaskedDiffusionSpec`, *optional*): read from the model's config if not given.
        batch_size (`int`, *optional*): rows decoded at a time; None takes all. As rows finish, the next take their
            places.
        still_running (`Callable`): asked before each step, and before the prompts go into a cache, whether any process
            has work left; sharded models need a forward from every process, and one that is done runs a spare row.
        stop (`Callable`, *optional*): asked with the tokens of a row's complete blocks whenever one more of them is
            complete; where it says True the row is finished, as by an EOS.

    Returns:
        `Rollout` of B rows. Costs `diffusion_steps` forwards of P + L tokens a row, fewer with early stop or a
        threshold. For a block-causal model a row may take one block more than the canvas has, and with its exact
        cache a forward is of one or two blocks. With an approximate cache only one of them a block is of P + L; the
        others are of the block (`dual`) or of it and what follows (`prefix`).

    Raises:
        ValueError: a model that is no masked diffusion model, or one that cannot be decoded so; an empty prompt for a
            shifted family, or a prompt and canvas beyond the model's positions.
        LogitsNotFinite: NaN or infinite logits, found in the log-probs of what was drawn, once for the whole batch.
    """
    spec = spec or MaskedDiffusionSpec.from_model(model)
    config.check_model(spec)
    prompt_mask = prompt_mask.bool()
    rows = prompt_ids.shape[0]
    longest = int(prompt_mask.sum(dim=1).max()) if rows else 0
    check_positions(unwrap(model).config, longest, config.max_new_tokens, "max_new_tokens")
    decoder = BlockCachedDenoising if config.approximate_cache else Denoising
    if config.decoding == "any_order":
        decoder = CachedAnyOrderDecoding if config.cache else AnyOrderDecoding
    elif spec.blocks is not None:
        decoder = CachedBlockCausalDenoising if config.cache else BlockCausalDenoising
    if seeds is None:
        seeds = hash64(Purpose.ROW, torch.arange(rows, device=prompt_ids.device))
    if spec.logits_shift and (rows and not prompt_mask.any(dim=1).all()):
        raise ValueError(
            f"logits_shift={spec.logits_shift}: this family predicts a position at the row before it, so every row "
            "needs a prompt of at least one token (a BOS token will do)."
        )
    state = decoder(model, prompt_ids, prompt_mask, config, seeds, spec, batch_size)
    state.stop = stop
    state.start(still_running)
    while still_running(state.unfinished):
        state.step()
    rollout = state.rollout()
    broken = (~rollout.logps.isfinite()).any(dim=1).nonzero().squeeze(1).tolist()
    if broken:
        raise LogitsNotFinite(broken)
    return rollout
