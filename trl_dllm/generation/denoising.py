"""Masked diffusion decoding (docs/methods.md §3.1): blocks left to right, a few tokens kept a step.

In each step the model sees the prompt and the whole canvas, a token is drawn for every masked position of the row's
current block, and some of them are kept. Rows do not wait for each other: each has its own block and step, so what a
row draws does not depend on the batch that it is in; a finished row leaves it, and a waiting one takes its place.

How many positions of a row are masked is known on the host (`left`), so that a step does not wait for the device. One
small table is read back in a step where what was drawn decides: under a confidence threshold how many tokens are kept,
under `stop_at_eos` whether a complete block holds an EOS. A truncated draw also asks how many tokens it is among.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..blocks import Blocks
from ..models import Attention, ForwardFlops, Layout, apply_head, log_probs, restrict, unwrap, view_inputs
from ..noise import Purpose, uniform
from ..rollout import Rollout, count_until_eos, widen
from .order import OF_PROBABILITIES, choose, draw_tokens, measure, named, truncate, which


_CACHED = 2**17  # logits


def default_eos(model: nn.Module) -> tuple[int, ...]:
    """The end-of-sequence ids that a model names, in its generation config or its config."""
    model = unwrap(model)
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = model.config.get_text_config().eos_token_id if ids is None else ids
    return () if ids is None else tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)


class Denoising:
    """The canvases of a call while they are decoded, at most `limit` of them at a time; None takes all."""

    def __init__(self, model, prompt_ids, prompt_mask, config, seeds, spec, limit: int | None = None):
        self.model, self.config, self.spec, self.seeds = model, config, spec, seeds
        self.prompt_ids, self.prompt_mask = prompt_ids, prompt_mask
        self.stop: Callable[[list[int]], bool] | None = None  # whether a row's finished blocks end its completion
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
        blocks = config.blocks(spec)
        blocks = Blocks(config.block_length, "canvas") if blocks is None else blocks
        number = blocks.number(prompt_mask, canvas_length)
        self.column_block = number  # the block of each column of prompt ⊕ canvas, -1 for padding
        self.first_block = number[:, -canvas_length]
        # Positions that a row's first block lacks, where the prompt's last tokens stand in it.
        prompt_length = prompt_mask.sum(dim=1)
        self.lead = (prompt_length + blocks.offset(prompt_length)) % blocks.size
        self.leads: list[int] = self.lead.tolist()
        # Tokens that a step reveals by the schedule, by the positions of the block and those masked before the step.
        size = config.block_length
        self.reveals = [[0] * (size + 1) for _ in range(size + 1)]
        for length in range(1, size + 1) if any(self.leads) else (size,):
            masked = length
            for count in config.schedule if config.confidence_threshold is None else ():
                self.reveals[length][masked] = min(count, masked)
                masked -= min(count, masked)
        self._reveals = torch.tensor(self.reveals, device=device)
        self._eos = torch.tensor(list(self.eos), dtype=torch.int64, device=device)
        # On the host: who is decoded and who waits for it, each row's masked positions, and what it revealed last.
        self.limit, self.active, self.waiting = limit or rows, list[int](), list(reversed(range(rows)))
        self.left, self.last = [canvas_length] * rows, [0] * rows
        self.running: list[int] = []  # rows of the step's forward
        self._on_device: tuple[list[int], Tensor] = ([], self.block[:0])
        canvas_position = prompt_length[:, None] + torch.arange(canvas_length, device=device)
        self.position_ids = torch.cat([(prompt_mask.long().cumsum(1) - 1).clamp(min=0), canvas_position], dim=1)
        self.valid = number >= 0
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

    @property
    def unfinished(self) -> bool:
        """Whether there is a row that is decoded or waits for it."""
        return bool(self.active or self.waiting)

    def admit(self) -> None:
        """Let waiting rows take the places of those that have finished."""
        while self.waiting and len(self.active) < self.limit:
            self.active.append(self.waiting.pop())

    def next_rows(self) -> list[int]:
        """The rows of the next forward: those that are decoded."""
        return self.active

    def step(self) -> None:
        """One forward of rows that are still decoding, and the tokens that it reveals."""
        self.admit()
        self.running = list(self.next_rows())
        if not self.running:
            return self.spare_forward()
        config, active = self.config, self.on_device(self.running)
        columns = self.block[active, None] * config.block_length - self.lead[active, None]
        columns = columns + self._arange(config.block_length)
        inside = (columns >= 0) & (columns < config.max_new_tokens)
        columns = columns.clamp(0, config.max_new_tokens - 1)
        candidates = inside & (self.unmask_step[active[:, None], columns] < 0)  # (rows, block)
        masked = [self.masked_in_block(row) for row in self.running]
        flat = which(candidates.flatten(), sum(masked))
        row, place = flat // config.block_length, flat % config.block_length
        position = columns[row, place]
        token, logp, value, support = self._draw(active, row, position)

        measures = torch.zeros(candidates.shape, dtype=value.dtype, device=value.device).index_put((row, place), value)
        reveals = self._reveals[inside.sum(dim=1), candidates.sum(dim=1)]
        kept = choose(measures, candidates, reveals, config.confidence_threshold)
        counts = [self.reveals[self.block_bounds(row)[1]][n] for row, n in zip(self.running, masked, strict=True)]
        ended = [False] * len(masked)
        stops = bool(config.stop_at_eos and self.eos)
        if config.confidence_threshold is not None or (stops and any(map(int.__eq__, counts, masked))):
            tokens = self.tokens[active[:, None], columns].index_put((row, place), token)
            eos = (tokens[..., None] == self._eos).any(dim=-1) & (kept | ~candidates) & inside
            counts, ended = torch.stack([kept.sum(dim=1), eos.any(dim=1)]).tolist()
        chosen = which(kept[row, place], sum(counts))
        row, position = active[row[chosen]], position[chosen]
        self.tokens[row, position] = token[chosen]
        self.logps[row, position] = logp[chosen]
        self.unmask_step[row, position] = self.taken[row]
        if self.support is not None and support is not None:
            self.support, support = widen([self.support, support[chosen]])
            self.support[row, position] = support
        self.on_reveal(row, position)
        self.taken[active] += 1
        revealed = (self.unmask_step[active] >= 0).sum(dim=1)
        self.block[active] = (revealed + self.lead[active]) // config.block_length
        for number, before, count, end in zip(self.running, masked, counts, ended, strict=True):
            self.left[number] -= count
            self.last[number] = count
            # Earlier blocks hold no EOS, or the row would have stopped behind them.
            if before == count and (self.left[number] == 0 or (stops and end) or self._stops(number)):
                self.active.remove(number)

    def _stops(self, row: int) -> bool:
        """Whether `stop` finds the end in a row whose current block is complete."""
        return self.stop is not None and self.stop(self.tokens[row, : len(self.tokens[row]) - self.left[row]].tolist())

    def block_bounds(self, row: int) -> tuple[int, int]:
        """First position of a row's current block, and its number of positions."""
        size, canvas_length = self.config.block_length, self.config.max_new_tokens
        start = (canvas_length - self.left[row] + self.leads[row]) // size * size - self.leads[row]
        return max(start, 0), min(start + size, canvas_length) - max(start, 0)

    def masked_in_block(self, row: int) -> int:
        """Masked positions of a row's current block."""
        start, length = self.block_bounds(row)
        return start + length - (self.config.max_new_tokens - self.left[row])

    def on_device(self, rows: list[int]) -> Tensor:
        """Row numbers on the device, int64 (n,), copied when they change and without waiting for it."""
        if rows != self._on_device[0]:
            device = self.tokens.device
            index = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=device.type == "cuda")
            self._on_device = (list(rows), index)
        return self._on_device[1]

    def _arange(self, size: int) -> Tensor:
        return torch.arange(size, device=self.tokens.device)

    def attention(self, rows: Tensor) -> Attention:
        """Which columns of prompt ⊕ canvas each row of it attends to."""
        valid = self.valid[rows]
        if self.config.future_blocks == "absent":
            block = self.column_block[rows] - self.first_block[rows, None]
            valid = valid & (block <= self.block[rows, None])
        return Attention.padding(valid)

    def forward(self, rows: Tensor, row: Tensor, position: Tensor, reduce: Callable, *args: Tensor) -> Tensor:
        """Run `rows` and reduce the logits that predict each (rows[row], position), (n, C)."""
        prompt, tokens, spec = self.prompt_ids[rows], self.tokens[rows], self.spec
        ids, pattern, positions = torch.cat([prompt, tokens], dim=1), self.attention(rows), self.position_ids[rows]
        width = ids.shape[1]
        if self.config.future_blocks == "absent":  # what no row has yet
            width = prompt.shape[1] + max(sum(self.block_bounds(number)) for number in self.running)
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
        wanted = {Purpose.TOKEN: config.temperature > 0, Purpose.ORDER: config.remasking == "random"}
        draws = [
            uniform(seed, purpose, step, position) if used else torch.zeros_like(seed, dtype=torch.float64)
            for purpose, used in wanted.items()
        ]

        def reduce(logits: Tensor, draw: Tensor) -> Tensor:
            # A CPU takes a few rows at a time, whose tables stay in its cache.
            size = max(1, _CACHED // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
            return torch.cat([drawn(*part) for part in zip(logits.split(size), draw.split(size), strict=True)])

        def drawn(logits: Tensor, draw: Tensor) -> Tensor:
            if config.cfg_scale > 0:
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                logits = logits[:, 1] + (config.cfg_scale + 1) * (logits[:, 0] - logits[:, 1])
            plain = tempered = log_probs(logits, mask_token_id, config.temperature)
            if config.temperature not in (0, 1) and config.remasking in OF_PROBABILITIES:
                plain = log_probs(logits, mask_token_id)
            if self.support is not None:
                supports.append(named(truncate(tempered, config.top_k, config.top_p, config.min_p)))
                among = restrict(tempered, supports[-1])
                choice = draw_tokens(among, draw[:, 0])[:, None]
                token, logp = (x.gather(1, choice).squeeze(1) for x in (supports[-1].long(), among))
            else:
                token = tempered.argmax(dim=-1) if config.temperature == 0 else draw_tokens(tempered, draw[:, 0])
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
