"""docs/settings.md is what the configs say of themselves."""

import runpy
from dataclasses import fields
from pathlib import Path

from trl import DPOConfig, GRPOConfig, SFTConfig

from trl_dllm import DiffusionDPOConfig, DiffusionGRPOConfig, DiffusionSFTConfig
from trl_dllm.generation import DiffusionGenerationConfig


ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "docs" / "tools" / "settings.py"))


def test_the_page_is_up_to_date():
    assert (ROOT / "docs" / "settings.md").read_text() == TOOL["markdown"](), "run: python docs/tools/settings.py"


def test_every_field_that_is_new_has_a_row():
    page = TOOL["markdown"]()
    for config, base in (
        (DiffusionGRPOConfig, GRPOConfig),
        (DiffusionSFTConfig, SFTConfig),
        (DiffusionDPOConfig, DPOConfig),
        (DiffusionGenerationConfig, object),
    ):
        known = {f.name for f in fields(base)} if base is not object else {"_"}
        for name in {f.name for f in fields(config)} - known:
            assert f"| `{name}` |" in page, f"{config.__name__}.{name}"
