"""How a canvas is decoded."""

from dataclasses import dataclass

from .order import MEASURES, VALUE_INDEPENDENT


# decoding -> the key/value caches that it has.
CACHES = {"denoising": (None,), "any_order": (None, "exact")}


@dataclass
class DiffusionGenerationConfig:
    """Settings of `generate`.

    Args:
        max_new_tokens (`int`): canvas length L, in tokens.
        block_length (`int`, *optional*): positions a block; blocks are decoded left to right. None takes the largest
            divisor of the canvas up to 32.
        diffusion_steps (`int`, *optional*): decoding steps for the whole canvas, spread evenly over the blocks. None
            takes half the canvas (two tokens a step), or what `tokens_per_step` says.
        tokens_per_step (`int`, *optional*): tokens revealed a step; another way to give `diffusion_steps`.
        temperature (`float`): of the categorical draw; 0 takes the most probable token.
        remasking (`str`): which drawn tokens are kept: "low_confidence" (un-tempered probability of the drawn token),
            "margin" (top-1 minus top-2), "entropy", "random" or "left_to_right". With "low_confidence" the choice
            depends on the values just drawn, so the product of the values' probabilities is not a normalised
            trajectory probability; under the others it is.
        confidence_threshold (`float`, *optional*): keep every position whose measure is above it, and at least one
            (Fast-dLLM), instead of the even schedule; `diffusion_steps` then plays no part.
        stop_at_eos (`bool`): at the end of a block, a row with a revealed EOS is finished and its later blocks stay
            masked.
        decoding (`str`): "denoising" (the plain bidirectional model).
        cache (`str`, *optional*): None.
        cfg_scale (`float`): classifier-free guidance as in LLaDA, w in u + (w + 1)(c - u); doubles the rows.
        eos_token_ids (`tuple[int, ...]`, *optional*): tokens that end a completion; None takes the model's.
        pad_token_id (`int`, *optional*): carried for callers that pad; the canvas itself is never padded.

    Raises:
        ValueError: a value out of range, or a `block_length` or number of steps that does not divide.
    """

    max_new_tokens: int = 256
    block_length: int | None = None
    diffusion_steps: int | None = None
    temperature: float = 1.0
    remasking: str = "low_confidence"
    confidence_threshold: float | None = None
    tokens_per_step: int | None = None
    stop_at_eos: bool = True
    decoding: str = "denoising"
    cache: str | None = None
    cfg_scale: float = 0.0
    eos_token_ids: tuple[int, ...] | list[int] | int | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        canvas_length = self.max_new_tokens
        if canvas_length < 1:
            raise ValueError(f"max_new_tokens={canvas_length} must be at least 1.")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative (0 is greedy).")
        if self.remasking not in MEASURES:
            raise ValueError(f"remasking={self.remasking!r} is unknown; choose one of {sorted(MEASURES)}.")
        if self.decoding not in CACHES:
            raise ValueError(f"decoding={self.decoding!r} is unknown; choose one of {sorted(CACHES)}.")
        if self.cache not in CACHES[self.decoding]:
            raise ValueError(
                f"cache={self.cache!r} is not available for decoding={self.decoding!r}; choose one of "
                f"{CACHES[self.decoding]}."
            )
        if self.cfg_scale and self.decoding != "denoising":
            raise ValueError(f"cfg_scale={self.cfg_scale} needs decoding='denoising'; set it to 0.")
        if self.cfg_scale < 0:
            raise ValueError(f"cfg_scale={self.cfg_scale} must not be negative (0 turns guidance off).")
        if self.confidence_threshold is not None and self.remasking == "left_to_right":
            raise ValueError(
                f"confidence_threshold={self.confidence_threshold} has no measure to compare with under "
                "remasking='left_to_right'; choose 'low_confidence', 'margin', 'entropy' or 'random'."
            )
        if isinstance(self.eos_token_ids, int):
            self.eos_token_ids = (self.eos_token_ids,)
        self.block_length, self.diffusion_steps = resolve_schedule(
            canvas_length,
            self.block_length,
            self.diffusion_steps,
            self.tokens_per_step,
            self.confidence_threshold is None,
        )

    @property
    def steps_per_block(self) -> int:
        """Decoding steps that the even schedule gives a block."""
        return self.diffusion_steps * self.block_length // self.max_new_tokens

    @property
    def schedule(self) -> list[int]:
        """Tokens revealed at each step of a block: even, the remainder to the first steps."""
        each, remainder = divmod(self.block_length, self.steps_per_block)
        return [each + (step < remainder) for step in range(self.steps_per_block)]

    @property
    def value_independent(self) -> bool:
        """Whether the order ignores the values just drawn, so that value probabilities multiply to a trajectory's."""
        return self.remasking in VALUE_INDEPENDENT


def resolve_schedule(
    canvas_length: int,
    block_length: int | None,
    diffusion_steps: int | None,
    tokens_per_step: int | None,
    even_schedule: bool = True,
    canvas_name: str = "max_new_tokens",
) -> tuple[int, int]:
    """Fill in block length and steps, and check that everything divides; returns `(block_length, diffusion_steps)`."""
    if block_length is None:
        block_length = _largest_divisor(canvas_length, 32)
    elif block_length < 1 or canvas_length % block_length:
        raise ValueError(
            f"block_length={block_length} does not divide {canvas_name}={canvas_length}; choose a divisor of "
            f"{canvas_length}, e.g. {_largest_divisor(canvas_length, block_length)}."
        )
    if tokens_per_step is not None:
        if diffusion_steps is not None:
            raise ValueError(
                f"tokens_per_step={tokens_per_step} and diffusion_steps={diffusion_steps} say the same thing twice; "
                "set one."
            )
        if tokens_per_step < 1 or block_length % tokens_per_step:
            raise ValueError(
                f"tokens_per_step={tokens_per_step} does not divide block_length={block_length}; choose a divisor of "
                f"{block_length}."
            )
        return block_length, canvas_length // tokens_per_step
    blocks = canvas_length // block_length
    if diffusion_steps is None:
        # Half the canvas, rounded so that each block gets the same number of steps.
        return block_length, blocks * max(1, block_length // 2)
    if even_schedule and (diffusion_steps % blocks or not blocks <= diffusion_steps <= canvas_length):
        raise ValueError(
            f"diffusion_steps={diffusion_steps} cannot be spread evenly over {blocks} blocks of {block_length} "
            f"({canvas_name}={canvas_length}); choose a multiple of {blocks} between {blocks} and {canvas_length}."
        )
    return block_length, diffusion_steps


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`, at least 1."""
    return max(size for size in range(1, max(1, min(number, limit)) + 1) if number % size == 0)
