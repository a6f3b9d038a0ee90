"""Recipes: YAML files of settings, found by name, each complete or a difference from a base.

    base: _base.yaml        # a path from this file's folder
    learning_rate: 5.0e-6   # what differs

A value of the recipe replaces the base's as a whole, lists and mappings too, and `null` is a value like any other.
There is one level: a base has no base.
"""

from difflib import get_close_matches
from importlib import resources
from pathlib import Path

import yaml


_HERE = Path(__file__).parent
# An installed package carries the recipes; in a checkout they stand beside it.
RECIPES = _HERE / "recipes" if (_HERE / "recipes").is_dir() else _HERE.parent / "recipes"


def recipe_paths() -> dict[str, Path]:
    """Every recipe of the library by its name, such as `llada_8b/grpo/gsm8k_step_merge`."""
    return {_name(path.relative_to(RECIPES)): path for path in sorted(RECIPES.glob("*/*/config_*.yaml"))}


def _name(path: Path) -> str:
    """`recipes/llada_8b/grpo/config_gsm8k_pkl.yaml` -> `llada_8b/grpo/gsm8k_pkl`."""
    *folders, file = path.parts
    return "/".join([*folders[folders[:1] == ["recipes"] :], file.removesuffix(".yaml").removeprefix("config_")])


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: an existing file, or a name, with or without `recipes/`, `config_` and `.yaml`, from any
    folder. Raises `FileNotFoundError`, which names the nearest one."""
    path, paths = Path(name), recipe_paths()
    if path.is_file():
        return path
    short = _name(path) if path.parts else ""
    if short in paths:
        return paths[short]
    near = get_close_matches(short, paths, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "`trl-dllm recipe` lists them."
    raise FileNotFoundError(f"{name} is neither a file nor the name of a recipe: {hint}")


def find_accelerate_config(name: str) -> Path:
    """A config of `accelerate launch`: an existing file, or a name, this library's (ddp, fsdp, zero2, zero3) or TRL's,
    with or without `recipes/accelerate_configs/` and `.yaml`, from any folder.

    Raises `FileNotFoundError`, which lists the names.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.parent.as_posix() in ("recipes/accelerate_configs", "accelerate_configs", "."):
        name = path.name.removesuffix(".yaml")
    folders = resources.files("trl") / "accelerate_configs", RECIPES / "accelerate_configs"
    known = {file.name.removesuffix(".yaml"): Path(str(file)) for folder in folders for file in folder.iterdir()}
    if name not in known:
        raise FileNotFoundError(f"--accelerate_config {name} is neither a file nor one of {', '.join(sorted(known))}.")
    return known[name]


def load_recipe(path: Path) -> dict:
    """The settings of a recipe file, its base's among them. Raises `ValueError` where the base breaks the rules."""
    settings, base = _read(path), base_of(path)
    if base is not None:
        settings = {**_read(base), **settings}
    return {key: value for key, value in settings.items() if key != "base"}


def base_of(path: Path) -> Path | None:
    """The file that a recipe names as its base, if any."""
    name = _read(path).get("base")
    if name is None:
        return None
    if not isinstance(name, str) or Path(name).is_absolute():
        raise ValueError(f"{path}: base={name!r} must be one path, relative to the recipe's own folder.")
    base = path.parent / name
    if not base.is_file():
        raise ValueError(
            f"{path}: base={name!r} is not a file beside it. A copy in another folder needs its base filled in: "
            "trl-dllm recipe NAME > mine.yaml"
        )
    if "base" in _read(base):
        raise ValueError(f"{path}: base={name!r} has a base itself; there is one level. Name a file without one.")
    return base


def head_comment(path: Path) -> list[str]:
    """The lines of the comment that a recipe starts with, without their `# `."""
    lines = path.read_text().splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.removeprefix("#").removeprefix(" ") for line in lines[:end]]


def render_recipe(path: Path) -> str:
    """The text of a recipe that needs no base: its head comment, and the settings of both under the base's sections.

    Every line is the files' own, so comments stay. A recipe without a base is printed as it is.
    """
    base = base_of(path)
    if base is None:
        return path.read_text()
    theirs, own = _entries(base), _entries(path)
    own.pop("base")
    sections: dict[str, dict[str, str]] = {}
    for key, (section, text) in theirs.items():
        sections.setdefault(section, {})[key] = text
    for key, (section, text) in own.items():
        if key in theirs:
            sections[theirs[key][0]][key] = text
        else:
            sections[section] = _insert(sections.get(section, {}), key, text)
    parts = ["\n".join(f"# {line}".rstrip() for line in head_comment(path))]
    parts += ["\n".join([title, *texts.values()] if title else texts.values()) for title, texts in sections.items()]
    result = "\n\n".join(part for part in parts if part) + "\n"
    try:
        same = _parse(result, path) == load_recipe(path)
    except ValueError:
        same = False
    if not same:
        raise ValueError(f"{path} and {base.name} cannot be printed as one: write each key on a line of its own.")
    return result


def _insert(texts: dict[str, str], key: str, text: str) -> dict[str, str]:
    """`texts` with one more, in alphabetical order where they are: after the last key that sorts before it."""
    items = list(texts.items())
    after = max((i for i, (other, _) in enumerate(items) if other < key), default=-1) + 1
    return dict([*items[:after], (key, text), *items[after:]])


def _entries(path: Path) -> dict[str, tuple[str, str]]:
    """Of each key in order: the section that it stands in (the comment after a blank line), and its lines."""
    text = path.read_text()
    lines = text.splitlines()
    mapping = yaml.compose(text)
    assert isinstance(mapping, yaml.MappingNode)  # as `_read` has checked
    keys = [(key.value, key.start_mark.line) for key, _ in mapping.value]
    entries, section, above = {}, "", 0
    for i, (key, start) in enumerate(keys):
        end = keys[i + 1][1] if i + 1 < len(keys) else len(lines)
        while end - 1 > start and (not lines[end - 1] or lines[end - 1].startswith("#")):
            end -= 1  # what stands above the next key
        gap = lines[above:start]
        if "" in gap:
            section = "\n".join(gap[len(gap) - gap[::-1].index("") :])
            gap = []
        entries[key] = (section, "\n".join([*(gap if above else []), *lines[start:end]]))
        above = end
    return entries


def _read(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error
    return _parse(text, path)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would keep the last."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _parse(text: str, path: Path) -> dict:
    try:
        settings = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        said = [(error.context, error.context_mark), (error.problem, error.problem_mark)]
        where = [f"{what} in line {mark.line + 1}, column {mark.column + 1}" for what, mark in said if mark]
        raise ValueError(f"{path} is not YAML: {': '.join(where)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be a YAML mapping of settings.")
    for key in settings:
        if not isinstance(key, str):
            raise ValueError(f"{path}: the key {key!r} must be a string; put it in quotes.")
    return settings
