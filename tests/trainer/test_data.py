"""Data sets: what gives no step, no prompt or no text is refused before weights load, by row and remedy."""

import pytest
from datasets import Dataset, IterableDataset
from helpers_grpo import PROMPTS, build, chat_prompts, config, reward, text_prompts, tiny

from trl_dllm import DiffusionGRPOTrainer, DiffusionSFTConfig, DiffusionSFTTrainer
from trl_dllm.trainer.data import check_text


def rows(**columns) -> Dataset:
    return Dataset.from_dict(columns)


def chat(content) -> list[dict]:
    return [{"role": "user", "content": content}]


def sft(folder, data, model=None, eval_dataset=None, **settings):
    own, tokenizer = tiny()
    args = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "max_steps": 1}
    args = DiffusionSFTConfig(str(folder), **{**args, **settings})
    return DiffusionSFTTrainer(
        model or own, args, train_dataset=data, eval_dataset=eval_dataset, processing_class=tokenizer
    )


# data -> what the message says
NO_PROMPTS = [
    (rows(prompt=[]), "train_dataset is empty. Give it rows"),
    (rows(question=["a"] * 8), "train_dataset has the columns question, and needs prompt. Rename"),
    (rows(prompt=["a", None] * 8), "train_dataset row 1: prompt=None is neither text nor a list of messages"),
    (rows(prompt=[chat("a"), [], chat("b")] * 8), r"train_dataset row 1: prompt=\[\] has no messages"),
    (rows(prompt=[chat("a"), chat(None)] * 8), "train_dataset row 1: .* has a message without role or content"),
    (rows(prompt=[3] * 8), "train_dataset row 0: prompt=3 is neither text nor"),
    (rows(prompt=["a"]), "train_dataset has 1 rows, but a generation batch takes 2 prompts .*no step would be made"),
    (rows(prompt=["a" * 4089] + ["b"] * 8), "train_dataset row 0: 4089 prompt tokens and max_completion_length=8 are"),
    (rows(prompt=[chat("a" * 4085)] + [chat("b")] * 8), "row 0: 4090 prompt tokens .*max_position_embeddings=4096"),
]


@pytest.mark.parametrize(("data", "message"), NO_PROMPTS, ids=[case[1][:40] for case in NO_PROMPTS])
def test_grpo_refuses_what_gives_no_prompt_or_no_step(tmp_path, checkpoint, no_weights, data, message):
    with pytest.raises(ValueError, match=message):
        DiffusionGRPOTrainer(checkpoint(), reward, config(tmp_path), train_dataset=data)


def test_grpo_takes_what_just_fits(tmp_path):
    """A batch of exactly the rows that there are, and a prompt and canvas of exactly the positions."""
    data = rows(prompt=["a" * (48 - 8), "b"])
    model, tokenizer = tiny(max_position_embeddings=48)
    trainer = build(tmp_path, model=model, tokenizer=tokenizer, data=data)
    trainer.train()
    assert trainer.state.global_step == 1
    with pytest.raises(ValueError, match="row 0: 41 prompt tokens and max_completion_length=8"):
        build(tmp_path, model=model, tokenizer=tokenizer, data=rows(prompt=["a" * 41, "b"]))


def test_a_canvas_beyond_the_models_positions_is_refused(tmp_path, checkpoint, no_weights):
    args = config(tmp_path, max_completion_length=4100, diffusion_steps=None)
    with pytest.raises(ValueError, match="max_completion_length=4100 are beyond the model's max_position_embeddings"):
        DiffusionGRPOTrainer(checkpoint(), reward, args, train_dataset=text_prompts())
    with pytest.raises(ValueError, match="canvas_length=4100 are beyond"):
        sft(tmp_path, rows(text=["a"]), model=checkpoint(), canvas_length=4100)


@pytest.mark.parametrize("named", [False, True])
def test_the_rows_of_an_evaluation_are_checked_too(tmp_path, named):
    evaluation = rows(prompt=["a", None])
    name = "eval_dataset"
    if named:
        evaluation, name = {"hard": evaluation}, r"eval_dataset\['hard'\]"
    with pytest.raises(ValueError, match=f"{name} row 1: prompt=None"):
        build(tmp_path, eval_dataset=evaluation)


def test_a_streams_prompts_are_checked_as_they_come(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}, {"prompt": None}] * 4))
    with pytest.raises(ValueError, match=r"row \d of a batch: prompt=None is neither text"):
        build(tmp_path, data=stream).train()


def test_a_stream_that_gives_no_batch_is_no_success(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))
    with pytest.raises(ValueError, match="no optimizer step was made and the model is untrained"):
        build(tmp_path, data=stream).train()


NO_TEXT = [
    (rows(text=[]), "train_dataset is empty"),
    (
        rows(prompt=["a"], answer=["b"]),
        "columns prompt, answer, and needs input_ids or messages or",
    ),
    (rows(prompt=["a", None], completion=["b", "c"]), "train_dataset row 1: prompt=None"),
    (rows(prompt=["a", "b"], completion=[None, "c"]), "train_dataset row 0: completion=None"),
    (rows(messages=[chat("a"), []]), r"train_dataset row 1: messages=\[\] has no messages"),
    (rows(text=["a", None]), "train_dataset row 1: text=None"),
]


@pytest.mark.parametrize(("data", "message"), NO_TEXT, ids=[case[1][:40] for case in NO_TEXT])
def test_sft_refuses_what_has_no_text(tmp_path, checkpoint, no_weights, data, message):
    with pytest.raises(ValueError, match=message):
        sft(tmp_path, data, model=checkpoint())


def test_sft_refuses_a_batch_that_would_be_dropped(tmp_path, checkpoint, no_weights):
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 4}
    with pytest.raises(ValueError, match="has 3 rows, but a batch takes 4 and dataloader_drop_last=True"):
        sft(tmp_path, rows(text=["abc"] * 3), model=checkpoint(), **settings)


@pytest.mark.parametrize("drop", [False, True])
def test_sft_takes_a_batch_that_is_not(tmp_path, drop):
    trainer = sft(
        tmp_path, rows(text=["abc"] * (4 if drop else 3)), dataloader_drop_last=drop, per_device_train_batch_size=4
    )
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    "value",
    [
        "",
        "text",
        chat("a"),
        chat([{"type": "text", "text": "a"}]),
        [{"from": "human", "value": "a"}],
        [{"role": "assistant", "content": None, "tool_calls": [{}]}],
    ],
    ids=str,
)
def test_text_and_messages_pass(value):
    check_text("row 0", value)


def test_a_long_value_is_shown_in_part():
    with pytest.raises(ValueError) as error:
        check_text("row 0", [{"role": "user"}] * 500)
    assert len(str(error.value)) < 300


def test_chat_prompts_train(tmp_path):
    assert len(PROMPTS) > 1
    build(tmp_path, data=chat_prompts()).train()


def test_sft_refuses_a_length_that_leaves_no_answer(tmp_path, checkpoint, no_weights):
    """TRL drops what is cut to the prompt alone; one row that is left is enough."""
    data = rows(prompt=["abcdefgh", "abcdefghij"], completion=["12", "34"])
    with pytest.raises(
        ValueError, match="max_length=8 leaves no answer: prompts of train_dataset have 8 tokens or more"
    ):
        sft(tmp_path, data, model=checkpoint(), max_length=8)
    assert len(sft(tmp_path, data, max_length=9).train_dataset) == 1
