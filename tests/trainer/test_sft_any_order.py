"""SFT that makes an any-order model: docs/methods.md §5."""

from types import SimpleNamespace

import pytest
import torch
from cases import EOS, MASK, VOCAB, assert_same_rollout, sample_any_order, whole_canvas
from datasets import Dataset
from oracles import left_pad, next_logits, random_rollout, sharp_model, token_distribution
from peft import LoraConfig

from trl_dllm import DiffusionSFTConfig, DiffusionSFTTrainer
from trl_dllm.likelihood import AnyOrder, token_logps
from trl_dllm.models import MaskedDiffusionSpec, create_tiny_model
from trl_dllm.noise import Purpose, row_seeds, uniform
from trl_dllm.trainer.sft_trainer import any_order_view


# The widest row has a short answer.
PROMPTS = ["copy abc:", "x:", "", "a prompt wider than all other rows :", "q"]
TEXTS = (PROMPTS, ["abc", "a longer answer", "b", "1", "yes, no"])


def sft_config(folder, **kwargs):
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 5,
        "seed": 11,
        "objective": "any_order",
    }
    return DiffusionSFTConfig(str(folder), **{**defaults, **kwargs})


def sft_trainer(folder, model=None, peft_config=None, **kwargs):
    built, tokenizer = create_tiny_model("llada", hidden_size=16, num_layers=2)
    return DiffusionSFTTrainer(
        built if model is None else model,
        sft_config(folder, **kwargs),
        train_dataset=Dataset.from_dict({"prompt": TEXTS[0], "completion": TEXTS[1]}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def slow_order(seed, count: int, block: int) -> list[int]:
    """Answer positions in the order in which they are predicted: blocks left to right, random within each."""
    draws = [float(uniform(seed, Purpose.SFT, 2, place)) for place in range(count)]
    order = []
    for start in range(0, count, block):
        order += sorted(range(start, min(start + block, count)), key=lambda place: draws[place])
    return order


def slow_sft_loss(model, batch, seeds, block: int):
    """Row by row and token by token, unpadded: each answer token from the prompt and those before it in the order."""
    total = 0.0
    for ids, labels, seed in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), seeds, strict=True):
        answer = [token for token, label in zip(ids, labels, strict=True) if label != -100]
        prompt = ids[: next(i for i, label in enumerate(labels) if label != -100)]
        order = slow_order(seed, len(answer), block)
        for rank, place in enumerate(order):
            before = [(other, answer[other]) for other in order[:rank]]
            p = token_distribution(next_logits(model, prompt, before, [place])[0], MASK)
            total = total - p[answer[place]].log() / len(answer)
    return total / len(batch["input_ids"])


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("block", [4, 16])
def test_sft_loss_and_gradient_equal_a_slow_oracle(tmp_path, attn, block):
    """Eq. 73 over the answer's length; the EOS that fill a block up are counted; permutation within blocks alone."""
    model = sharp_model("llada", attn_implementation=attn)
    run = sft_trainer(tmp_path, model, block_length=block, trainable_modules=["all"])
    batch = run.data_collator(list(run.train_dataset))
    lengths = (batch["labels"] != -100).sum(dim=1).tolist()
    assert lengths == ([4, 16, 4, 4, 8] if block == 4 else [16] * 5) and (batch["labels"] == EOS).sum() > 5
    run.model.train()
    run.compute_loss(run.model, dict(batch)).backward()
    weight = model.model.layers[0].mlp.up_proj.weight
    loss, gradient = run.compute_loss(run.model, dict(batch)), weight.grad.clone()
    model.zero_grad()
    run._micro_step = 0
    model.set_attn_implementation("eager")
    expected = slow_sft_loss(model, batch, row_seeds(11, 0, 0, 0, torch.arange(5)), block)
    expected.backward()
    run.model.eval()
    assert abs(first_loss(run, batch).item() - expected.item()) < 1e-6
    torch.testing.assert_close(gradient, weight.grad, atol=1e-6, rtol=1e-6)
    assert abs(loss.item() - expected.item()) > 1e-6, "a second micro-batch of the step draws other orders"


def first_loss(run, batch):
    """The loss of the first micro-batch of the current step."""
    run.model.train()
    run._micro_step = 0
    with torch.no_grad():
        return run.compute_loss(run.model, dict(batch))


# --------------------------------------------------------------------------------------------------------------- views


def sft_view(lengths=(3, 8, 2), block=4, rows=6, seeds=None):
    prompt, answer, padding = lengths
    columns = torch.arange(prompt + answer + padding)
    ids = (10 + columns).expand(rows, -1)
    is_answer = ((columns >= prompt) & (columns < prompt + answer)).expand(rows, -1)
    mask = (columns < prompt + answer).long().expand(rows, -1)
    seeds = row_seeds(0, 0, 0, 0, torch.arange(rows)) if seeds is None else seeds
    spec = MaskedDiffusionSpec(MASK)
    return any_order_view(ids, mask, is_answer, seeds, spec, SimpleNamespace(block_length=block)), seeds


def test_sft_attention_by_loops():
    """Clean: ranks up to its own; mask: ranks below its own, and itself; prompt: the prompt; padding: itself alone."""
    prompt, answer, padding, block = 3, 8, 2, 4
    view, seeds = sft_view((prompt, answer, padding), block)
    allowed, width = view.attention.allowed(), prompt + answer + padding
    for row in range(6):
        order = slow_order(int(seeds[row]), answer, block)
        rank = {place: order.index(place) for place in range(answer)}
        assert sorted(order[:block]) == list(range(block)), "blocks go left to right"
        for q in range(width + answer):
            for k in range(width + answer):
                if q == k:
                    expected = True
                elif k >= width or prompt + answer <= k < width:  # masks and padding are seen by themselves alone
                    expected = False
                elif q < prompt:
                    expected = k < prompt
                elif q < prompt + answer:
                    expected = k < prompt or rank[k - prompt] <= rank[q - prompt]
                elif q < width:
                    continue  # what padding sees is of no consequence, as nobody sees padding
                else:
                    expected = k < prompt or rank[k - prompt] < rank[q - width]
                assert bool(allowed[row, q, k]) == expected, (row, q, k)
        assert view.position_ids[row].tolist() == [*range(width), *range(prompt, prompt + answer)]
        assert view.input_ids[row, width:].tolist() == [MASK] * answer
        assert view.targets[row].tolist() == [-100] * width + list(range(10 + prompt, 10 + prompt + answer))


def test_sft_orders_are_uniform_within_a_block_and_ignore_prompt_and_padding():
    rows = 4000
    seeds = row_seeds(0, 0, 0, 0, torch.arange(rows))
    narrow, _ = sft_view((0, 6, 0), 3, rows, seeds)
    wide, _ = sft_view((3, 6, 4), 3, rows, seeds)
    rank = narrow.attention.reach[:, 6:]  # a mask sees the levels of the ranks below its own
    assert torch.equal(rank, wide.attention.reach[:, 13:])
    assert torch.equal(rank[:, :3].sort(dim=1).values, torch.arange(3).expand(rows, -1))
    assert torch.equal(rank[:, 3:].sort(dim=1).values, torch.arange(3, 6).expand(rows, -1))
    _, counts = rank.unique(dim=0, return_counts=True)
    assert len(counts) == 36 and (counts - rows / 36).abs().max() < 5 * (rows / 36) ** 0.5


def test_sft_draws_change_with_the_step_and_the_row(tmp_path):
    run = sft_trainer(tmp_path, block_length=16, trainable_modules=["all"])
    batch = run.data_collator(list(run.train_dataset))
    found = [first_loss(run, batch).item()]
    run.state.global_step = 1
    found.append(first_loss(run, batch).item())
    run.state.global_step = 0
    found.append(first_loss(run, batch).item())
    assert found[0] != found[1] and found[0] == found[2]
    same = {name: value[1:2].repeat(4, 1) for name, value in batch.items()}
    view = any_order_view(
        same["input_ids"], same["attention_mask"], same["labels"] != -100, run._seeds(same), run.spec, run.args
    )
    assert len(view.attention.reach.unique(dim=0)) == 4


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"q_proj", "k_proj", "v_proj"}),
        ({"gradient_checkpointing": True}, {"q_proj", "k_proj", "v_proj"}),
        ({"trainable_modules": ["up_proj"]}, {"up_proj"}),
        ({"trainable_modules": ["all"]}, None),
        ({"peft_config": LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")}, {"o_proj"}),
    ],
    ids=["default", "checkpointing", "one", "all", "lora"],
)
def test_sft_trains_q_k_v_unless_told_otherwise(tmp_path, settings, expected):
    model, _ = create_tiny_model("llada", hidden_size=16, num_layers=2)
    run = sft_trainer(tmp_path, model, max_steps=2, learning_rate=1e-2, block_length=4, **settings)
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.train()
    moved = {name for name, value in run.model.named_parameters() if not torch.equal(value, before[name])}
    if expected is None:
        assert moved == set(before)
    else:
        modules = {name.split(".lora_")[0].removesuffix(".weight").split(".")[-1] for name in moved}
        assert modules == expected and len(moved) == 2 * len(expected) * (2 if "peft_config" in settings else 1)
    assert torch.tensor([entry["loss"] for entry in run.state.log_history if "loss" in entry]).isfinite().all()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model after any-order SFT on words written twice, in float32: `(model, mean log-prob before, after)`."""
    model, tokenizer = create_tiny_model("llada", hidden_size=32, num_layers=2)
    letters = "abcdefgh"
    words = [a + b + c for a in letters for b in letters for c in letters]
    data = Dataset.from_dict({"prompt": [f"{w}:" for w in words], "completion": [w + w[::-1] for w in words]})
    prompts = [tokenizer(text=f"{w}:")["input_ids"] for w in words[:24]]
    completions = torch.tensor([tokenizer(text=w + w[::-1])["input_ids"] + [EOS, EOS] for w in words[:24]])
    steps = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i)) // 2 for i in range(24)])
    ids, mask = left_pad(prompts)
    rollout = random_rollout(MASK, VOCAB, 0, canvas=8, num_steps=(1,), prompt_lengths=(1,), dtype=torch.float32)
    rollout = type(rollout)(
        prompt_ids=ids,
        prompt_mask=mask,
        completion_ids=completions,
        unmask_step=steps,
        logps=torch.zeros(24, 8),
        counted=torch.ones(24, 8).bool(),
        view_seed=torch.arange(24),
        mask_token_id=MASK,
    )

    def mean_logp():
        with torch.no_grad():
            return token_logps(model, rollout, AnyOrder()).logps.mean().item()

    before = mean_logp()
    trainer = DiffusionSFTTrainer(
        model,
        sft_config(
            tmp_path_factory.mktemp("sft"),
            trainable_modules=["all"],
            canvas_length=8,
            block_length=8,
            max_steps=150,
            per_device_train_batch_size=32,
            learning_rate=1e-2,
            logging_steps=50,
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    model.eval()
    return model, before, mean_logp()


def test_sft_makes_an_any_order_model(trained):
    """Held against random orders, two tokens a step: from 1/V to a model that has learned the words."""
    _, before, after = trained
    assert before < -4 and after > before + 2.5, (before, after)


def test_identity_3_on_a_trained_model_and_on_a_fresh_one(trained):
    """The trained model is sharp, the fresh one gives every token 1/V (the mask included)."""
    for model in (trained[0], create_tiny_model("llada", hidden_size=16, num_layers=1)[0].eval()):
        cached, uncached = (sample_any_order(model, cache, tokens_per_step=2) for cache in ("exact", None))
        assert_same_rollout(cached, uncached)
        with torch.no_grad():
            scores = token_logps(model, whole_canvas(cached), AnyOrder())
        torch.testing.assert_close(scores.logps, cached.logps, atol=1e-5, rtol=0)
