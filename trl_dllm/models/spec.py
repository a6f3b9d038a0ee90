"""What a masked diffusion language model must tell the sampler and the scorers, read from any model and tokenizer."""

from dataclasses import dataclass

from torch import nn

from ..blocks import Blocks
from .head import unwrap


_TRANSFORMED_LOGITS = {
    # The head is called tile by tile inside the model's forward; a function of the logits behind it would act on
    # log-probs.
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "output_multiplier": 1.0,
}

# What a config says of it, under the same names.
FACTS = ("mask_token_id", "logits_shift", "block_size", "block_alignment")


@dataclass(frozen=True)
class MaskedDiffusionSpec:
    """The facts that make a transformers decoder a masked diffusion model.

    Args:
        mask_token_id (`int`): id of the mask token.
        logits_shift (`int`): 0 if the row at a position predicts that position (LLaDA), 1 if the row before it does
            (Dream, which kept the shift of the autoregressive model it came from).
        block_size (`int`, *optional*): positions of a block of a block-causal model (SDAR, LLaDA2), in which a
            position sees its own block and those before it; None if every position sees every other.
        block_alignment (`str`): where its blocks begin, see `Blocks`.
    """

    mask_token_id: int
    logits_shift: int = 0
    block_size: int | None = None
    block_alignment: str = "position"

    def __post_init__(self):
        if self.logits_shift not in (0, 1):
            raise ValueError(f"logits_shift={self.logits_shift} is not known; it must be 0 (LLaDA) or 1 (Dream).")
        if self.blocks is not None and self.logits_shift:
            raise ValueError(
                f"logits_shift={self.logits_shift} with block_size={self.block_size}: no family has both, and the row "
                "that predicts a block's first position would stand in another block. Set config.block_size = None if "
                "this checkpoint has full attention."
            )

    @property
    def blocks(self) -> Blocks | None:
        """The blocks of a block-causal model."""
        return None if self.block_size is None else Blocks(self.block_size, self.block_alignment)

    @classmethod
    def from_model(cls, model: nn.Module, tokenizer=None) -> "MaskedDiffusionSpec":
        """Read the spec from a model's config, and check it against a tokenizer if one is given."""
        return cls.from_config(unwrap(model).config, tokenizer)

    @classmethod
    def from_config(cls, config, tokenizer=None) -> "MaskedDiffusionSpec":
        """Read the spec from a config, before any weight is loaded.

        The mask id is the config's `mask_token_id`, else the tokenizer's.

        Raises:
            NotImplementedError: DiffusionGemma, whose noise is uniform: it has no mask token.
            ValueError: an autoregressive model, no mask token, a tokenizer whose mask token is another one, or an
                architecture that transforms its logits behind the head.
        """
        if config.model_type.startswith("diffusion_gemma"):
            raise NotImplementedError(
                f"model_type={config.model_type!r} is a uniform-noise diffusion model: it has no mask token, a token "
                "may change many times, and no estimator here applies. Use a masked diffusion model (LLaDA, Dream, …)."
            )
        text_config = config.get_text_config()
        tokenizer_id = getattr(tokenizer, "mask_token_id", None)
        config_id = getattr(text_config, "mask_token_id", None)
        mask_token_id = tokenizer_id if config_id is None else config_id
        if getattr(text_config, "is_causal", True):
            raise ValueError(
                f"model_type={config.model_type!r} with is_causal={getattr(text_config, 'is_causal', None)!r} is an "
                "autoregressive model. Masked diffusion needs bidirectional attention: name a diffusion model (LLaDA, "
                "Dream, …) or, for a stock decoder trained as one, set config.is_causal = False and "
                "config.mask_token_id."
            )
        if mask_token_id is None:
            raise ValueError(
                f"mask_token_id is missing: neither the config of this {config.model_type!r} model nor its tokenizer "
                "names a mask token. Set config.mask_token_id to the id that the model was trained with."
            )
        if tokenizer_id is not None and tokenizer_id != mask_token_id:
            raise ValueError(
                f"mask_token_id={mask_token_id} in the model's config, but the tokenizer's mask token has id "
                f"{tokenizer_id}. Use the checkpoint's own tokenizer, or set config.mask_token_id to the right one."
            )
        if not 0 <= mask_token_id < text_config.vocab_size:
            raise ValueError(
                f"mask_token_id={mask_token_id} is outside the model's vocabulary of {text_config.vocab_size} tokens; "
                "resize the embeddings or name the right token."
            )
        for name, neutral in _TRANSFORMED_LOGITS.items():
            if getattr(text_config, name, None) not in (None, neutral):
                raise ValueError(
                    f"{name}={getattr(text_config, name)} is not supported: this architecture transforms its logits "
                    "behind the head, which the tiled head would not follow."
                )
        facts = {name: getattr(text_config, name, None) for name in FACTS[1:]}
        return cls(mask_token_id, **{name: value for name, value in facts.items() if value is not None})

    def write_to(self, model: nn.Module) -> None:
        """Have a model's config name the mask token, where the tokenizer alone did.

        The model, and what is saved of it, can then be sampled from and scored without the tokenizer.
        """
        unwrap(model).config.get_text_config().mask_token_id = self.mask_token_id


def check_unshifted(name: str, logits_shift: int) -> None:
    """Raise ValueError for families in which the row before a position predicts it."""
    if logits_shift:
        raise ValueError(
            f"{name} does not apply to a family with logits_shift={logits_shift} (Dream): it predicts a position at "
            "the row before it, and in the layout prompt ⊕ tokens ⊕ masks no row predicts token i from the tokens "
            "before it alone. Use step_merge or exact_trajectory, or an unshifted family (LLaDA)."
        )


def check_positions(config, prompt: int, canvas: int, canvas_name: str, where: str = "") -> None:
    """Raise ValueError where `prompt` and `canvas` tokens are more than the positions that a model was made for.

    Args:
        config: of the model; one without `max_position_embeddings` takes any length.
        prompt (`int`): tokens of the prompt.
        canvas (`int`): tokens of the canvas.
        canvas_name (`str`): the setting that says so.
        where (`str`): which prompt, for the message.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt + canvas > limit:
        raise ValueError(
            f"{where}{prompt} prompt tokens and {canvas_name}={canvas} are beyond the model's "
            f"max_position_embeddings={limit}. Shorten the prompt or lower {canvas_name}."
        )


def check_full_attention(name: str, block_size: int | None, remedy: str) -> None:
    """Raise ValueError for block-causal models."""
    if block_size is not None:
        raise ValueError(
            f"{name} does not apply to a block-causal model, and this one has block_size={block_size}: a position of "
            f"such a model sees its own block and those before it. {remedy}; if this checkpoint has full attention, "
            "set config.block_size = None."
        )
