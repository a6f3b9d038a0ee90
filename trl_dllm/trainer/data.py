"""Data sets, checked before a weight is loaded: enough rows, the right columns, and text in each of them."""

from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from ..models.spec import check_positions


_TEMPLATE = 512  # tokens that a chat template puts around a prompt, at most


def check_grpo_data(given: Mapping[str, Any], args: Any, model_config: Any, tokenizer: Any) -> None:
    """Check the data sets of a GRPO trainer: they have prompts, of text or messages, that make a batch and fit.

    Args:
        given (`Mapping`): the trainer's arguments by name.
        args (`DiffusionGRPOConfig`): its settings.
        model_config: the model's config.
        tokenizer: its tokenizer, or None; then only the sampler sees whether prompts fit.

    Raises:
        ValueError: naming the data set and its row, and what to do.
    """
    canvas, prompts = args.canvas_length, args.generation_batch_size // args.num_generations
    check_positions(model_config, 0, canvas, "max_completion_length")
    room = getattr(model_config.get_text_config(), "max_position_embeddings", None) if tokenizer else None
    for name, dataset in _data_sets(given):
        _find_columns(name, dataset, [("prompt",)])
        if name == "train_dataset" and isinstance(dataset, Dataset) and len(dataset) < prompts:
            raise ValueError(
                f"{name} has {len(dataset)} rows, but a generation batch takes {prompts} prompts "
                f"(generation_batch_size={args.generation_batch_size} / num_generations={args.num_generations}), so "
                "no step would be made. Give more rows, or lower per_device_train_batch_size or "
                "gradient_accumulation_steps."
            )
        for row, prompt in _rows(name, dataset, "prompt"):
            # A token has at least one byte, so most prompts need not be tokenized to see that they fit.
            if room is not None and len(str(prompt).encode(errors="replace")) + _TEMPLATE + canvas > room:
                length = len(_tokenize(prompt, tokenizer, args.chat_template_kwargs))
                check_positions(model_config, length, canvas, "max_completion_length", f"{name} row {row}: ")


def check_sft_data(given: Mapping[str, Any], args: Any, model_config: Any) -> None:
    """Check the data sets of an SFT trainer: they have text or messages, and make a batch.

    Args and errors as in `check_grpo_data`.
    """
    check_positions(model_config, 0, args.canvas_length or 0, "canvas_length")
    _check_tokens(args, given.get("processing_class"))
    known = [("input_ids",), ("messages",), ("conversations",), ("prompt", "completion"), (args.dataset_text_field,)]
    for name, dataset in _data_sets(given):
        columns = _find_columns(name, dataset, known)
        for column in columns:
            if column != "input_ids":
                list(_rows(name, dataset, column))
        if columns == ("prompt", "completion") and args.completion_only_loss is not False:
            _check_answers_are_left(name, dataset, args, given.get("processing_class"))
        _check_batch(name, dataset, args)


def check_dpo_data(given: Mapping[str, Any], args: Any) -> None:
    """Check the data sets of a DPO trainer: they have pairs of text or messages, and make a batch.

    Args and errors as in `check_grpo_data`.
    """
    _check_tokens(args, given.get("processing_class"))
    for name, dataset in _data_sets(given):
        for column in _find_columns(name, dataset, [("prompt", "chosen", "rejected"), ("chosen", "rejected")]):
            list(_rows(name, dataset, column))
        if args.precompute_ref_log_probs and not isinstance(dataset, Dataset):
            raise ValueError(
                f"precompute_ref_log_probs=True needs rows that can be read twice, and {name} is a stream. Load it "
                "without streaming, or set precompute_ref_log_probs=False."
            )
        if args.precompute_ref_log_probs and args.world_size > 1 and not dataset.cache_files:
            raise ValueError(
                f"precompute_ref_log_probs=True on {args.world_size} processes: the first of them writes the numbers "
                f"beside the files of {name}, and that is in memory alone. Save it with dataset.save_to_disk and load "
                "it from there, or set precompute_ref_log_probs=False."
            )
        if isinstance(dataset, Dataset) and "prompt" in dataset.column_names:
            _check_answers_are_left(name, dataset, args, given.get("processing_class"))
        _check_batch(name, dataset, args)


def _check_tokens(args: Any, tokenizer: Any) -> None:
    """Raise ValueError for a special token that the tokenizer does not have."""
    for field in ("eos_token", "pad_token"):
        token = getattr(args, field, None)
        if token is not None and tokenizer is not None and token not in tokenizer.get_vocab():
            raise ValueError(f"{field}={token!r} is no token of the tokenizer. Name one of its vocabulary.")


def _check_batch(name: str, dataset: Dataset | IterableDataset, args: Any) -> None:
    """Raise ValueError where the training rows make no whole batch, and smaller ones are dropped."""
    batch = args.per_device_train_batch_size * args.world_size
    dropped = name == "train_dataset" and args.dataloader_drop_last
    if dropped and isinstance(dataset, Dataset) and len(dataset) < batch:
        raise ValueError(
            f"{name} has {len(dataset)} rows, but a batch takes {batch} and dataloader_drop_last=True drops a "
            "smaller one, so no step would be made. Give more rows, or lower per_device_train_batch_size."
        )


def _check_answers_are_left(name: str, dataset: Dataset | IterableDataset, args: Any, tokenizer: Any) -> None:
    """Raise ValueError where `max_length` cuts off every answer: TRL would drop every row."""
    packed = getattr(args, "packing", False)
    if args.max_length is None or packed or args.truncation_mode != "keep_start" or tokenizer is None:
        return
    shortest = None
    for _, prompt in _rows(name, dataset, "prompt"):
        length = len(_tokenize(prompt, tokenizer, None))
        if length < args.max_length:
            return
        shortest = min(length, shortest or length)
    if shortest is not None:
        raise ValueError(
            f"max_length={args.max_length} leaves no answer: prompts of {name} have {shortest} tokens or more. Raise "
            "max_length, or set it to None."
        )


def check_text(where: str, value: object) -> None:
    """Raise ValueError unless `value` is text, or messages that have a role and a content."""
    wrong = "is neither text nor a list of messages"
    if isinstance(value, list):
        wrong = "" if value else "has no messages"
        for message in value:
            # `from` and `value` are ShareGPT's; a call of a tool has no content
            known = isinstance(message, Mapping) and ("role" in message or "from" in message)
            if not known or (message.get("content", message.get("value")) is None and not message.get("tool_calls")):
                wrong = "has a message without role or content"
    if wrong and not isinstance(value, str):
        shown = repr(value) if len(repr(value)) < 100 else f"{repr(value)[:100]}…"
        raise ValueError(f"{where}={shown} {wrong}. Fill it in, or drop the row with dataset.filter(…).")


def check_steps(steps: int) -> None:
    """Raise ValueError after a run that made no optimizer step."""
    if steps == 0:
        raise ValueError(
            "train_dataset gave no whole batch, so no optimizer step was made and the model is untrained. Give more "
            "rows, or lower per_device_train_batch_size or gradient_accumulation_steps."
        )


def _data_sets(given: Mapping[str, Any]) -> Iterator[tuple[str, Dataset | IterableDataset]]:
    """The data sets among a trainer's arguments, by name; those of an evaluation may be several."""
    for name in ("train_dataset", "eval_dataset"):
        value = given.get(name)
        several = {f"{name}[{key!r}]": one for key, one in value.items()} if isinstance(value, Mapping) else {}
        for key, dataset in (several or {name: value}).items():
            if isinstance(dataset, Dataset | IterableDataset):
                yield key, dataset


def _find_columns(name: str, dataset: Dataset | IterableDataset, wanted: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The first of the wanted groups of columns that is there; none of a stream that does not know its columns."""
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{name} is empty. Give it rows.")
    known = dataset.column_names
    for columns in wanted:
        if known is None or set(columns) <= set(known):
            return columns if known is not None else ()
    raise ValueError(
        f"{name} has the columns {', '.join(known or [])}, and needs {' or '.join(map('+'.join, wanted))}. Rename one "
        "with dataset.rename_column(old, new)."
    )


def _rows(name: str, dataset: Dataset | IterableDataset, column: str) -> Iterator[tuple[int, Any]]:
    """Row number and checked value of a column of text or messages. A stream, which is read once, gives none."""
    if isinstance(dataset, Dataset):
        batches = dataset.select_columns([column]).iter(1000)
        for row, value in enumerate(value for batch in batches for value in batch[column]):
            check_text(f"{name} row {row}: {column}", value)
            yield row, value


def _tokenize(prompt: Any, tokenizer: Any, template_kwargs: dict | None) -> list[int]:
    """The tokens of a prompt, as TRL makes them."""
    if isinstance(prompt, str):
        return tokenizer(text=prompt)["input_ids"]
    return tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **(template_kwargs or {})
    )["input_ids"]
