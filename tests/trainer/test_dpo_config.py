"""Settings of DPO: what is refused, by field and value, and what each of TRL's fields is in docs/dpo.md."""

import re
import warnings
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl
from helpers_dpo import config
from packaging.version import Version
from trl import DPOConfig

from trl_dllm import DiffusionDPOConfig
from trl_dllm.likelihood import CoupledElbo, Elbo
from trl_dllm.trainer.dpo_config import _REFUSED, LOSSES


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("estimator", "step_merge"),
        ("estimator", "Elbo"),
        ("num_samples", 0),
        ("num_samples", 2.5),
        ("loss_type", "sigmoids"),
        ("loss_type", []),
        ("loss_type", ["sigmoid", "nll"]),
        ("loss_weights", [1.0, 2.0]),
        ("loss_weights", ["1"]),
        ("beta", 0.0),
        ("beta", -0.1),
        ("ld_alpha", 1.5),
        ("label_smoothing", 0.5),
        ("label_smoothing", -0.1),
        ("discopop_tau", 0.0),
        ("f_divergence_type", "kl"),
        ("truncation_mode", "keep"),
        ("precompute_ref_batch_size", 0),
        ("use_weighting", True),
        ("disable_dropout", False),
        ("neftune_noise_alpha", 5.0),
        ("padding_free", True),
        ("use_liger_kernel", True),
        ("router_aux_loss_coef", 0.1),
        ("max_length", 0),
        ("learning_rate", float("nan")),
    ],
)
def test_config_errors_name_field_and_value(field, value, tmp_path):
    with pytest.raises(ValueError) as error:
        config(tmp_path, **{field: value})
    shown = value[-1] if isinstance(value, list) and field == "loss_type" and value else value
    assert field in str(error.value) and repr(shown) in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "coupled_elbo", "num_samples": 3}, "num_samples=3 must be even"),
        ({"loss_type": ["exo_pair"]}, "label_smoothing=0.0 under loss_type='exo_pair'"),
        ({"loss_type": ["aot"], "f_divergence_type": "forward_kl"}, "f_divergence_type='forward_kl' .*'aot'"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "contradict each other"),
    ],
)
def test_settings_that_do_not_go_together(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_what_is_given_in_short_is_what_trl_makes_of_it(tmp_path):
    assert config(tmp_path, loss_type="ipo").loss_type == ["ipo"]
    assert type(config(tmp_path).build_estimator()) is Elbo
    coupled = config(tmp_path, estimator="coupled_elbo", num_samples=4).build_estimator()
    assert type(coupled) is CoupledElbo and coupled.num_samples == 4


def test_losses_are_trls():
    """Of the installed version: another one would need a look at what it reads."""
    text = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    named = re.findall(r"`'(\w+)'`", text)
    assert set(named) == set(LOSSES) and len(LOSSES) == len(set(LOSSES))


# ------------------------------------------------------------------------------------------------ TRL's fields by name

PAGE = (Path(__file__).parents[2] / "docs" / "dpo.md").read_text()
FIELDS = {f.name: f for f in fields(DPOConfig)}


def lists() -> dict[str, list[str]]:
    """Heading -> the fields of its table's first column."""
    found = {}
    for section in PAGE.split("\n### ")[1:]:
        heading, *lines = section.split("\n## ")[0].splitlines()
        rows = [line.strip("|").split("|") for line in lines if line.startswith("| `")]
        assert rows and all(len(row) == 2 and row[1].strip() for row in rows), f"{heading}: a row has a reason"
        found[heading] = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    return found


LISTS = lists()
WORKS, REFUSED, NONE, HANDED_ON = LISTS


def test_every_field_stands_in_exactly_one_list():
    listed = Counter(name for names in LISTS.values() for name in names)
    assert [name for name, times in listed.items() if times > 1] == []
    assert FIELDS.keys() - listed.keys() == set(), "say in docs/dpo.md what becomes of them"
    older = any(
        Version(module.__version__) < Version(re.findall(rf"{name} (\d+\.\d+\.\d+)", PAGE)[0])
        for name, module in (("TRL", trl), ("transformers", transformers))
    )
    assert older or listed.keys() - FIELDS.keys() == set(), "no supported version has them"


VALUES: dict[str, Any] = {
    "use_weighting": True,
    "disable_dropout": False,
    "neftune_noise_alpha": 5.0,
    "padding_free": True,
    "use_liger_kernel": True,
    "router_aux_loss_coef": 0.1,
    "loss_type": ["hinge"],
    "loss_weights": [2.0],
    "ld_alpha": 0.5,
    "f_divergence_type": "forward_kl",
    "f_alpha_divergence_coef": 0.25,
    "label_smoothing": 0.1,
    "beta": 0.2,
    "discopop_tau": 0.1,
    "precompute_ref_log_probs": True,
    "precompute_ref_batch_size": 2,
    "sync_ref_model": True,
    "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 2,
    "max_length": 8,
    "truncation_mode": "keep_end",
    "pad_to_multiple_of": 8,
    "pad_token": "<pad>",
    "dataset_num_proc": 1,
    "model_init_kwargs": {"dtype": "float32"},
    "trust_remote_code": True,
    "activation_offloading": True,
    "label_smoothing_factor": 0.1,
}


def test_the_fields_that_dpo_adds_to_trainers_are_those_that_are_tried():
    own = FIELDS.keys() - {f.name for f in fields(trl.trainer.base_config._BaseConfig)}
    assert own <= VALUES.keys()


@pytest.mark.parametrize("name", sorted(VALUES))
def test_what_the_page_calls_refused_is_what_is_refused(name, tmp_path):
    assert VALUES[name] != FIELDS[name].default
    message = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated names
        try:
            config(tmp_path, **{name: VALUES[name]})
        except ValueError as error:
            message = str(error)
    assert (name in message) == (name in LISTS[REFUSED]), message
    assert name in LISTS[REFUSED] or not message, message


def test_the_pages_refused_fields_are_the_codes():
    assert set(LISTS[REFUSED]) == set(_REFUSED)
    assert not {f.name for f in fields(DiffusionDPOConfig)} - FIELDS.keys() - {"estimator", "num_samples"}
