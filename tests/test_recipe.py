"""Recipes are found by name from any folder, merged with their base, and printed as one file that needs none."""

import pytest
import yaml

from trl_dllm.recipe import (
    RECIPES,
    find_accelerate_config,
    find_recipe,
    head_comment,
    load_recipe,
    recipe_paths,
    render_recipe,
)
from trl_dllm.scripts import dpo, grpo, sft


NAME = "llada_8b/grpo/gsm8k_step_merge"
FILE = RECIPES / "llada_8b/grpo/config_gsm8k_step_merge.yaml"

BASE = """# What both share.

# Model arguments
model_name_or_path: a/model
attention: eager
dtype: bfloat16  # half of float32

# Trainer config
beta: 0.04
learning_rate: 3.0e-6
# in tokens
max_length: 64
names: [one, two]
nested: {a: 1, b: 2}
"""
RECIPE = """# One line of a head.
#   a command
#
# And another.
base: _base.yaml

# Data arguments
task: sudoku

# Trainer config
attention: sdpa
block_length: 8
learning_rate: 5.0e-6  # the paper's
names:
  - three
nested: {b: 3}
warmup_steps: null
"""
RESOLVED = """# One line of a head.
#   a command
#
# And another.

# Model arguments
model_name_or_path: a/model
attention: sdpa
dtype: bfloat16  # half of float32

# Trainer config
beta: 0.04
block_length: 8
learning_rate: 5.0e-6  # the paper's
# in tokens
max_length: 64
names:
  - three
nested: {b: 3}
warmup_steps: null

# Data arguments
task: sudoku
"""


@pytest.fixture
def files(tmp_path):
    """`files(**{name: text})` writes `name.yaml` for each and returns the path of the first."""

    def write(**texts: str):
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path / f"{next(iter(texts))}.yaml"

    return write


# --------------------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize(
    "name",
    [
        NAME,
        f"{NAME}.yaml",
        "llada_8b/grpo/config_gsm8k_step_merge",
        "llada_8b/grpo/config_gsm8k_step_merge.yaml",
        "recipes/llada_8b/grpo/config_gsm8k_step_merge.yaml",
        "./recipes/llada_8b/grpo/gsm8k_step_merge",
        str(FILE),
    ],
)
def test_a_recipe_is_found_by_name_and_by_its_old_path_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == FILE


def test_an_existing_file_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / f"{NAME}.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("task: sudoku\n")
    assert find_recipe(f"{NAME}.yaml").resolve() == mine
    assert find_recipe(NAME) == FILE  # a folder, and no file


@pytest.mark.parametrize(
    "name", ["llada_8b/grpo/gsm8k_stepmerge", "recipes/llada_8b/grpo/config_gsm8k_step_mrge.yaml"]
)
def test_an_unknown_name_names_the_nearest(name):
    with pytest.raises(FileNotFoundError, match=f"{name} is neither a file nor .*: did you mean {NAME}?"):
        find_recipe(name)


@pytest.mark.parametrize("name", ["", "/", "_base", "llada_8b/grpo/_base"])
def test_what_is_no_recipe_is_not_found(name):
    with pytest.raises(FileNotFoundError, match="is neither a file nor the name of a recipe"):
        find_recipe(name)


def test_every_file_of_settings_is_a_recipe_or_a_base():
    files = {path for path in RECIPES.glob("*/*/*.yaml") if not path.name.startswith("_base")}
    assert files == set(recipe_paths().values()) and len(files) >= 29


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3"])
def test_accelerate_configs_of_this_library_come_first(name):
    assert find_accelerate_config(name) == RECIPES / "accelerate_configs" / f"{name}.yaml"


@pytest.mark.parametrize("name", ["zero2.yaml", "accelerate_configs/zero2", "recipes/accelerate_configs/zero2.yaml"])
def test_accelerate_configs_are_found_by_longer_names_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_accelerate_config(name) == RECIPES / "accelerate_configs" / "zero2.yaml"
    with pytest.raises(FileNotFoundError, match=r"mine/zero2.yaml is neither a file nor one of"):
        find_accelerate_config("mine/zero2.yaml")


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2", "zero1", "multi_gpu", "single_gpu"])
def test_accelerate_configs_of_trl_are_found(name):
    path = find_accelerate_config(name)
    assert path.is_file() and path.parts[-3:] == ("trl", "accelerate_configs", f"{name}.yaml")
    assert "distributed_type" in yaml.safe_load(path.read_text())


def test_an_accelerate_config_may_be_a_file(files):
    path = files(own="distributed_type: MULTI_GPU\n")
    assert find_accelerate_config(str(path)) == path
    with pytest.raises(FileNotFoundError, match=r"zero9 is neither a file nor one of ddp, fsdp, fsdp1, .*zero3\."):
        find_accelerate_config("zero9")


# ------------------------------------------------------------------------------------------------------------ base


def test_a_recipes_values_replace_its_bases_as_a_whole(files):
    settings = load_recipe(files(recipe=RECIPE, _base=BASE))
    assert settings == {
        "model_name_or_path": "a/model",
        "attention": "sdpa",
        "dtype": "bfloat16",
        "beta": 0.04,
        "learning_rate": 5e-6,
        "max_length": 64,
        "names": ["three"],
        "nested": {"b": 3},
        "task": "sudoku",
        "block_length": 8,
        "warmup_steps": None,
    }


def test_a_base_is_a_path_from_the_recipes_own_folder(tmp_path, files, monkeypatch):
    (tmp_path / "below").mkdir()
    path = files(**{"below/recipe": "base: ../other.yaml\nbeta: 1.0\n", "other": "beta: 0.0\nseed: 3\n"})
    monkeypatch.chdir("/")
    assert load_recipe(path) == {"beta": 1.0, "seed": 3}


def test_there_is_one_level(files):
    path = files(recipe="base: middle.yaml\n", middle="base: _base.yaml\nbeta: 1.0\n", _base=BASE)
    for read in (load_recipe, render_recipe):
        with pytest.raises(ValueError, match=r"recipe.yaml: base='middle.yaml' has a base itself; there is one level"):
            read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: elsewhere.yaml\n", "base='elsewhere.yaml' is not a file beside it.* trl-dllm recipe NAME > mine.yaml"),
        ("base: /_base.yaml\n", "base='/_base.yaml' must be one path, relative to the recipe's own folder"),
        ("base: [_base.yaml]\n", r"base=\['_base.yaml'\] must be one path"),
        ("- base\n", "must be a YAML mapping of settings"),
        ("base: list.yaml\n", "list.yaml must be a YAML mapping of settings"),
        ("beta: [1\n", r"recipe.yaml is not YAML: (.|\n)*line 2"),
    ],
)
def test_a_base_to_mend_is_named(files, text, message):
    path = files(recipe=text, _base=BASE, list="- beta\n")
    for read in (load_recipe, render_recipe):
        with pytest.raises(ValueError, match=message):
            read(path)


# -------------------------------------------------------------------------------------------------------- printing


def test_a_printed_recipe_has_its_head_and_the_bases_sections(files):
    path = files(recipe=RECIPE, _base=BASE)
    assert render_recipe(path) == RESOLVED
    assert yaml.safe_load(RESOLVED) == load_recipe(path)
    assert render_recipe(files(copy=RESOLVED)) == RESOLVED  # without a base it is printed as it is


def test_a_recipe_that_cannot_be_merged_line_by_line_is_refused(files):
    path = files(recipe="base: _base.yaml\nbeta: 1.0\n", _base="{beta: 0.0, seed: 3}\n")
    assert load_recipe(path) == {"beta": 1.0, "seed": 3}
    with pytest.raises(ValueError, match="cannot be printed as one: write each key on a line of its own"):
        render_recipe(path)


def parsed(path, script):
    """What the script gets from a recipe; bfloat16 training is refused by transformers on a CPU."""
    script_args, args, model_args = (
        {"dpo": dpo, "grpo": grpo, "sft": sft}[script]
        .make_parser()
        .parse_args_and_config(["--config", str(path), "--use_cpu", "true", "--bf16", "false"])
    )
    return script_args, args.to_dict(), model_args


@pytest.mark.parametrize("name", recipe_paths())
def test_the_printed_copy_of_a_recipe_parses_to_the_same_settings(name, tmp_path):
    path, copy = recipe_paths()[name], tmp_path / "mine.yaml"
    copy.write_text(render_recipe(path))
    assert "base" not in yaml.safe_load(copy.read_text())
    script = path.parent.name
    assert parsed(copy, script) == parsed(path, script)
    assert head_comment(copy) == head_comment(path)
    sections = [line for line in copy.read_text().splitlines() if line.endswith((" arguments", " trainer config"))]
    assert sections == ["# Model arguments", "# Data arguments", f"# {script.upper()} trainer config"]


# --------------------------------------------------------------------------------------------------- what is no recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"seed: 1\nbeta: 2\nseed: 3\n", "is not YAML: .*the key 'seed' is twice"),
        (b"task_kwargs: {a: 1, a: 2}\n", "the key 'a' is twice"),
        (b"2: 3\n", "the key 2 must be a string; put it in quotes"),
        (b"null: 3\n", "the key None must be a string"),
        (b"seed: 2026-13-45\n", "is not YAML: month must be in"),
        (b"seed: [1\n", "is not YAML: "),
        (b"run_name: \xff\n", "is no text in UTF-8"),
        (b"run_name: " + b"[" * 3000, "is not YAML"),
        (b"", "must be a YAML mapping"),
        (b"seed: !!python/object:os.system {}\n", "is not YAML"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:24],
)
def test_what_is_no_recipe_is_said_by_file(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=rf"(?s)mine\.yaml.*{message}"):
        load_recipe(path)


def test_keys_may_be_merged_and_stand_in_several_mappings(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: {x: 3}\n")
    assert load_recipe(path) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 3}}
