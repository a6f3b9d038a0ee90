"""What each setting of a run means for its result: every field of every config is in one of three classes.

- `MEANING`: another value makes it another run. Resuming, or writing over it, is refused.
- `SCHEDULE`: how far the run goes, and how often it saves, logs and evaluates. It may change, which is said.
- `MACHINE`: where and how it is computed. Ignored; `machine_facts` are those that a saved generation buffer has the
  shape of.

A field that is in none of them, which a newer TRL may bring, counts as meaning.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..fingerprint import Difference, Fingerprint, differences, in_a_line
from .dpo_config import DiffusionDPOConfig
from .grpo_config import DiffusionGRPOConfig
from .sft_config import DiffusionSFTConfig


def _names(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


MEANING = _names(
    # data and rewards
    "task task_kwargs rejected_kwargs num_train_examples puzzle_seed dataset_name dataset_config dataset_train_split",
    "dataset_streaming dataset_text_field dataset_kwargs max_length truncation_mode packing packing_strategy",
    "padding_free eval_packing completion_only_loss assistant_only_loss chat_template_path chat_template_kwargs",
    "eos_token pad_token remove_unused_columns label_names length_column_name train_sampling_strategy",
    "shuffle_dataset dataloader_drop_last accelerator_config reward_funcs reward_weights",
    "multi_objective_aggregation scale_rewards max_tool_calling_iterations reward_model_label prompt",
    # the model and what of it is trained
    "model_init_kwargs trust_remote_code disable_dropout use_peft lora_r lora_alpha lora_dropout",
    "lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora",
    "load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant trainable_modules",
    # decoding
    "max_completion_length block_length diffusion_steps tokens_per_step remasking confidence_threshold stop_at_eos",
    "decoding cache future_blocks cfg_scale temperature top_p top_k min_p repetition_penalty generation_kwargs",
    "cache_implementation use_vllm use_transformers_continuous_batching transformers_continuous_batching_config",
    "use_transformers_paged num_generations generation_batch_size",
    # the likelihood
    "estimator num_segments estimator_kwargs p_mask_prompt redraw_views score_temperature loss_tokens",
    "ratio_denominator old_logps objective loss_weight mask_eps canvas_length num_samples",
    # the loss
    "loss_type beta kl_estimator use_bias_correction_kl num_iterations epsilon epsilon_high delta",
    "importance_sampling_level mask_truncated_completions off_policy_mask_threshold sapo_temperature_neg",
    "sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg top_entropy_quantile",
    "entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target",
    "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_cap label_smoothing_factor average_tokens_across_devices neftune_noise_alpha",
    "loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing use_weighting discopop_tau",
    "precompute_ref_log_probs",  # whose draws do not change from epoch to epoch
    # the optimizer, seeds, and which weights are kept
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules",
    "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed data_seed load_best_model_at_end",
    "metric_for_best_model greater_is_better",
)

SCHEDULE = _names(
    "max_steps num_train_epochs save_strategy save_steps save_total_limit save_only_model",
    "logging_strategy logging_steps logging_first_step trace_steps",
    "eval_strategy eval_steps eval_delay eval_on_start num_eval_examples num_generations_eval dataset_test_split",
    "ignore_data_skip",
)

MACHINE = _names(
    # paths and names; what lies there is meaning
    "output_dir model_name_or_path model_revision reward_model_name_or_path data_dir run_name project",
    # what this command does with the folder
    "resume_from_checkpoint start_over dry_run do_train do_eval do_predict restore_callback_states_from_checkpoint",
    # how a step is split; the rows of a step are meaning
    "per_device_train_batch_size gradient_accumulation_steps steps_per_generation per_device_eval_batch_size",
    "auto_find_batch_size sampler_batch_size precompute_ref_batch_size pad_to_multiple_of",
    # precision and kernels
    "dtype bf16 fp16 tf32 bf16_full_eval fp16_full_eval cast_lm_head_to_fp32 bnb_4bit_quant_storage",
    "attn_implementation use_liger_kernel liger_kernel_config use_cache torch_compile torch_compile_backend",
    "torch_compile_mode full_determinism",
    # memory
    "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs",
    "activation_offloading torch_empty_cache_steps ds3_gather_for_generation",
    # processes
    "use_cpu local_rank deepspeed fsdp fsdp_config parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb",
    "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout ignore_bias_buffers enable_jit_checkpoint",
    "save_on_each_node",
    # reading data
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor",
    "dataloader_multiprocessing_context dataloader_in_order dataset_num_proc",
    # logging
    "log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm",
    "report_to trackio_space_id trackio_bucket_id trackio_static_space_id log_completions log_multimodal",
    "num_completions_to_print log_unique_prompts log_completions_hub_repo debug skip_memory_metrics save_rollouts",
    "print_all_metrics",
    # evaluation
    "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps",
    "include_for_metrics batch_eval_metrics",
    # the Hub
    "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    # 0, whatever it says
    "router_aux_loss_coef",
    # vLLM, which is refused
    "vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url",
    "vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization",
    "vllm_max_model_length vllm_tensor_parallel_size",
)

# Arguments of `from_pretrained` (model_init_kwargs) that say where from and how, and not what.
_LOADING = _names(
    "dtype torch_dtype attn_implementation device_map max_memory low_cpu_mem_usage offload_folder offload_state_dict",
    "token cache_dir force_download local_files_only proxies revision use_safetensors tp_plan tp_size",
)

# Learning rates that do not depend on how many steps there are.
_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")


def machine_facts(args: TrainingArguments) -> dict[str, int]:
    """What a saved generation buffer has the shape of: with other values completions are drawn anew."""
    names = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def run_fingerprint(
    command: str,
    args: DiffusionGRPOConfig | DiffusionSFTConfig | DiffusionDPOConfig,
    others: list,
    facts: Mapping[str, Any],
) -> Fingerprint:
    """What a training run belongs to.

    Args:
        command (`str`): "grpo", "sft" or "dpo".
        args ([`DiffusionGRPOConfig`], [`DiffusionSFTConfig`] or [`DiffusionDPOConfig`]): of the trainer.
        others (`list`): further dataclass instances whose fields are settings: TRL's `ModelConfig`, the script's.
        facts (`dict`): what the settings do not say: which weights, tokenizer and rows these are.
    """
    settings = {f.name: _plain(getattr(config, f.name)) for config in (args, *others) for f in fields(config)}
    settings["model_init_kwargs"] = {
        name: value for name, value in (settings["model_init_kwargs"] or {}).items() if name not in _LOADING
    }
    if isinstance(args, DiffusionGRPOConfig):  # however the schedule was given
        config = args.generation_config()
        settings |= {"block_length": config.block_length, "diffusion_steps": config.diffusion_steps}
        settings["tokens_per_step"] = None
    meaning = {
        "command": command,
        **{name: value for name, value in settings.items() if name not in SCHEDULE | MACHINE},
        "rows_an_optimizer_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        **facts,
    }
    schedule = {name: settings[name] for name in sorted(SCHEDULE) if name in settings}
    return Fingerprint(meaning, schedule, dict(machine_facts(args)))


def _plain(value: Any) -> Any:
    """Configs within a config as their settings."""
    return value.to_dict() if hasattr(value, "to_dict") else value


def meaning_differences(was: Fingerprint, now: Fingerprint, configs: list) -> list[Difference]:
    """Where two runs differ in meaning.

    A field that the older version of a library did not have is taken at its default, and one that the newer does not
    have any more is not compared.
    """
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for config in configs
        for f in fields(config)
    }
    older = Fingerprint({name: was.meaning.get(name, defaults.get(name)) for name in now.meaning})
    return differences(older.meaning, now.meaning)


def schedule_line(was: Fingerprint, now: Fingerprint) -> str | None:
    """What changed in the schedule, in one line; None where nothing did."""
    found = differences(was.schedule, now.schedule)
    if not found:
        return None
    ends = {"max_steps", "num_train_epochs"} & {name for name, *_ in found}
    scheduler = now.meaning.get("lr_scheduler_type")
    note = f" The {scheduler} learning rate follows the new number of steps." if ends else ""
    return f"The schedule changes: {in_a_line(found)}." + (note if scheduler not in _WITHOUT_END else "")


def same_end(args: TrainingArguments, was: Fingerprint | None) -> bool:
    """Whether a run with these arguments goes as far as the earlier one was to."""
    ends = ("max_steps", "num_train_epochs")
    return was is not None and all(was.schedule.get(name) == getattr(args, name) for name in ends)


def nothing_left(args: TrainingArguments, checkpoint: str | Path) -> bool:
    """Whether a checkpoint has taken all steps of a run."""
    state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return state["global_step"] >= state["max_steps"] and same_end(args, Fingerprint.read(checkpoint))
