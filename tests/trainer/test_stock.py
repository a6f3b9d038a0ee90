"""What every trainer refuses before any weight is loaded, and what it checks of TRL."""

import warnings

import pytest
import torch
import transformers
from datasets import Dataset
from helpers_grpo import as_rollout, build, config, lora, moved, reward, text_prompts, tiny, weights
from peft import PromptTuningConfig, get_peft_model
from test_sft_trainer import config as sft_config
from test_sft_trainer import dataset
from transformers import AutoConfig, BitsAndBytesConfig, LlamaConfig
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, SFTTrainer

from trl_dllm import DiffusionGRPOTrainer, DiffusionSFTConfig, DiffusionSFTTrainer
from trl_dllm.likelihood import ExactTrajectory, token_logps
from trl_dllm.trainer.dpo_trainer import _OVERRIDDEN as DPO_OVERRIDES
from trl_dllm.trainer.grpo_trainer import _OVERRIDDEN as GRPO_OVERRIDES
from trl_dllm.trainer.sft_trainer import _OVERRIDDEN as SFT_OVERRIDES
from trl_dllm.trainer.stock import check_trl, known_arguments, without_dropout


def make(tmp_path, model, tokenizer=None, args=None, **kwargs):
    args = args or config(tmp_path / "run")
    return DiffusionGRPOTrainer(model, reward, args, text_prompts(), processing_class=tokenizer, **kwargs)


def llama(**kwargs):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaConfig(vocab_size=101, num_key_value_heads=1, architectures=["LlamaForCausalLM"], **size, **kwargs)


def test_the_fixture_notices_loaded_weights(tmp_path, checkpoint, no_weights):
    with pytest.raises(AssertionError, match="weights were loaded"):
        make(tmp_path, checkpoint())


@pytest.mark.parametrize("name", ["tools", "environment_factory"])
def test_samplers_that_join_generations_are_refused_before_weights_load(tmp_path, checkpoint, no_weights, name):
    def tool():
        """A tool."""

    value = [tool] if name == "tools" else tool
    with pytest.raises(ValueError, match=rf"{name}=.*tool.*Remove it"):
        make(tmp_path, checkpoint(), **{name: value})


@pytest.mark.parametrize("as_instance", [False, True])
def test_an_autoregressive_model_is_refused_before_weights_load(tmp_path, checkpoint, no_weights, as_instance):
    model = checkpoint(llama())
    if as_instance:
        model = transformers.LlamaForCausalLM(llama())
    with pytest.raises(ValueError, match=r"(?s)'llama'.*is_causal.*autoregressive.*set config.is_causal = False"):
        make(tmp_path, model, tiny()[1])


def test_a_model_without_a_mask_token_is_refused_before_weights_load(tmp_path, checkpoint, no_weights):
    with pytest.raises(ValueError, match=r"mask_token_id is missing.*'llama'.*Set config.mask_token_id"):
        make(tmp_path, checkpoint(llama(is_causal=False), mask=False))


@pytest.mark.parametrize("given", [False, True], ids=["checkpoint's tokenizer", "tokenizer given"])
def test_a_tokenizer_with_another_mask_token_is_refused_before_weights_load(tmp_path, checkpoint, no_weights, given):
    folder = checkpoint(llama(is_causal=False, mask_token_id=7))
    with pytest.raises(
        ValueError, match=r"mask_token_id=7.*tokenizer's mask token has id 3.*Use the checkpoint's own"
    ):
        make(tmp_path, folder, tiny()[1] if given else None)


def test_a_mask_token_that_only_the_checkpoints_tokenizer_names_is_enough(tmp_path):
    folder = str(tmp_path / "stock")
    transformers.LlamaForCausalLM(llama(is_causal=False)).save_pretrained(folder)
    tokenizer = tiny()[1]
    tokenizer.save_pretrained(folder)
    trainer = make(tmp_path, folder)
    assert trainer.spec.mask_token_id == tokenizer.mask_token_id
    before = weights(trainer)
    trainer.train()
    assert moved(before, trainer)


def test_a_uniform_noise_diffusion_model_is_refused_before_weights_load(tmp_path, checkpoint, no_weights):
    folder = checkpoint(AutoConfig.for_model("diffusion_gemma"))
    with pytest.raises(NotImplementedError, match=r"'diffusion_gemma'.*no mask token.*Use a masked diffusion model"):
        make(tmp_path, folder)


def test_logits_transformed_behind_the_head_are_refused_before_weights_load(tmp_path, checkpoint, no_weights):
    folder = checkpoint(llama(is_causal=False, mask_token_id=3, final_logit_softcapping=30.0))
    with pytest.raises(ValueError, match=r"final_logit_softcapping=30.0 is not supported"):
        make(tmp_path, folder)


def test_a_multimodal_processor_is_refused_before_weights_load(tmp_path, checkpoint, no_weights):
    processor = object.__new__(transformers.ProcessorMixin)
    with pytest.raises(ValueError, match=r"processing_class=ProcessorMixin.*Pass the model's tokenizer"):
        make(tmp_path, checkpoint(), processor)


@pytest.mark.parametrize("wrapped", [False, True], ids=["peft_config", "PeftModel"])
def test_virtual_tokens_are_refused_before_weights_load(tmp_path, checkpoint, no_weights, wrapped):
    """They would stand before the prompt, and every row that the scorer reads would be another one."""
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(tiny()[0], adapter) if wrapped else checkpoint()
    with pytest.raises(ValueError, match=r"peft_config=PromptTuningConfig.*Use LoRA"):
        make(tmp_path, model, tiny()[1], peft_config=None if wrapped else adapter)


INTEGERS = {
    "4-bit": (BitsAndBytesConfig(load_in_4bit=True), r"bnb_4bit_quant_storage='uint8' under FSDP.*'bfloat16'.*DDP"),
    "8-bit": (BitsAndBytesConfig(load_in_8bit=True), r"load_in_8bit=True under FSDP.*'bfloat16'.*DDP or DeepSpeed"),
}


@pytest.mark.parametrize("where", ["argument", "model_init_kwargs", "checkpoint"])
@pytest.mark.parametrize("kind", INTEGERS)
def test_integer_weights_under_fsdp_are_refused_before_weights_load(
    tmp_path, checkpoint, no_weights, monkeypatch, kind, where
):
    quantization, message = INTEGERS[kind]
    settings, given, model_config = {}, {}, tiny()[0].config
    if where == "argument":
        given["quantization_config"] = quantization
    elif where == "model_init_kwargs":
        settings["model_init_kwargs"] = {"quantization_config": quantization}
    else:
        model_config.quantization_config = quantization.to_dict()
    model = checkpoint(model_config)
    grpo, sft = config(tmp_path / "run", **settings), DiffusionSFTConfig(str(tmp_path), use_cpu=True, **settings)
    answers = Dataset.from_dict({"prompt": ["a"] * 8, "completion": ["b"] * 8})
    for launched in (True, False):
        if launched:
            monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        else:
            monkeypatch.delenv("ACCELERATE_USE_FSDP")
            grpo.fsdp = sft.fsdp = True
        with pytest.raises(ValueError, match=message):
            make(tmp_path, model, args=grpo, peft_config=lora(), **given)
        with pytest.raises(ValueError, match=message):
            DiffusionSFTTrainer(model, sft, train_dataset=answers, peft_config=lora(), **given)


@pytest.mark.parametrize(("storage", "fsdp"), [("bfloat16", True), ("uint8", False)])
def test_weights_that_can_be_sharded_or_need_not_are_loaded(
    tmp_path, checkpoint, no_weights, monkeypatch, storage, fsdp
):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=storage)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(fsdp))
    with pytest.raises(AssertionError, match="weights were loaded"):
        make(tmp_path, checkpoint(), quantization_config=quantization, peft_config=lora())


def test_the_name_of_an_estimator_belongs_in_the_config(tmp_path, checkpoint, no_weights):
    with pytest.raises(TypeError, match=r"estimator='mean_field' must be an Estimator instance.*DiffusionGRPOConfig"):
        make(tmp_path, checkpoint(), estimator="mean_field")


def test_arguments_of_another_trainer_are_refused(tmp_path, checkpoint, no_weights):
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="args must be a DiffusionGRPOConfig, got TrainingArguments"):
        make(tmp_path, checkpoint(), args=arguments)
    with pytest.raises(TypeError, match="model must be a name or a transformers model, got dict"):
        make(tmp_path, {})


def test_a_trl_whose_methods_moved_is_refused_by_name(monkeypatch):
    check_trl(GRPOTrainer, GRPO_OVERRIDES)
    check_trl(SFTTrainer, SFT_OVERRIDES)
    check_trl(DPOTrainer, DPO_OVERRIDES)

    class Moved(GRPOTrainer):
        def _compute_loss(self, model, batch):
            pass

    with pytest.raises(RuntimeError, match=r"Moved._compute_loss has no parameter 'inputs'.*Install trl"):
        check_trl(Moved, GRPO_OVERRIDES)

    class Gone:
        pass

    with pytest.raises(RuntimeError, match=r"Gone._generate_single_turn does not exist"):
        check_trl(Gone, GRPO_OVERRIDES)


def test_a_stock_config_with_an_option_that_does_not_apply_is_refused(tmp_path, checkpoint, no_weights):
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, repetition_penalty=1.2)
    with pytest.raises(ValueError, match=r"repetition_penalty=1\.2"):
        make(tmp_path, checkpoint(), args=args)


@pytest.mark.parametrize("coefficient", [None, 0.0])
@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_a_router_loss_that_the_model_asks_for_is_left_out_with_a_warning(
    tmp_path, checkpoint, no_weights, kind, coefficient
):
    """TRL would take the model's own coefficient where none is given."""
    folder = checkpoint(llama(is_causal=False, mask_token_id=3, router_aux_loss_coef=0.01))
    with warnings.catch_warnings(record=True) as caught, pytest.raises(AssertionError, match="weights were loaded"):
        warnings.simplefilter("always")
        if kind == "grpo":
            args = config(tmp_path / "run", router_aux_loss_coef=coefficient)
            make(tmp_path, folder, args=args)
        else:
            args = sft_config(tmp_path / "run", router_aux_loss_coef=coefficient)
            DiffusionSFTTrainer(folder, args, train_dataset=dataset())
    assert args.router_aux_loss_coef == 0.0
    said = [str(w.message) for w in caught if "router" in str(w.message)]
    assert len(said) == (coefficient is None)
    assert all("router_aux_loss_coef=0.01 is left out" in line and "router_aux_loss_coef=0.0" in line for line in said)


def test_a_model_without_experts_has_no_such_warning(tmp_path, recwarn):
    build(tmp_path)
    assert not [w for w in recwarn if "router" in str(w.message)]


def test_only_arguments_that_this_version_takes_are_given():
    def older(model, gather=True):
        pass

    assert known_arguments(older, gather=False, checkpointing=None) == {"gather": False}


class Noisy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_dropout = 0.5
        self.inner = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))


def test_dropout_is_off_while_drawing_and_nothing_else_changes():
    model = Noisy().train()
    model.inner[1].eval()
    other = torch.nn.Dropout(0.5)
    model.inner.append(other)
    with pytest.raises(KeyError), without_dropout(model):
        assert not model.training and not other.training and model.inner.training and model.inner[0].training
        raise KeyError
    assert model.training and other.training and not model.inner[1].training


def test_rollouts_are_drawn_without_dropout(tmp_path):
    """Whatever `disable_dropout` says: the exact likelihood, scored without dropout, is the sampler's."""
    trainer = build(tmp_path, estimator="exact_trajectory", peft=lora(lora_dropout=0.5), disable_dropout=False)
    assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.5 for m in trainer.model.modules())
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.3)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    rollout = as_rollout(trainer, batch)
    trainer.model.eval()
    with torch.no_grad():
        logps = token_logps(trainer.model, rollout, ExactTrajectory()).logps
    counted = rollout.counted
    torch.testing.assert_close(logps[counted], rollout.logps[counted], atol=1e-5, rtol=0)


def test_options_set_after_construction_are_checked_when_training_starts(tmp_path):
    trainer = build(tmp_path)
    trainer.args.block_length = 3
    with pytest.raises(ValueError, match="block_length=3 does not divide max_completion_length=8"):
        trainer.train()
    trainer.args.block_length = 8
    trainer.train()
    assert trainer.sampling.block_length == 8


def test_a_temperature_of_zero_warns_that_nothing_is_learned(tmp_path):
    with pytest.warns(UserWarning, match="temperature=0: the completions of a group are all the same"):
        build(tmp_path, temperature=0.0)


def test_two_evaluations_at_one_step_draw_the_same_completions(tmp_path):
    data = text_prompts(2)
    trainer = build(tmp_path, eval_dataset=data, num_generations_eval=2, per_device_eval_batch_size=4)
    drawn = []
    generate = trainer._generate_and_score_completions

    def keeping(inputs):
        batch = generate(inputs)
        drawn.append(batch["completion_ids"])
        return batch

    trainer._generate_and_score_completions = keeping
    first, second = trainer.evaluate(), trainer.evaluate()
    half = len(drawn) // 2
    assert half > 1 and all(torch.equal(a, b) for a, b in zip(drawn[:half], drawn[half:], strict=True))
    assert first["eval_reward"] == second["eval_reward"]


def test_the_option_that_was_set_is_the_one_that_is_named(tmp_path):
    with pytest.raises(ValueError, match="use_transformers_paged=True"), pytest.warns(FutureWarning):
        config(tmp_path, use_transformers_paged=True)
    with pytest.raises(ValueError, match=r"use_liger_kernel=True .*model_type"):
        config(tmp_path, use_liger_kernel=True)
