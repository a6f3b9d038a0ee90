"""The package as a whole: its public names, what importing it loads, and that imports run one way."""

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trl_dllm


PACKAGE = Path(trl_dllm.__file__).parent
PUBLIC = [
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "DiffusionGRPOConfig",
    "DiffusionGRPOTrainer",
    "DiffusionSFTConfig",
    "DiffusionSFTTrainer",
    "Rollout",
    "__version__",
]


# ------------------------------------------------------------------------------------------------------------- names


def test_public_names():
    assert sorted(trl_dllm.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(trl_dllm)) and dir(trl_dllm) == sorted(dir(trl_dllm))
    for name in PUBLIC:
        assert getattr(trl_dllm, name).__name__ == name if name != "__version__" else trl_dllm.__version__
    with pytest.raises(AttributeError, match="module 'trl_dllm' has no attribute 'DiffusionPPOTrainer'"):
        _ = trl_dllm.DiffusionPPOTrainer


# ------------------------------------------------------------------------------------------------------ lazy loading


def in_a_new_process(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_importing_the_package_registers_the_families_and_loads_no_trl():
    in_a_new_process(
        "import sys, trl_dllm\n"
        "assert not {name.split('.')[0] for name in sys.modules} & {'trl', 'peft', 'datasets', 'deepspeed'}\n"
        "assert 'trl_dllm.trainer' not in sys.modules and 'trl_dllm.tasks' not in sys.modules\n"
        "from transformers import AutoConfig\n"
        "assert AutoConfig.for_model('llada').mask_token_id and AutoConfig.for_model('Dream').logits_shift == 1\n"
        "trl_dllm.DiffusionGRPOConfig\n"
        "assert 'trl' in sys.modules and 'trl_dllm.trainer.grpo_trainer' not in sys.modules\n"
    )


# ----------------------------------------------------------------------------------------------- imports run one way

# Rooms and single modules of the package, from the bottom up. Each imports those below it, or beside it in no circle.
FLOORS = [
    {"blocks"},
    {
        "models",
        "rollout",
        "step_maps",
        "trace",
        "noise",
        "recipe",
        "fields",
        "command",
        "fingerprint",
        "identity",
        "processes",
    },
    {"generation", "likelihood"},
    {"trainer", "evaluation", "reports"},
    {"harness", "scripts"},
    {"cli"},
]
# The benchmarks stand beside the house: they know nothing of models, and import no room above.
BESIDE = [{"sandbox"}, {"tasks"}]


def imported(path: Path, package: tuple[str, ...]) -> set[str]:
    """Dotted names that a file imports, anywhere in it; those of a `from` import with the name behind."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*base, *(node.module or "").split("."))).strip(".")
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def imports_of_rooms(root: Path) -> dict[str, set[str]]:
    """Which rooms of the package each room imports."""
    out = defaultdict(set)
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        if parts[1] in ("__init__", "_version"):
            continue
        names = {name.split(".")[1] for name in imported(path, parts[:-1]) if name.startswith(f"{root.name}.")}
        out[parts[1]] |= names - {parts[1], "_version"}
    return out


def errors(rooms: dict[str, set[str]]) -> list[str]:
    floor = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    beside = {room: number for number, floor in enumerate(BESIDE) for room in floor}
    out = []
    for room, others in sorted(rooms.items()):
        if room not in floor and room not in beside:
            out.append(f"{room} has no floor: give it one above")
            continue
        for other in sorted(others):
            if other in PUBLIC:  # `from trl_dllm import DiffusionGRPOTrainer`: as a user would, so from the top alone
                allowed = floor.get(room, 0) >= floor["scripts"]
            elif room in beside:
                allowed = beside.get(other, len(BESIDE)) <= beside[room]
            else:
                allowed = floor.get(other, 0 if other in beside else len(FLOORS)) <= floor[room]
            if not allowed:
                out.append(f"{room} imports {other}")
    return out


def test_imports_run_one_way():
    """models, rollout, noise <- generation, likelihood <- trainer, evaluation, reports <- scripts; tasks: none."""
    rooms = imports_of_rooms(PACKAGE)
    assert not errors(rooms)
    TopologicalSorter({room: others - set(PUBLIC) for room, others in rooms.items()}).prepare()  # raises on a circle
    assert rooms["trainer"] >= {"generation", "likelihood", "models"}, "the reader of imports reads"


@pytest.mark.parametrize(
    ("place", "line", "error"),
    [
        ("models/a.py", "from ..likelihood import Elbo", "models imports likelihood"),
        ("models/a.py", "def f():\n    from ..generation.order import reveal", "models imports generation"),
        ("rollout.py", "from .trainer import x", "rollout imports trainer"),
        ("noise.py", "import trl_dllm.evaluation", "noise imports evaluation"),
        ("likelihood/a.py", "from .. import reports", "likelihood imports reports"),
        ("trainer/a.py", "from trl_dllm.scripts.grpo import main", "trainer imports scripts"),
        ("reports/a.py", "from trl_dllm import DiffusionGRPOTrainer", "reports imports DiffusionGRPOTrainer"),
        ("tasks/a.py", "from ..models import unwrap", "tasks imports models"),
        ("tasks/a.py", "from ..noise import uniform", "tasks imports noise"),
        ("sandbox/a.py", "from ..tasks.base import Task", "sandbox imports tasks"),
        ("attic.py", "", "attic has no floor: give it one above"),
        ("tasks/a.py", "from ..sandbox import run", None),
        ("evaluation.py", "from .tasks import Task\nfrom .generation import generate", None),
        ("scripts/a.py", "from trl_dllm import DiffusionGRPOTrainer\nfrom trl_dllm.models import unwrap", None),
    ],
)
def test_the_rule_sees_what_breaks_it(tmp_path, place, line, error):
    path = tmp_path / "trl_dllm" / place
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert errors(imports_of_rooms(tmp_path / "trl_dllm")) == ([error] if error else [])
