"""What the native classes of all families share: the Hub's names, of a config's fields and of a checkpoint's keys.

A family is a stock decoder of transformers: a config that reads the original names and writes both, and a model whose
checkpoints are renamed while loading and renamed back while saving. No remote code is run, and the original code can
read what is saved here.
"""

import copy
from typing import TYPE_CHECKING, Any, ClassVar

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


_ROPE = ("rope_theta", "partial_rotary_factor")

# As transformers registers it, for a class of models.
Conversion = list[WeightConverter | WeightRenaming]


if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _Config
    from transformers import PreTrainedModel as _Model
else:  # mixins: as a dataclass, transformers' config would bring its own defaults before the stock config's
    _Config = _Model = object


class HubConfig(_Config):
    """Stands before a stock config: a family's own field names, and what is the same in all of its checkpoints.

    Class attributes:
        hub_names (`dict[str, str]`): original name -> the stock config's name for the same thing.
        hub_fixed (`dict[str, tuple]`): original or stock name -> the values that the stock decoder computes. The first
            is written, so that the original code computes it too.
    """

    hub_names: ClassVar[dict[str, str]] = {}
    hub_fixed: ClassVar[dict[str, tuple]] = {}

    def __post_init__(self, **kwargs: Any) -> None:
        for original, name in self.hub_names.items():
            value = kwargs.pop(original, None)
            if value is not None:
                setattr(self, name, value)
        for name, accepted in self.hub_fixed.items():
            value = getattr(self, name) if hasattr(self, name) else kwargs.setdefault(name, accepted[0])
            if value not in accepted:
                raise ValueError(
                    f"{name}={value!r} in a {type(self).__name__}: this implementation has {accepted[0]!r}, as every "
                    "released checkpoint; such a one would load and compute something else."
                )
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        # TRL reads auto_map; a folder saved here has no modelling files for it to point at.
        self.auto_map: dict[str, str] = {}

    def to_dict(self) -> dict:
        output = super().to_dict()
        output.pop("auto_map", None)
        names = {original: output[name] for original, name in self.hub_names.items() if name in output}
        # RoPE's numbers too stand where the original code looks for them.
        rope = {name: output["rope_parameters"][name] for name in _ROPE if name in output["rope_parameters"]}
        return {**names, **rope, **output}


class HubKeys(_Model):
    """Stands before a stock decoder: `load_state_dict` takes the Hub's keys as well as the module's own.

    `from_pretrained` and `save_pretrained` convert by themselves. Trainer, though, resumes and loads its best model by
    `load_state_dict(strict=False)`, which would match nothing and go on with the wrong weights.

    Class attributes:
        hub_conversion (`list`): how the Hub's keys become the module's, in transformers' terms; empty if they are.
    """

    hub_conversion: ClassVar[Conversion] = []

    def __init__(self, config: Any, **unknown: Any) -> None:
        if unknown:
            raise ValueError(
                f"{', '.join(f'{name}={value!r}' for name, value in unknown.items())} (model_init_kwargs in a recipe) "
                f"is no argument of from_pretrained and no setting of {type(config).__name__}."
            )
        super().__init__(config)
        if self.hub_conversion:
            self.register_load_state_dict_pre_hook(_own_names)


def _own_names(module: Any, state_dict: dict, prefix: str, *_: Any) -> None:
    """Convert the Hub's keys of a state dict, those below `prefix`, to the module's own."""
    transforms = get_model_conversion_mapping(module, add_legacy=False)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    merged: dict[str, WeightConverter] = {}
    for key in sorted((key for key in state_dict if key.startswith(prefix)), key=dot_natural_key):
        name, pattern = rename_source_key(key[len(prefix) :], renamings, converters)
        if pattern is not None:
            converter = merged.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            converter.add_tensor(name, key, pattern, state_dict.pop(key))
        elif prefix + name != key:
            state_dict[prefix + name] = state_dict.pop(key)
    for name, converter in merged.items():
        for target, value in converter.convert(name, model=module, config=module.config).items():
            state_dict[prefix + target] = value[0] if isinstance(value, list) else value
