"""Masked diffusion decoding (METHODS §3.1): blocks left to right, a few tokens kept a step.

In each step the model sees the prompt and the whole canvas, a token is drawn for every masked position of the row's
current block, and some of them are kept. Rows do not wait for each other: each has its own block and step, so what a
row draws does not depend on the batch that it is in, and a finished row leaves the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..models import Attention, ForwardFlops, MaskedDiffusionSpec, apply_head, attention_mask, log_probs, unwrap
from ..noise import Purpose, hash64, uniform
from ..rollout import Rollout, count_until_eos
from .config import DiffusionGenerationConfig
from .order import draw_tokens, measure, reveal


def default_eos(model: nn.Module) -> tuple[int, ...]:
    """The end-of-sequence ids that a model names, in its generation config or its config."""
    model = unwrap(model)
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = model.config.get_text_config().eos_token_id if ids is None else ids
    return () if ids is None else tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)


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
        batch_size (`int`, *optional*): rows decoded at a time; None takes all.
        still_running (`Callable`): asked before each step whether any process has work left; sharded models need a
            forward from every process, and a process that is done runs one on a spare row.

    Returns:
        `Rollout` of B rows. Costs `diffusion_steps` forwards of P + L tokens a row, fewer with early stop or a
        threshold.

    Raises:
        ValueError: a model that is no masked diffusion model, or an empty prompt for a shifted family.
    """
    spec = spec or MaskedDiffusionSpec.from_model(model)
    prompt_mask = prompt_mask.bool()
    rows = prompt_ids.shape[0]
    if seeds is None:
        seeds = hash64(Purpose.ROW, torch.arange(rows, device=prompt_ids.device))
    if spec.logits_shift and (rows and not prompt_mask.any(dim=1).all()):
        raise ValueError(
            f"logits_shift={spec.logits_shift}: this family predicts a position at the row before it, so every row "
            "needs a prompt of at least one token (a BOS token will do)."
        )
    batch_size = batch_size or max(rows, 1)
    parts = []
    for start in range(0, max(rows, 1), batch_size):
        part = slice(start, start + batch_size)
        state = _Denoising(model, prompt_ids[part], prompt_mask[part], config, seeds[part], spec)
        while still_running(bool(state.active.any())):
            state.step()
        parts.append(state.rollout())
    return Rollout.cat(parts)


class _Denoising:
    """The canvas of a batch while it is decoded."""

    def __init__(self, model, prompt_ids, prompt_mask, config, seeds, spec):
        self.model, self.config, self.spec, self.seeds = model, config, spec, seeds
        self.prompt_ids, self.prompt_mask = prompt_ids, prompt_mask
        self.eos = config.eos_token_ids if config.eos_token_ids is not None else default_eos(model)
        rows, canvas, device = prompt_ids.shape[0], config.max_new_tokens, prompt_ids.device
        self.tokens = torch.full((rows, canvas), spec.mask_token_id, dtype=torch.int64, device=device)
        self.unmask_step = torch.full((rows, canvas), -1, dtype=torch.int64, device=device)
        self.logps = torch.zeros(
            rows, canvas, dtype=torch.promote_types(unwrap(model).dtype, torch.float32), device=device
        )
        self.block = torch.zeros(rows, dtype=torch.int64, device=device)  # the row's current block
        self.taken = torch.zeros(rows, dtype=torch.int64, device=device)  # steps taken by the row
        self.taken_in_block = torch.zeros(rows, dtype=torch.int64, device=device)
        self.active = torch.ones(rows, dtype=torch.bool, device=device)
        self.schedule = torch.tensor(config.schedule if config.confidence_threshold is None else [1], device=device)
        prompt_length = prompt_mask.sum(dim=1, keepdim=True)
        canvas_position = prompt_length + torch.arange(canvas, device=device)
        self.position_ids = torch.cat([(prompt_mask.long().cumsum(1) - 1).clamp(min=0), canvas_position], dim=1)
        self.valid = torch.cat([prompt_mask, torch.ones_like(self.tokens, dtype=torch.bool)], dim=1)
        self.count_flops = ForwardFlops(model)
        self.num_forwards = self.flops = 0

    def step(self) -> None:
        """One forward of the rows that are still decoding, and the tokens that it reveals."""
        config, active = self.config, self.active.nonzero().squeeze(1)
        if len(active) == 0:  # other processes are still decoding
            self._score(active.new_zeros(1), active.new_zeros(0), active.new_zeros(0))
            return
        canvas = torch.arange(config.max_new_tokens, device=active.device)
        in_block = canvas // config.block_length == self.block[active, None]
        candidates = in_block & (self.unmask_step[active] < 0)
        row, position = candidates.nonzero(as_tuple=True)
        token, logp, value = self._score(active, row, position)

        measures = torch.zeros(candidates.shape, dtype=value.dtype, device=value.device).index_put(
            (row, position), value
        )
        count = self.schedule[self.taken_in_block[active].clamp(max=len(self.schedule) - 1)]
        kept = reveal(measures, candidates, count, config.confidence_threshold)[row, position]
        row, position = active[row[kept]], position[kept]
        self.tokens[row, position] = token[kept]
        self.logps[row, position] = logp[kept]
        self.unmask_step[row, position] = self.taken[row]
        self.taken[active] += 1
        self.taken_in_block[active] += 1
        self._next_block(active)

    def _next_block(self, active: Tensor) -> None:
        """Move the rows whose block is complete to the next one, or finish them."""
        config = self.config
        complete = (self.unmask_step[active] >= 0).sum(dim=1) == (self.block[active] + 1) * config.block_length
        done = active[complete]
        self.block[done] += 1
        self.taken_in_block[done] = 0
        finished = self.block[done] * config.block_length == config.max_new_tokens
        if config.stop_at_eos and self.eos:
            # Blocks before this one are complete, so nothing before the EOS is masked.
            eos = torch.tensor(list(self.eos), device=done.device)
            finished |= (torch.isin(self.tokens[done], eos) & (self.unmask_step[done] >= 0)).any(dim=1)
        self.active[done[finished]] = False

    def _score(self, rows: Tensor, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run `rows`; draw a token at each (row, position) and return tokens, log-probs and measures, (n,) each."""
        config, spec = self.config, self.spec
        prompt = self.prompt_ids[rows]
        ids = torch.cat([prompt, self.tokens[rows]], dim=1)
        guided = config.cfg_scale > 0
        if guided:  # the unconditional branch has its prompt masked, as in LLaDA
            masked = prompt.masked_fill(self.prompt_mask[rows], spec.mask_token_id)
            ids = torch.cat([ids, torch.cat([masked, self.tokens[rows]], dim=1)])
        repeat = 2 if guided else 1
        width, pattern = ids.shape[1], Attention.padding(self.valid[rows].repeat(repeat, 1))
        model = unwrap(self.model)
        inputs = {
            "input_ids": ids,
            "attention_mask": attention_mask(pattern, model.config._attn_implementation, model.dtype),
            "position_ids": self.position_ids[rows].repeat(repeat, 1),
        }
        head_rows = row * width + prompt.shape[1] + position - spec.logits_shift
        seed, step = self.seeds[rows[row]], self.taken[rows[row]]
        draws = torch.stack(
            [uniform(seed, purpose, step, position) for purpose in (Purpose.TOKEN, Purpose.ORDER)], dim=1
        )
        if guided:  # each result is reduced from the conditional row and its unconditional twin
            head_rows = torch.stack([head_rows, head_rows + len(rows) * width], dim=1)

        def reduce(logits: Tensor, draw: Tensor) -> Tensor:
            if guided:
                logits = logits[:, 1] + (config.cfg_scale + 1) * (logits[:, 0] - logits[:, 1])
            plain = log_probs(logits, spec.mask_token_id)
            tempered = log_probs(logits, spec.mask_token_id, config.temperature)
            token = plain.argmax(dim=-1) if config.temperature == 0 else draw_tokens(tempered, draw[:, 0])
            logp = tempered.gather(1, token[:, None]).squeeze(1)
            # float64 holds token ids and float32 log-probs exactly.
            return torch.stack(
                [token.double(), logp.double(), measure(config.remasking, plain, token, draw[:, 1]).double()], dim=1
            )

        out = apply_head(self.model, inputs, head_rows, reduce, draws)
        self.num_forwards += 1
        self.flops += self.count_flops(len(ids), width, width, head_rows.numel())
        return out[:, 0].long(), out[:, 1].to(self.logps.dtype), out[:, 2]

    def rollout(self) -> Rollout:
        return Rollout(
            prompt_ids=self.prompt_ids,
            prompt_mask=self.prompt_mask,
            completion_ids=self.tokens,
            unmask_step=self.unmask_step,
            logps=self.logps,
            counted=count_until_eos(self.tokens, self.unmask_step, self.eos),
            view_seed=self.seeds,
            mask_token_id=self.spec.mask_token_id,
            temperature=self.config.temperature,
            num_forwards=self.num_forwards,
            flops=self.flops,
        )
