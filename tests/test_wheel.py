"""The wheel has the package, the entry of its command line and the recipes, and works from an empty folder."""

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from trl_dllm.recipe import RECIPES, find_recipe, render_recipe


ROOT = Path(__file__).parents[1]
NAME = "llada_8b/grpo/gsm8k_step_merge"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the files of a wheel that was built without network."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("trl_dllm-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def files(folder: Path, root: Path) -> set[str]:
    paths = (path.relative_to(root) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


def run(installed: Path, folder: Path, *argv: str) -> str:
    """What a command prints in `folder` where the wheel's files come before any other installation."""
    env = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *argv]
    return subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True).stdout


def test_the_wheel_has_the_package_and_the_recipes_and_nothing_else(installed):
    package, recipes = files(ROOT / "trl_dllm", ROOT), files(ROOT / "recipes", ROOT)
    expected = package | {f"trl_dllm/{path}" for path in recipes} | {"trl_dllm_cli.py"}
    assert len(package) > 50 and len(recipes) > 30
    assert {path for path in files(installed, installed) if ".dist-info/" not in path} == expected
    assert (installed / "trl_dllm/recipes/llada_8b/grpo/_base.yaml").read_text() == (
        RECIPES / "llada_8b/grpo/_base.yaml"
    ).read_text()
    (entry_points,) = installed.glob("trl_dllm-*.dist-info/entry_points.txt")
    assert "trl-dllm = trl_dllm_cli:main" in entry_points.read_text()


def test_its_recipes_are_found_from_an_empty_folder(installed, tmp_path):
    where = run(installed, tmp_path, "-c", "import trl_dllm.recipe; print(trl_dllm.recipe.RECIPES)")
    assert where == f"{installed / 'trl_dllm' / 'recipes'}\n"
    for name in (NAME, "recipes/llada_8b/grpo/config_gsm8k_step_merge.yaml"):
        assert run(installed, tmp_path, "-m", "trl_dllm_cli", "recipe", name) == render_recipe(find_recipe(NAME))


def test_a_script_of_it_takes_a_name_under_accelerate_launch(installed, tmp_path):
    run(installed, tmp_path, "-m", "trl_dllm_cli", "init-tiny", "m", "--hidden_size", "16", "--num_layers", "1")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    script = [str(installed / "trl_dllm/scripts/sft.py"), "--config", "tiny_llada/sft/sudoku"]
    small = "--max_steps 1 --num_train_examples 64 --model_name_or_path m --output_dir s --disable_tqdm true"
    assert "Model saved to s." in run(installed, tmp_path, *launch, *script, *small.split())
    assert (tmp_path / "s" / "model.safetensors").is_file()
