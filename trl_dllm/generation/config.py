"""How a canvas is decoded. Each setting is declared here once, for the sampler, the trainer and the command line."""

from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any

from ..blocks import Blocks
from ..fields import check_fields, check_kind, document_fields
from ..models.spec import MaskedDiffusionSpec, check_full_attention, check_unshifted
from .order import MEASURES, VALUE_INDEPENDENT


# decoding -> the key/value caches that it has.
APPROXIMATE_CACHES = ("prefix", "dual")
CACHES = {"denoising": (None, "exact", *APPROXIMATE_CACHES), "any_order": (None, "exact")}


@document_fields()
@dataclass(kw_only=True)
class DecodingArguments:
    """The decoding settings that sampler, trainer and command line share.

    A new one is a field here: from it come an argument of `DiffusionGenerationConfig`, a key of recipes and of
    `DiffusionGRPOConfig`, a flag of `eval`, `generate` and `report`, and the documentation of all of them. One that
    changes what is drawn acts in `Denoising._draw`; where the scorer does not follow it, `grpo_config._REFUSED` and
    `scripts/report.py` refuse it.
    """

    block_length: int | None = field(
        default=None,
        metadata={
            "help": "Positions in a block; blocks are decoded left to right. None takes the largest divisor of the "
            "canvas up to 32."
        },
    )
    diffusion_steps: int | None = field(
        default=None,
        metadata={
            "help": "Decoding steps for the whole canvas, spread evenly over the blocks. None takes half the canvas "
            "(two tokens a step), or what tokens_per_step says."
        },
    )
    tokens_per_step: int | None = field(
        default=None, metadata={"help": "Tokens revealed a step; another way to give diffusion_steps."}
    )
    remasking: str = field(
        default="low_confidence",
        metadata={
            "help": "Which of the tokens drawn in a step are kept: 'low_confidence' (un-tempered probability of the "
            "drawn token), 'margin' (top-1 minus top-2), 'entropy', 'random' or 'left_to_right'. Under "
            "'low_confidence' the choice depends on the values drawn, so the product of their probabilities is not a "
            "normalised trajectory probability; under the others it is.",
            "choices": list(MEASURES),
        },
    )
    confidence_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Keep every position whose measure is above it, and at least one (Fast-dLLM), instead of an even "
            "schedule; diffusion_steps then plays no part."
        },
    )
    top_k: int = field(
        default=0,
        metadata={"help": "Draw among the k most probable tokens alone; 0 draws among all."},
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "Draw among the most probable tokens whose probabilities add up to this; 1 draws among all."
        },
    )
    min_p: float | None = field(
        default=None,
        metadata={
            "help": "Draw among the tokens that are at least this fraction as probable as the most probable one; None "
            "draws among all."
        },
    )
    stop_at_eos: bool = field(
        default=True,
        metadata={
            "help": "Whether a row that has revealed an EOS at the end of a block is finished, and its later blocks "
            "stay masked. The papers decode the whole canvas."
        },
    )
    decoding: str = field(
        default="denoising",
        metadata={
            "help": "How completions are drawn: 'denoising', with the plain bidirectional model, or 'any_order', with "
            "a model trained with any-order attention.",
            "choices": sorted(CACHES),
        },
    )
    cache: str | None = field(
        default=None,
        metadata={
            "help": "Key/value cache of the sampler: 'exact', for any-order decoding and block-causal models; "
            "'prefix' or 'dual' (Fast-dLLM), which are approximate: within a block the keys and values of what stands "
            "before it, and under 'dual' of what follows too, stay those of its first step. None recomputes "
            "everything.",
            "choices": sorted({cache for caches in CACHES.values() for cache in caches if cache}),
        },
    )
    future_blocks: str = field(
        default="masked",
        metadata={
            "help": "What a bidirectional model is shown of the blocks behind the current one: 'masked', the whole "
            "canvas, or 'absent', a canvas that grows block by block (iLLaDA). A block-causal model sees none of "
            "them.",
            "choices": ["masked", "absent"],
        },
    )
    cfg_scale: float = field(
        default=0.0,
        metadata={
            "help": "Classifier-free guidance as in LLaDA, w in u + (w + 1)(c - u); doubles the rows. 0 turns it off. "
            "Training refuses it, because the scorer would have to follow it."
        },
    )

    @property
    def approximate_cache(self) -> bool:
        """Whether tokens are drawn from other distributions than the model's, because of the cache."""
        return self.cache in APPROXIMATE_CACHES

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never drawn (`top_k`, `top_p`, `min_p`)."""
        return self.top_k > 0 or self.top_p < 1 or bool(self.min_p)

    def check_decoding(self, canvas_length: int, canvas_name: str) -> tuple[int, int]:
        """Check every decoding field; returns block length and steps for the canvas, filled in where they are None.

        Raises:
            ValueError: naming the field (`canvas_name` for the canvas), its value and what would be right.
        """
        # Which caches there are depends on `decoding`.
        check_fields(self, [f.name for f in fields(DecodingArguments) if f.name != "cache"])
        if self.cache not in CACHES[self.decoding]:
            raise ValueError(
                f"cache={self.cache!r} is not available for decoding={self.decoding!r}; choose one of "
                f"{CACHES[self.decoding]}."
            )
        if self.cfg_scale and self.decoding != "denoising":
            raise ValueError(f"cfg_scale={self.cfg_scale} needs decoding='denoising'; set it to 0.")
        if self.cfg_scale and self.cache is not None:
            raise ValueError(
                f"cfg_scale={self.cfg_scale} needs cache=None, got {self.cache!r}; set one of them to it."
            )
        if self.future_blocks == "absent" and (self.decoding != "denoising" or self.approximate_cache):
            raise ValueError(
                f"future_blocks='absent' needs decoding='denoising' and no approximate cache, got decoding="
                f"{self.decoding!r} and cache={self.cache!r}; set future_blocks='masked'."
            )
        if self.cfg_scale < 0:
            raise ValueError(f"cfg_scale={self.cfg_scale} must not be negative (0 turns guidance off).")
        if self.confidence_threshold is not None and self.remasking == "left_to_right":
            raise ValueError(
                f"confidence_threshold={self.confidence_threshold} has no measure to compare with under "
                "remasking='left_to_right'; choose 'low_confidence', 'margin', 'entropy' or 'random'."
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative (0 draws among all tokens).")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]; 1 draws among all tokens.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be in [0, 1], or None to draw among all tokens.")
        check_kind(canvas_name, canvas_length, int)
        if canvas_length < 1:
            raise ValueError(f"{canvas_name}={canvas_length} must be at least 1.")
        return resolve_schedule(
            canvas_length,
            self.block_length,
            self.diffusion_steps,
            self.tokens_per_step,
            self.confidence_threshold is None,
            canvas_name,
        )


@document_fields()
@dataclass
class DiffusionGenerationConfig(DecodingArguments):
    """Settings of `generate`: the canvas, the draw, and the shared decoding settings. All but the first by keyword.

    Raises:
        ValueError: a value of the wrong type or out of range, or a `block_length` or number of steps that does not
            divide; it names the field, the value and what would be right.
    """

    max_new_tokens: int = field(default=256, metadata={"help": "Canvas length L, in tokens."})
    _: KW_ONLY
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the categorical draw; 0 takes the most probable token."}
    )
    eos_token_ids: tuple[int, ...] | list[int] | int | None = field(
        default=None, metadata={"help": "Tokens that end a completion. None takes the model's."}
    )

    def __post_init__(self):
        self.block_length, self.diffusion_steps = self.check_decoding(self.max_new_tokens, "max_new_tokens")
        check_fields(self, ["temperature"])
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative (0 is greedy).")
        if self.eos_token_ids is not None:
            ids = self.eos_token_ids
            self.eos_token_ids = tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)
            for token in self.eos_token_ids:
                check_kind("eos_token_ids", token, int)

    def resized(self, canvas_length: int, block_length: int | None = None) -> "DiffusionGenerationConfig":
        """The same decoding of another canvas, or in other blocks: as many tokens a step, rounded up.

        Blocks of None stay as long as they are where they divide the canvas, and are the default ones where not.
        """
        assert self.block_length is not None and self.diffusion_steps is not None  # filled in by __post_init__
        check_kind("max_new_tokens", canvas_length, int)
        check_kind("block_length", block_length, int | None)
        if block_length is None and canvas_length % self.block_length == 0:
            block_length = self.block_length
        block_length, _ = resolve_schedule(canvas_length, block_length, None, None)
        steps = block_length * self.diffusion_steps // self.max_new_tokens
        return replace(
            self,
            max_new_tokens=canvas_length,
            block_length=block_length,
            diffusion_steps=canvas_length // block_length * min(max(steps, 1), block_length),
            tokens_per_step=None,
        )

    @property
    def steps_per_block(self) -> int:
        """Decoding steps that the even schedule gives a block."""
        assert self.block_length is not None and self.diffusion_steps is not None  # filled in by __post_init__
        return self.diffusion_steps * self.block_length // self.max_new_tokens

    @property
    def schedule(self) -> list[int]:
        """Tokens revealed at each step of a block: even, the remainder to the first steps."""
        assert self.block_length is not None
        each, remainder = divmod(self.block_length, self.steps_per_block)
        return [each + (step < remainder) for step in range(self.steps_per_block)]

    @property
    def fixed_steps(self) -> int | None:
        """T, where the schedule fixes it; None under a threshold."""
        return self.diffusion_steps if self.confidence_threshold is None else None

    def blocks(self, spec: MaskedDiffusionSpec) -> Blocks | None:
        """The blocks in which a model is shown the canvas, None where it sees all of it at once."""
        if spec.blocks is None and self.future_blocks == "absent":
            assert self.block_length is not None
            return Blocks(self.block_length, "canvas", causal=False)
        return spec.blocks

    def facts(self, spec: MaskedDiffusionSpec) -> dict[str, Any]:
        """What a `Rollout` says of its sampler, by field."""
        return {
            "mask_token_id": spec.mask_token_id,
            "temperature": self.temperature,
            # Blocks that prompts reach into are smaller, and take fewer steps.
            "steps": self.fixed_steps if spec.blocks is None else None,
            "blocks": self.blocks(spec),
        }

    def check_model(self, spec: MaskedDiffusionSpec) -> None:
        """Raise ValueError where a model cannot be decoded so."""
        if self.decoding == "any_order":
            check_unshifted("decoding='any_order'", spec.logits_shift)
            check_full_attention("decoding='any_order'", spec.block_size, "Set decoding='denoising'")
        if self.approximate_cache:
            check_full_attention(f"cache={self.cache!r}", spec.block_size, "Set cache='exact'")
        if self.decoding == "denoising" and self.cache == "exact" and spec.blocks is None:
            raise ValueError(
                "cache='exact' with decoding='denoising' needs a block-causal model, and every position of this one "
                "sees every other: what was computed changes with each token. Set cache=None, or 'prefix' or 'dual'."
            )
        if spec.blocks is not None and self.block_length != spec.block_size:
            raise ValueError(
                f"block_length={self.block_length}, and the model is block-causal with block_size={spec.block_size}: "
                f"it is decoded in its own blocks. Set block_length={spec.block_size}, or config.block_size to what "
                "it was trained with."
            )

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
    spread = diffusion_steps % blocks == 0 and blocks <= diffusion_steps <= canvas_length
    if diffusion_steps < 1 or (even_schedule and not spread):
        raise ValueError(
            f"diffusion_steps={diffusion_steps} cannot be spread evenly over {blocks} blocks of {block_length} "
            f"({canvas_name}={canvas_length}); choose a multiple of {blocks} between {blocks} and {canvas_length}."
        )
    return block_length, diffusion_steps


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`, at least 1."""
    return max(size for size in range(1, max(1, min(number, limit)) + 1) if number % size == 0)
