"""The decoding that a model was trained with, saved beside its weights as `decoding.json`.

The file holds what is known of it: fields of `DiffusionGenerationConfig`, the canvas as `max_new_tokens`. GRPO knows
all of them; SFT knows the canvas and the blocks that answers were filled to, and whether it makes an any-order model.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils.hub import cached_file

from ..fields import check_kind
from ..models.spec import FACTS, MaskedDiffusionSpec
from .config import DecodingArguments, DiffusionGenerationConfig


DECODING = "decoding.json"

_FIELDS = [
    "max_new_tokens",
    "temperature",
    *(f.name for f in fields(DecodingArguments)),
]  # not eos_token_ids, which are the model's
_CANVAS = 256  # tokens, where nobody says; DiffusionGenerationConfig's default


def decoding_of(config: DiffusionGenerationConfig) -> dict[str, Any]:
    """What is saved of a config: every field, steps rather than tokens a step."""
    return {name: getattr(config, name) for name in _FIELDS if name != "tokens_per_step"}


def save_decoding(settings: Mapping[str, Any], folder: str | Path) -> None:
    """Write what is known of a model's decoding beside its weights; nothing known removes what another model left."""
    path = Path(folder) / DECODING
    if settings:
        path.write_text(json.dumps(dict(settings), indent=2) + "\n")
    else:
        path.unlink(missing_ok=True)


def read_decoding(name: str | Path) -> dict[str, Any]:
    """What a model's folder or Hub repository says of its decoding; nothing if it has no `decoding.json`.

    Raises:
        ValueError: a file that is not a mapping of decoding settings.
    """
    options = {"missing_entries": False, "connection_errors": False, "gated_repo": False}
    try:
        path = cached_file(str(name), DECODING, **{f"_raise_exceptions_for_{key}": on for key, on in options.items()})
    except OSError:  # no such model: whoever loads it says so
        return {}
    if path is None:
        return {}
    try:
        settings = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{DECODING} of {name} is not JSON ({error}). Mend the file, or delete it.") from error
    unknown = sorted(set(settings) - set(_FIELDS)) if isinstance(settings, dict) else [settings]
    if unknown:
        raise ValueError(
            f"{DECODING} of {name}: {unknown[0]!r} is no decoding setting of this version; choose from "
            f"{', '.join(_FIELDS)}, or delete the file and give the settings."
        )
    try:
        _trained(settings)
    except ValueError as error:
        raise ValueError(f"{DECODING} of {name}: {error}") from error
    return settings


def _trained(saved: Mapping[str, Any], canvas_length: int | None = None) -> DiffusionGenerationConfig:
    """The config of what is saved; where no canvas is, the one that is given, or the default in whole blocks."""
    known = {name: value for name, value in saved.items() if name != "temperature"}
    if "max_new_tokens" not in known:
        block_length = known.get("block_length") or 1
        check_kind("block_length", block_length, int)
        default = max(block_length, _CANVAS - _CANVAS % block_length)
        known["max_new_tokens"] = default if canvas_length is None else canvas_length
    return DiffusionGenerationConfig(**known)


def decoding_config(saved: Mapping[str, Any], given: Mapping[str, Any]) -> DiffusionGenerationConfig:
    """The config of a decoding: what is given explicitly, else what is saved, else the defaults.

    Another canvas or block length than the saved one keeps the saved blocks where they divide the canvas, and as many
    tokens a step, rounded up (`DiffusionGenerationConfig.resized`). The saved temperature is a record of the training
    and is not taken.

    Raises:
        ValueError: settings that do not go together; it names them.
    """
    trained = _trained(saved, given.get("max_new_tokens"))
    resized = trained.resized(given.get("max_new_tokens", trained.max_new_tokens), given.get("block_length"))
    changes = dict(given)
    if given.get("tokens_per_step") is not None:
        changes.setdefault("diffusion_steps", None)  # it says the same thing
    if given.get("decoding", trained.decoding) != trained.decoding:
        changes.setdefault("cache", None)  # each decoding has its own
    return replace(resized, **changes)


def _read_spec(name: str) -> MaskedDiffusionSpec | None:
    """What a model's config says of it, but for the mask token; None where there is none to read."""
    try:
        config = AutoConfig.from_pretrained(name).get_text_config()
    except (OSError, ValueError):  # whoever loads it says so
        return None
    facts = {fact: value for fact in FACTS[1:] if (value := getattr(config, fact, None)) is not None}
    return MaskedDiffusionSpec(0, **facts)


def saved_decoding_config(
    names: Iterable[str | None], given: Mapping[str, Any]
) -> tuple[DiffusionGenerationConfig, str | None]:
    """The config of a model's decoding, and a line that says what of it was saved with the model.

    Args:
        names (`Iterable[str | None]`): places to look at, such as an adapter and its model; the first one that has a
            `decoding.json` counts.
            The last is the model: block-causal ones have their block length from its config.
        given (`Mapping[str, Any]`): fields of the config that were given explicitly.

    Raises:
        ValueError: settings that the model cannot be decoded with.
    """
    places = [name for name in names if name]
    place, saved = next(((name, found) for name in places if (found := read_decoding(name))), (None, {}))
    spec = _read_spec(places[-1]) if places else None
    size = None if spec is None else spec.block_size
    if size is not None:  # a block-causal model is decoded in its own blocks
        saved = {**saved, "block_length": size}
        if "max_new_tokens" in saved:
            saved["max_new_tokens"] = -(-saved["max_new_tokens"] // size) * size
    config = decoding_config(saved, given)
    if spec is not None:
        config.check_model(spec)
    if place is None:
        line = f"No {DECODING} with {' or '.join(places)}: the canvas has {config.max_new_tokens} tokens, the default."
        return config, None if "max_new_tokens" in given else line
    here = {name: getattr(config, name) for name in saved if name != "temperature"}
    as_saved = ", ".join(f"{name}={value}" for name, value in here.items() if value == saved[name])
    other = ", ".join(f"{name}={value}" for name, value in here.items() if value != saved[name])
    return config, f"Decoding as saved with {place}: {as_saved}" + (f"; but {other}" if other else "") + "."
