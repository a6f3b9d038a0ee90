"""Masked diffusion decoding (docs/methods.md §3.1): blocks left to right, a few tokens kept a step.

In each step the model sees the prompt and the whole canvas, a token is drawn for every masked position of the row's
current block, and some of them are kept. Rows do not wait for each other: each has its own block and step, so what a
row draws does not depend on the batch that it is in, and a finished row leaves the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..blocks import Blocks
from ..models import Attention, ForwardFlops, Layout, apply_head, log_probs, restrict, unwrap, view_inputs
from ..noise import Purpose, uniform
from ..rollout import Rollout, count_until_eos, widen
from .order import choose, draw_tokens, measure, named, truncate


def default_eos(model: nn.Module) -> tuple[int, ...]:
    """The end-of-sequence ids that a model names, in its generation config or its config."""
    model = unwrap(model)
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = model.config.get_text_config().eos_token_id if ids is None else ids
    return () if ids is None else tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)


class Denoising:
    """The canvas of a batch while it is decoded."""

    def __init__(self, model, prompt_ids, prompt_mask, config, seeds, spec):
        self.model, self.config, self.spec, self.seeds = model, config, spec, seeds
        self.prompt_ids, self.prompt_mask = prompt_ids, prompt_mask
        self.eos = config.eos_token_ids if config.eos_token_ids is not None else default_eos(model)
        rows, canvas_length, device = prompt_ids.shape[0], config.max_new_tokens, prompt_ids.device
        self.tokens = torch.full((rows, canvas_length), spec.mask_token_id, dtype=torch.int64, device=device)
        self.unmask_step = torch.full((rows, canvas_length), -1, dtype=torch.int64, device=device)
        self.logps = torch.zeros(
            rows, canvas_length, dtype=torch.promote_types(unwrap(model).dtype, torch.float32), device=device
        )
        # A greedy draw takes the most probable token, which no truncation leaves out.
        truncated = config.truncates and config.temperature > 0
        self.support = (
            torch.full((rows, canvas_length, 1), -1, dtype=torch.int32, device=device) if truncated else None
        )
        self.block = torch.zeros(rows, dtype=torch.int64, device=device)  # the row's current block
        self.taken = torch.zeros(rows, dtype=torch.int64, device=device)  # steps taken by the row
        self.taken_in_block = torch.zeros(rows, dtype=torch.int64, device=device)
        self.active = torch.ones(rows, dtype=torch.bool, device=device)
        blocks = config.blocks(spec)
        if blocks is None:
            blocks = Blocks(config.block_length, "canvas")
        number = blocks.number(prompt_mask, canvas_length)
        self.column_block = number  # the block of each column of prompt ⊕ canvas, -1 for padding
        self.first_block = number[:, -canvas_length]
        self.block_of = number[:, -canvas_length:] - self.first_block[:, None]  # of each position, from 0
        self.schedule = torch.tensor(config.schedule if config.confidence_threshold is None else [1], device=device)
        prompt_length = prompt_mask.sum(dim=1, keepdim=True)
        canvas_position = prompt_length + torch.arange(canvas_length, device=device)
        self.position_ids = torch.cat([(prompt_mask.long().cumsum(1) - 1).clamp(min=0), canvas_position], dim=1)
        self.valid = torch.cat([prompt_mask, torch.ones_like(self.tokens, dtype=torch.bool)], dim=1)
        self.count_flops = ForwardFlops(model)
        self.num_forwards = self.flops = 0

    def start(self, still_running: Callable[[bool], bool]) -> None:
        """What is run before the first step, on every process if on one."""

    def spare_forward(self) -> None:
        """A forward for the company of other processes, which are still decoding; this one may have no rows at all."""
        ids = self.seeds.new_full((1, self.position_ids.shape[1]), self.spec.mask_token_id)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        inputs = view_inputs(self.model, Layout(ids, positions, Attention.padding(torch.ones_like(ids))))
        self.num_forwards += 1
        self.flops += self.count_flops(1, ids.shape[1], ids.shape[1], 0)
        apply_head(self.model, inputs, ids.new_zeros(0), lambda logits: logits[:, :1])

    def step(self) -> None:
        """One forward of the rows that are still decoding, and the tokens that it reveals."""
        config, active = self.config, self.next_rows()
        if len(active) == 0:
            return self.spare_forward()
        in_block = self.block_of[active] == self.block[active, None]
        candidates = in_block & (self.unmask_step[active] < 0)
        row, position = candidates.nonzero(as_tuple=True)
        token, logp, value, support = self._draw(active, row, position)

        measures = torch.zeros(candidates.shape, dtype=value.dtype, device=value.device).index_put(
            (row, position), value
        )
        count = self.schedule[self.taken_in_block[active].clamp(max=len(self.schedule) - 1)]
        kept = choose(measures, candidates, count, config.confidence_threshold)[row, position]
        row, position = active[row[kept]], position[kept]
        self.tokens[row, position] = token[kept]
        self.logps[row, position] = logp[kept]
        self.unmask_step[row, position] = self.taken[row]
        if self.support is not None and support is not None:
            self.support, support = widen([self.support, support[kept]])
            self.support[row, position] = support
        self.on_reveal(row, position)
        self.taken[active] += 1
        self.taken_in_block[active] += 1
        self._next_block(active)

    def next_rows(self) -> Tensor:
        """The rows of the next forward, int64 (n,): those that are still decoding."""
        return self.active.nonzero().squeeze(1)

    def _next_block(self, active: Tensor) -> None:
        """Move the rows whose block is complete to the next one, or finish them."""
        config = self.config
        complete = ((self.unmask_step[active] >= 0) | (self.block_of[active] > self.block[active, None])).all(dim=1)
        done = active[complete]
        self.block[done] += 1
        self.taken_in_block[done] = 0
        finished = self.block[done] > self.block_of[done, -1]
        if config.stop_at_eos and self.eos:
            # Blocks before this one are complete, so nothing before the EOS is masked.
            eos = torch.tensor(list(self.eos), device=done.device)
            finished |= (torch.isin(self.tokens[done], eos) & (self.unmask_step[done] >= 0)).any(dim=1)
        self.active[done[finished]] = False

    def attention(self, rows: Tensor) -> Attention:
        """Which columns of prompt ⊕ canvas each row of it attends to."""
        valid = self.valid[rows]
        if self.config.future_blocks == "absent":
            width = self.prompt_ids.shape[1]
            valid[:, width:] &= self.block_of[rows] <= self.block[rows, None]
        return Attention.padding(valid)

    def forward(self, rows: Tensor, row: Tensor, position: Tensor, reduce: Callable, *args: Tensor) -> Tensor:
        """Run `rows` and reduce the logits that predict each (rows[row], position), (n, C)."""
        prompt, tokens, spec = self.prompt_ids[rows], self.tokens[rows], self.spec
        ids, pattern, positions = torch.cat([prompt, tokens], dim=1), self.attention(rows), self.position_ids[rows]
        width = ids.shape[1]
        if self.config.future_blocks == "absent":  # what no row has yet
            width = prompt.shape[1] + int((self.block_of[rows] <= self.block[rows, None]).sum(dim=1).max())
            tokens, ids, positions = tokens[:, : width - prompt.shape[1]], ids[:, :width], positions[:, :width]
            pattern = pattern.map(lambda part: part[:, :width])
        head_rows = row * width + prompt.shape[1] + position - spec.logits_shift
        if self.config.cfg_scale > 0:
            # The unconditional twin of each row has its prompt masked, as in LLaDA; both are reduced together.
            masked = prompt.masked_fill(self.prompt_mask[rows], spec.mask_token_id)
            ids = torch.cat([ids, torch.cat([masked, tokens], dim=1)])
            pattern, positions = pattern.map(lambda part: part.repeat(2, 1)), positions.repeat(2, 1)
            head_rows = torch.stack([head_rows, head_rows + len(rows) * width], dim=1)
        inputs = view_inputs(self.model, Layout(ids, positions, pattern))
        self.num_forwards += 1
        self.flops += self.count_flops(len(ids), width, width, len(head_rows), together=len(ids) // len(rows))
        return apply_head(self.model, inputs, head_rows, reduce, *args)

    def on_reveal(self, row: Tensor, position: Tensor) -> None:
        """Called with the positions that a step has revealed."""

    def _draw(self, rows: Tensor, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Draw a token at each (rows[row], position): tokens, their log-probs and their measures, (n,) each.

        And, under truncation, the tokens that could have been drawn, (n, K).
        """
        config, mask_token_id = self.config, self.spec.mask_token_id
        seed, step = self.seeds[rows[row]], self.taken[rows[row]]
        supports: list[Tensor] = []  # of the head's tiles, in their order
        draws = [uniform(seed, purpose, step, position) for purpose in (Purpose.TOKEN, Purpose.ORDER)]

        def reduce(logits: Tensor, draw: Tensor) -> Tensor:
            if config.cfg_scale > 0:
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                logits = logits[:, 1] + (config.cfg_scale + 1) * (logits[:, 0] - logits[:, 1])
            plain = log_probs(logits, mask_token_id)
            tempered = log_probs(logits, mask_token_id, config.temperature)
            if self.support is not None:
                supports.append(named(truncate(tempered, config.top_k, config.top_p, config.min_p)))
                among = restrict(tempered, supports[-1])
                choice = draw_tokens(among, draw[:, 0])[:, None]
                token, logp = (x.gather(1, choice).squeeze(1) for x in (supports[-1].long(), among))
            else:
                token = plain.argmax(dim=-1) if config.temperature == 0 else draw_tokens(tempered, draw[:, 0])
                logp = tempered.gather(1, token[:, None]).squeeze(1)
            # float64 holds token ids and float32 log-probs exactly.
            return torch.stack(
                [token.double(), logp.double(), measure(config.remasking, plain, token, draw[:, 1]).double()], dim=1
            )

        out = self.forward(rows, row, position, reduce, torch.stack(draws, dim=1))
        support = None
        if supports:  # without the rows that fill up the last tile, which may name everything
            support = torch.cat(widen(supports))[: len(out)]
            support = support[:, : int((support >= 0).sum(dim=1).max())]
        return out[:, 0].long(), out[:, 1].to(self.logps.dtype), out[:, 2], support

    def rollout(self) -> Rollout:
        return Rollout(
            prompt_ids=self.prompt_ids,
            prompt_mask=self.prompt_mask,
            completion_ids=self.tokens,
            unmask_step=self.unmask_step,
            logps=self.logps,
            counted=count_until_eos(self.tokens, self.unmask_step, self.eos),
            view_seed=self.seeds,
            **self.config.facts(self.spec),
            num_forwards=self.num_forwards,
            flops=self.flops,
            support=self.support,
        )
