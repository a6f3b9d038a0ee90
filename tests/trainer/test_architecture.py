"""Modules and attention that a model does not have, refused before its weights are loaded."""

import pytest
from helpers_grpo import config as grpo_config
from helpers_grpo import reward, text_prompts, tiny
from peft import LoraConfig
from test_sft_trainer import config as sft_config
from test_sft_trainer import dataset

from trl_dllm import DiffusionGRPOTrainer, DiffusionSFTTrainer
from trl_dllm.trainer.architecture import check_architecture


def make_grpo(tmp_path, folder, peft_config=None, **settings):
    args = grpo_config(tmp_path, **settings)
    return DiffusionGRPOTrainer(folder, reward, args, text_prompts(), peft_config=peft_config)


def make_sft(tmp_path, folder, peft_config=None, **settings):
    args = sft_config(tmp_path, **settings)
    return DiffusionSFTTrainer(folder, args, train_dataset=dataset(), peft_config=peft_config)


@pytest.mark.parametrize("make", [make_grpo, make_sft])
def test_what_the_model_does_not_have_is_named(tmp_path, checkpoint, no_weights, make):
    folder = checkpoint()
    ends = "down_proj, embed_tokens, .*q_proj"
    with pytest.raises(ValueError, match=rf"lora_target_modules\)=\['attn_out', 'q_proj'\]: .*'attn_out'.*{ends}"):
        make(tmp_path, folder, LoraConfig(target_modules=["q_proj", "attn_out"]))
    with pytest.raises(ValueError, match=r"attn_implementation=.fast"):
        make(tmp_path, folder, model_init_kwargs={"attn_implementation": "fast"})


def test_unknown_trainable_modules_and_tokens_are_named_before_weights_load(tmp_path, checkpoint, no_weights):
    folder = checkpoint()
    with pytest.raises(ValueError, match=r"trainable_modules=\['k_proj', 'qproj'\]: .*'qproj'.*q_proj"):
        make_sft(tmp_path, folder, trainable_modules=["k_proj", "qproj"])
    with pytest.raises(ValueError, match="eos_token='<end>' is no token"):
        make_sft(tmp_path, folder, eos_token="<end>")


@pytest.mark.parametrize("targets", [["q_proj", "layers.0.mlp.up_proj"], "all-linear", r".*\.[qv]_proj", None])
def test_what_the_model_has_passes(tmp_path, checkpoint, targets):
    from transformers import AutoConfig

    folder = checkpoint()
    args = sft_config(tmp_path, model_init_kwargs={"attn_implementation": "eager"})
    check_architecture(folder, AutoConfig.from_pretrained(folder), args, LoraConfig(target_modules=targets), ["mlp"])


def test_unknown_arguments_of_the_model_are_named(tmp_path, checkpoint):
    folder = checkpoint()
    tiny()[0].save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"nonsense=1 \(model_init_kwargs in a recipe\) is no argument of from_pretra"
    ):
        make_grpo(tmp_path, folder, model_init_kwargs={"nonsense": 1})
