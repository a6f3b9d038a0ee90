"""The pictures of docs/concepts.md are those of the library's views, and show them as they are."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from trl_dllm.likelihood import AnyOrder, ExactTrajectory, MeanField


ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "docs" / "tools" / "pictures.py"))
PICTURES = TOOL["pictures"]()


@pytest.mark.parametrize("name", PICTURES)
def test_each_is_up_to_date_and_shown(name):
    assert (ROOT / "docs" / "figures" / name).read_text() == PICTURES[name], "run: python docs/tools/pictures.py"
    assert f"](figures/{name})" in (ROOT / "docs" / "concepts.md").read_text()


def test_a_view_is_read_off_its_tensors():
    (empty,) = TOOL["views"](MeanField(), TOOL["rollout"]())
    assert TOOL["columns"](empty)[:3] == [("say", "prompt"), ("it:", "prompt"), ("a", "scored")]
    second = TOOL["views"](ExactTrajectory(), TOOL["rollout"]())[1]
    kinds = [kind for _, kind in TOOL["columns"](second)][2:]
    assert kinds == ["scored", "token", "token", "mask", "mask", "scored"], "revealed at steps 1, 0, 0, 2, 2, 1"


def test_a_matrix_has_a_coloured_cell_for_each_column_that_a_row_sees():
    (view,) = TOOL["views"](AnyOrder(), TOOL["rollout"]())
    allowed = view.attention.allowed()[0]
    kinds = [{"scored": "mask"}.get(kind, kind) for _, kind in TOOL["columns"](view)]
    cells = re.findall(r'height="22" fill="(#\w+)" stroke="#d1d5db"', PICTURES["attention_any_order.svg"])
    expected = [
        TOOL["SEEN"][kinds[k]] if allowed[q, k] else "#fff" for q in range(len(kinds)) for k in range(len(kinds))
    ]
    assert cells == expected
    assert torch.equal(allowed[8:, 8:], torch.eye(6, dtype=torch.bool)), "no mask sees another"
