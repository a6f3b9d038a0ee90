"""Settings of SFT: what is refused, by field and value, and what is filled in."""

import pytest

from trl_dllm import DiffusionSFTConfig


def config(folder, **kwargs):
    return DiffusionSFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **kwargs)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("objective", "causal"),
        ("loss_weight", "1/T"),
        ("mask_eps", 0.0),
        ("mask_eps", 1.5),
        ("canvas_length", 0),
        ("block_length", -1),
        ("trainable_modules", "q_proj"),
        ("trainable_modules", []),
        ("packing", True),
        ("eval_packing", True),
        ("padding_free", True),
        ("assistant_only_loss", True),
        ("loss_type", "dft"),
        ("label_smoothing_factor", 0.1),
        ("average_tokens_across_devices", False),
        ("use_liger_kernel", True),
        ("router_aux_loss_coef", 0.1),
    ],
)
def test_config_errors_name_field_and_value(field, value, tmp_path):
    with pytest.raises(ValueError) as error:
        config(tmp_path, **{field: value})
    assert field in str(error.value) and repr(value) in str(error.value)


def test_canvas_must_be_a_multiple_of_the_block(tmp_path):
    with pytest.raises(ValueError, match=r"canvas_length=10 .* block_length=4; use 12 or 8"):
        config(tmp_path, canvas_length=10, block_length=4)


def test_any_order_needs_a_block_and_takes_the_largest_that_divides_the_canvas(tmp_path):
    for canvas, block in ((None, 32), (48, 16), (17, 1), (256, 32)):
        assert config(tmp_path, objective="any_order", canvas_length=canvas).block_length == block
    assert config(tmp_path, canvas_length=48).block_length is None
