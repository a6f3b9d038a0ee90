"""Dream (7B Base and Instruct, Dream-Coder, DiffuCoder): Qwen2 with bidirectional attention and shifted logits.

Key and config names are Qwen2's own, so nothing is renamed. The row before a position predicts it, a shift that Dream
kept from the autoregressive model it was initialised from; the first completion token therefore needs a prompt token
before it.
"""

from transformers import Qwen2Config, Qwen2ForCausalLM


class DreamConfig(Qwen2Config):
    """Config of Dream.

    Args:
        mask_token_id (`int`, defaults to 151666): id of the mask token.
        logits_shift (`int`, defaults to 1): the row before a position predicts it.
        is_causal (`bool`, defaults to `False`): every position attends to every other.
    """

    model_type = "Dream"

    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = 151643
    mask_token_id: int = 151666
    logits_shift: int = 1
    is_causal: bool = False

    def __post_init__(self, **kwargs):
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        # TRL reads auto_map; a folder saved here has no modelling files for it to point at.
        self.auto_map = {}

    def to_dict(self) -> dict:
        output = super().to_dict()
        output.pop("auto_map", None)
        output["rope_theta"] = output["rope_parameters"]["rope_theta"]  # where the original code looks for it
        return output


class DreamModel(Qwen2ForCausalLM):
    """Dream: the row before a position predicts that position."""

    config_class = DreamConfig
