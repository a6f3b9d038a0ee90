"""Masked-diffusion SFT: the loss against a slow oracle, the canvas rule, the draws, and real runs of TRL's trainer."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig

from trl_dllm import DiffusionSFTConfig, DiffusionSFTTrainer
from trl_dllm.blocks import Blocks
from trl_dllm.models import MaskedDiffusionSpec, create_tiny_model
from trl_dllm.noise import Purpose, hash64, row_seeds, uniform
from trl_dllm.trainer import sft_trainer
from trl_dllm.trainer.sft_trainer import AnswerCollator, masked_diffusion_view


torch.set_num_threads(1)

# Rows differ in prompt length, answer length and total length: equal rows would hide wrong normalisers.
PROMPTS = ["copy abc:", "x:", "", "12345678 :", "q", "copy:"]
COMPLETIONS = ["abc", "a longer answer", "b", "1", "yes, no", "0123456789"]
EOS = 1


def dataset(prompts=PROMPTS, completions=COMPLETIONS):
    return Dataset.from_dict({"prompt": list(prompts), "completion": list(completions)})


def config(folder, **kwargs):
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "seed": 11,
    }
    return DiffusionSFTConfig(str(folder), **{**defaults, **kwargs})


def tiny(family="llada", **kwargs):
    return create_tiny_model(family, **{"hidden_size": 16, "num_layers": 2, **kwargs})


def trainer(folder, model=None, data=None, eval_dataset=None, peft_config=None, **kwargs):
    built, tokenizer = tiny()
    return DiffusionSFTTrainer(
        built if model is None else model,
        config(folder, **kwargs),
        train_dataset=dataset() if data is None else data,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def losses(run, key="loss"):
    return [entry[key] for entry in run.state.log_history if key in entry]


def watch(monkeypatch):
    """Record the views that training builds."""
    views = []

    def recorded(*args):
        views.append(masked_diffusion_view(*args))
        return views[-1]

    monkeypatch.setitem(sft_trainer.OBJECTIVES, "masked_diffusion", recorded)
    return views


# ---------------------------------------------------------------------------------------------------- the loss


def oracle(model, batch, seeds, spec, eps, loss_weight):
    """Row by row and token by token, unpadded, from full logits."""
    total = 0.0
    for ids, labels, seed in zip(batch["input_ids"], batch["labels"], seeds, strict=True):
        length = len(ids)
        while labels[length - 1] == -100:  # right padding
            length -= 1
        answer = [i for i in range(length) if labels[i] != -100 and i >= spec.logits_shift]
        t = eps + (1 - eps) * float(uniform(seed, Purpose.SFT, 0))
        noised, masked = ids[:length].clone(), []
        for place, i in enumerate(answer):
            # given that something is masked: the chance of this token being the first, until one is
            chance = t if masked else t / (1 - (1 - t) ** (len(answer) - place))
            if place == len(answer) - 1 and not masked:
                chance = 1.0
            if float(uniform(seed, Purpose.SFT, 1, place)) < chance:
                masked.append(i)
                noised[i] = spec.mask_token_id
        assert masked
        weight = (1 - (1 - t) ** len(answer)) / t if loss_weight == "1/t" else 1.0
        for i in masked:
            if spec.blocks is None:
                logits = model(noised[None]).logits[0]
            else:  # the token's block in the noised row, behind clean ones, by a mask of all pairs
                size, prompt = spec.block_size, answer[0]
                start = prompt if spec.block_alignment == "canvas" else 0
                block = [(p - start) // size for p in range(length)]
                shown = torch.tensor([int(noised[p] if block[p] == block[i] else ids[p]) for p in range(length)])
                allowed = torch.tensor([[[[k <= q for k in block] for q in block]]])
                logits = model(shown[None], attention_mask=allowed).logits[0]
            row = logits[i - spec.logits_shift].clone()
            row[spec.mask_token_id] = -math.inf
            total = total - weight / len(answer) * row.log_softmax(dim=0)[ids[i]]
    return total / len(batch["input_ids"])


@pytest.mark.parametrize("loss_weight", ["1/t", "none"])
@pytest.mark.parametrize("family", ["llada", "dream", "sdar position", "sdar canvas"])
def test_loss_and_gradient_equal_a_slow_oracle(family, loss_weight, tmp_path):
    family, *alignment = family.split()
    model, _ = tiny(family)
    model = model.double()
    if alignment:
        model.config.block_alignment = alignment[0]
    run = trainer(tmp_path, model, loss_weight=loss_weight, mask_eps=0.2, canvas_length=6)
    batch = run.data_collator(list(run.train_dataset))
    assert len({int(n) for n in batch["attention_mask"].sum(dim=1)}) > 3
    run.model.train()
    loss = run.compute_loss(run.model, dict(batch))
    loss.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()

    seeds = row_seeds(11, 0, 0, 0, torch.arange(len(PROMPTS)))
    expected = oracle(model, batch, seeds, MaskedDiffusionSpec.from_model(model), 0.2, loss_weight)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(gradient, model.model.layers[0].mlp.up_proj.weight.grad, atol=1e-6, rtol=1e-6)


def view_of(lengths, loss_weight="1/t", eps=1e-3, rows=20000, family="llada"):
    prompt, answer, padding = lengths
    width = prompt + answer + padding
    ids = torch.arange(10, 10 + width).expand(rows, -1)
    columns = torch.arange(width)
    is_answer = ((columns >= prompt) & (columns < prompt + answer)).expand(rows, -1)
    seeds = row_seeds(0, 0, 0, 0, torch.arange(rows))
    args = SimpleNamespace(mask_eps=eps, loss_weight=loss_weight)
    spec = MaskedDiffusionSpec.from_model(tiny(family)[0])
    mask = (columns < prompt + answer).long().expand(rows, -1)
    return masked_diffusion_view(ids, mask, is_answer, seeds, spec, args), spec


@pytest.mark.parametrize("answer", [1, 2, 5])
def test_weights_are_unbiased_and_bounded_for_answers_of_any_length(answer):
    view, _ = view_of((3, answer, 2))
    counted = torch.where(view.targets != -100, view.weight, 0.0) * answer
    # Every token is expected to count once (standard error below 0.02). Masking one token by force where none was
    # drawn, and weighing it 1/t, would make this 6.9 for a single token.
    assert counted.mean(dim=0)[3 : 3 + answer].tolist() == pytest.approx([1.0] * answer, abs=0.05)
    assert float(view.weight.max()) <= 1 + 1e-12  # 1/t · P(any) / n


def test_masks_only_the_answer_and_always_something():
    view, spec = view_of((4, 5, 3), loss_weight="none")
    masked = view.targets != -100
    assert not masked[:, :4].any() and not masked[:, 9:].any()
    assert masked.any(dim=1).all() and masked[:, 4:9].any(dim=0).all() and (masked.sum(dim=1) == 5).any()
    assert ((view.input_ids == spec.mask_token_id) == masked).all()
    assert (view.targets[masked] == torch.arange(10, 22).expand_as(masked)[masked]).all()
    assert (view.weight == 1 / 5).all()
    # All tokens of an answer are treated alike. Given that any is masked, P(masked) = E[t / (1-(1-t)^5)].
    t = torch.linspace(1e-3, 1, 100001, dtype=torch.float64)
    expected = float((t / (1 - (1 - t) ** 5)).mean())
    assert masked.double().mean(dim=0)[4:9].tolist() == pytest.approx([expected] * 5, abs=0.02)


def test_mask_eps_one_masks_every_answer_token():
    view, _ = view_of((2, 4, 1), eps=1.0, rows=50)
    assert ((view.targets != -100) == torch.tensor([0, 0, 1, 1, 1, 1, 0]).bool()).all()
    assert (view.weight == 1 / 4).all()


def test_draws_do_not_depend_on_prompt_or_padding():
    narrow, wide = view_of((0, 5, 0), rows=50)[0], view_of((3, 5, 4), rows=50)[0]
    assert ((narrow.targets != -100) == (wide.targets != -100)[:, 3:8]).all()


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_plain_text_is_all_answer_but_for_a_row_that_nothing_predicts(family, tmp_path):
    model, _ = tiny(family)
    run = trainer(tmp_path, model, Dataset.from_dict({"text": ["hello", "a"]}), mask_eps=1.0)
    batch = run.data_collator(list(run.train_dataset))
    assert (batch["labels"][0] == batch["input_ids"][0]).all() and batch["labels"][0, -1] == EOS
    model.eval()
    _, scores = run.compute_loss(model, dict(batch), return_outputs=True)
    expected = torch.tensor([[1] * 6, [1] * 2 + [0] * 4]).bool()
    expected[:, 0] = family == "llada"
    assert (scores.scored == expected).all()


def test_a_row_without_answer_adds_nothing(tmp_path):
    run = trainer(tmp_path)
    run.model.eval()
    batch = run.data_collator([{"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}])
    both = run.data_collator(
        [{"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}, {"input_ids": [7, 8], "labels": [-100, -100]}]
    )
    one, two = run.compute_loss(run.model, batch), run.compute_loss(run.model, both)
    assert two.item() == pytest.approx(one.item() / 2, rel=1e-6)


# --------------------------------------------------------------------------------------------------- the canvas


@pytest.mark.parametrize(
    ("canvas", "block", "answer", "expected"),
    [
        (None, None, [5, 6, EOS], [5, 6, EOS]),
        (None, None, [5, 6], [5, 6, EOS]),  # a chat template without EOS
        (None, None, [5, EOS, 6], [5, EOS, 6]),  # one that writes a newline behind it
        (5, None, [5, 6, EOS], [5, 6, EOS, EOS, EOS]),
        (2, None, [5, 6, EOS], [5, 6, EOS]),
        (None, 4, [5, 6, EOS], [5, 6, EOS, EOS]),
        (None, 4, [5, 6, 7, EOS], [5, 6, 7, EOS]),
        (None, 4, [5, 6, 7, 8], [5, 6, 7, 8, EOS, EOS, EOS, EOS]),
        (4, 2, [5, 6, 7, 8, EOS], [5, 6, 7, 8, EOS, EOS]),
        (8, 4, [5, EOS], [5, EOS] + [EOS] * 6),
    ],
)
def test_answers_are_filled_with_eos_which_is_a_target(canvas, block, answer, expected):
    collator = AnswerCollator(pad_token_id=0, eos_token_id=EOS, canvas_length=canvas, block_length=block)
    short = {"input_ids": [9] * 3 + answer, "labels": [-100] * 3 + answer}
    long = {"input_ids": [9] * 20 + [5, EOS], "labels": [-100] * 20 + [5, EOS]}
    batch = collator([short, long])
    used = 3 + len(expected)
    assert batch["input_ids"][0, :used].tolist() == [9] * 3 + expected
    assert batch["labels"][0].tolist() == [-100] * 3 + expected + [-100] * (batch["labels"].shape[1] - used)
    assert batch["attention_mask"][0].tolist() == [1] * used + [0] * (batch["labels"].shape[1] - used)


@pytest.mark.parametrize(
    ("alignment", "canvas", "answer", "filled"),
    [
        ("position", None, [5, EOS], 5),  # behind three prompt tokens, up to position 8
        ("position", None, [5, 6, 7, 8, EOS], 5),
        ("position", 6, [5, EOS], 9),
        ("canvas", None, [5, EOS], 4),
        ("canvas", 6, [5, EOS], 8),
    ],
)
def test_answers_of_a_block_causal_model_are_filled_to_the_end_of_a_block(alignment, canvas, answer, filled):
    """What is decoded is whole blocks, so that masks behind an EOS are seen in training too."""
    collator = AnswerCollator(pad_token_id=0, eos_token_id=EOS, canvas_length=canvas, blocks=Blocks(4, alignment))
    batch = collator([{"input_ids": [9] * 3 + answer, "labels": [-100] * 3 + answer}])
    assert batch["labels"][0].tolist() == [-100] * 3 + answer + [EOS] * (filled - len(answer))


def test_an_answer_cut_by_max_length_gets_no_eos(tmp_path):
    """One that is whole at just that length, its EOS included, is filled like any other."""
    run = trainer(tmp_path, data=dataset(["p:"] * 3, ["abcdef", "ab", "abc"]), max_length=6, canvas_length=8)
    batch = run.data_collator(list(run.train_dataset))
    assert (batch["labels"][0] == EOS).sum() == 0 and (batch["labels"][0] != -100).sum() == 4
    assert (batch["labels"][1] == EOS).sum() == 6 and (batch["labels"][1] != -100).sum() == 8
    assert len(run.train_dataset[2]["input_ids"]) == 6 and run.train_dataset[2]["input_ids"][-1] == EOS
    assert (batch["labels"][2] == EOS).sum() == 5 and (batch["labels"][2] != -100).sum() == 8


def test_labels_with_a_gap_are_refused():
    with pytest.raises(ValueError, match="prompt/completion"):
        AnswerCollator(pad_token_id=0, eos_token_id=EOS)([{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}])


def test_conversations(tmp_path):
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
    split = trainer(tmp_path, data=Dataset.from_dict({"prompt": [[user]], "completion": [[assistant]]}))
    whole = trainer(tmp_path, data=Dataset.from_dict({"messages": [[user, assistant]]}))
    split_batch = split.data_collator(list(split.train_dataset))
    whole_batch = whole.data_collator(list(whole.train_dataset))
    tokenizer = split.processing_class
    assert tokenizer.decode(split_batch["input_ids"][0]) == "u:hi\na:yo\n<eos>"
    assert tokenizer.decode(split_batch["labels"][0][split_batch["labels"][0] != -100]) == "yo\n<eos>"
    assert (whole_batch["labels"] == split_batch["input_ids"]).all()


# ---------------------------------------------------------------------------------------------- real trainer runs


def test_loss_is_the_mean_over_rows_however_the_step_is_split(tmp_path):
    # 6 rows: the last micro-batch of 4 + 2 is smaller, which a mean of means gets wrong.
    results = []
    for size, accumulation, checkpointing in ((8, 1, False), (4, 2, True), (2, 3, False)):
        run = trainer(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=checkpointing,
            max_steps=3,
            learning_rate=1e-2,
            optim="sgd",
        )
        run.train()
        results.append((losses(run), losses(run, "grad_norm"), run.model.lm_head.weight.detach().clone()))
    for loss, norm, weight in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-5)
        assert norm == pytest.approx(results[0][1], rel=1e-4)
        torch.testing.assert_close(weight, results[0][2], atol=1e-6, rtol=0)


def test_a_rows_seed_does_not_depend_on_the_number_of_processes(tmp_path):
    run = trainer(tmp_path, per_device_train_batch_size=2)
    run.model.train()
    inputs = {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    alone, together = [], []
    for micro in range(4):
        run._micro_step = micro
        alone += run._seeds(inputs).tolist()
    for micro in range(2):
        for rank in range(2):
            run.accelerator, run._micro_step = SimpleNamespace(num_processes=2, process_index=rank), micro
            together += run._seeds(inputs).tolist()
    assert alone == together and len(set(alone)) == 8


def test_draws_differ_between_steps_and_repeat_on_a_rerun_and_a_resume(tmp_path, monkeypatch):
    views = watch(monkeypatch)
    settings = {"per_device_train_batch_size": 6, "max_steps": 3, "learning_rate": 1e-3}
    first = trainer(tmp_path / "a", tiny("llada")[0], save_strategy="steps", save_steps=2, **settings)
    first.train()
    before = [(view.input_ids, view.targets) for view in views]

    del views[:]
    torch.manual_seed(5)  # the global generator plays no part
    second = trainer(tmp_path / "b", tiny("llada")[0], **settings)
    second.train()
    assert losses(second) == losses(first)
    for view, (ids, targets) in zip(views, before, strict=True):
        assert (view.input_ids == ids).all() and (view.targets == targets).all()

    del views[:]
    third = trainer(tmp_path / "a", tiny("llada")[0], save_strategy="steps", save_steps=2, **settings)
    third.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert len(views) == 1 and (views[0].targets == before[2][1]).all()
    assert losses(third)[-1] == pytest.approx(losses(first)[-1], abs=1e-6)


def test_an_adapter_that_does_not_fit_is_not_resumed_from(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj"])
    trainer(tmp_path, peft_config=lora, save_strategy="steps", save_steps=1, max_steps=1).train()
    path = tmp_path / "checkpoint-1" / "adapter_model.safetensors"
    save_file({key.replace("o_proj", "other"): value for key, value in load_file(path).items()}, path)
    for file in (path.parent / "manifest.json", *path.parent.glob("process_state*")):
        file.unlink()  # as from stock TRL: the sizes would tell first
    with pytest.raises(ValueError, match=r"no place for: .*other.lora_A.weight, .*no weights for: .*o_proj"):
        trainer(tmp_path, peft_config=lora, max_steps=2).train(resume_from_checkpoint=str(path.parent))


def test_equal_rows_are_masked_differently_in_a_step_and_between_steps(tmp_path, monkeypatch):
    views = watch(monkeypatch)
    run = trainer(
        tmp_path,
        data=dataset(["p:"] * 4, ["0123456789"] * 4),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
    )
    run.train()
    drawn = torch.cat([view.targets for view in views])
    assert len(views) == 6 and len(drawn.unique(dim=0)) == 12


def test_evaluation_masks_a_row_alike_at_every_step_and_batch_size(tmp_path):
    found = []
    for size in (2, 3):
        run = trainer(
            tmp_path,
            eval_dataset=dataset(),
            learning_rate=0.0,
            max_steps=3,
            eval_strategy="steps",
            eval_steps=1,
            per_device_eval_batch_size=size,
        )
        run.train()
        found += losses(run, "eval_loss")
        assert 0 < losses(run, "eval_masked_fraction")[0] <= 1
    assert len(found) == 6 and found == pytest.approx([found[0]] * 6, abs=1e-5)
    output = run.predict(run.eval_dataset)
    assert output.metrics["test_loss"] == pytest.approx(found[0], abs=1e-5) and output.predictions is None


def test_evaluation_draws_differ_between_rows():
    ids = torch.arange(12).view(4, 3)
    content = hash64(torch.arange(3), ids).sum(dim=1)
    assert len(set(row_seeds(0, 1, 0, 0, content).tolist())) == 4


def test_training_learns_to_copy(tmp_path):
    words = [f"{a}{b}" for a in "abcd" for b in "abcd"]
    model, _ = tiny(hidden_size=32)
    run = trainer(
        tmp_path,
        model,
        dataset([f"{word}:" for word in words], words),
        loss_weight="none",
        max_steps=150,
        learning_rate=1e-2,
        per_device_train_batch_size=16,
        gradient_checkpointing=True,
        logging_steps=15,
    )
    run.train()
    found = losses(run)
    assert found[0] > 1.0 and found[-1] < 0.1 * found[0], found
    logged = run.state.log_history[0]
    assert 0 < logged["masked_fraction"] < 1 and logged["entropy"] > 0 and logged["num_tokens"] == 15 * 16 * 6


def changed(model, before):
    return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


def test_lora_and_a_model_from_a_path(tmp_path):
    model, tokenizer = tiny("dream")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run = DiffusionSFTTrainer(
        str(tmp_path / "model"),
        config(tmp_path / "out", max_steps=2, learning_rate=1e-2, gradient_checkpointing=True),
        train_dataset=dataset(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    )
    assert run.spec.logits_shift == 1
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.train()
    moved = changed(run.model, before)
    assert moved and all("lora_" in name for name in moved)
    assert {"q_proj", "up_proj"} == {name.split(".lora_")[0].split(".")[-1] for name in moved}


@pytest.mark.parametrize("reentrant", [False, True])
def test_only_trainable_modules_are_trained(reentrant, tmp_path):
    run = trainer(
        tmp_path,
        trainable_modules=["q_proj", "layers.1.mlp"],
        max_steps=1,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.train()
    expected = {name for name in before if "q_proj" in name or "layers.1.mlp" in name}
    assert changed(run.model, before) == expected and len(expected) == 5


# ------------------------------------------------------------------------------------------------------- errors


def test_a_stock_config_runs_and_a_wrong_one_is_refused(tmp_path):
    model, tokenizer = tiny()
    stock = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, save_strategy="no")
    run = DiffusionSFTTrainer(model, stock, train_dataset=dataset(), processing_class=tokenizer)
    run.train()
    assert isinstance(run.args, DiffusionSFTConfig) and run.args.loss_weight == "1/t"
    stock.packing = True
    with pytest.raises(ValueError, match="packing"):
        DiffusionSFTTrainer(model, stock, train_dataset=dataset(), processing_class=tokenizer)


def test_unknown_trainable_modules_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'qproj'.*q_proj"):
        trainer(tmp_path, trainable_modules=["k_proj", "qproj"])


def test_arguments_that_do_not_apply(tmp_path):
    model, tokenizer = tiny()
    build = {"train_dataset": dataset(), "processing_class": tokenizer}
    with pytest.raises(ValueError, match="compute_metrics"):
        DiffusionSFTTrainer(model, config(tmp_path), compute_metrics=lambda prediction: {}, **build)
    with pytest.raises(ValueError, match="virtual tokens"):
        trainer(tmp_path, peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="target_modules"):
        trainer(tmp_path, peft_config=LoraConfig(target_modules=["q_proj"]), trainable_modules=["q_proj"])
    with pytest.raises(ValueError, match="data_collator"):
        DiffusionSFTTrainer(model, config(tmp_path, canvas_length=8), data_collator=lambda rows: {}, **build)


def test_an_autoregressive_model_is_refused_before_its_weights_load(tmp_path, monkeypatch):
    _, tokenizer = tiny()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match="is_causal"):
        DiffusionSFTTrainer(str(tmp_path), config(tmp_path / "out"), train_dataset=dataset())
