"""Any-order models: the exact likelihood in one pass, both decoders, and the SFT that makes such a model.

docs/methods.md §2.2, §3.2, §5 and §7 (3, 4 and 7). The oracle knows neither the P + 2L layout nor a cache: for each
token it runs the prompt, the tokens revealed before it in their order, and one mask, under attention written with
plain loops.
"""

import importlib.util
import itertools
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from oracles import left_pad, random_rollout, sharp_model, slow_decode, token_distribution, unpadded
from peft import LoraConfig, get_peft_model

from trl_dllm import DiffusionGRPOConfig, DiffusionGRPOTrainer, DiffusionSFTConfig, DiffusionSFTTrainer
from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import (
    AnyOrder,
    BlockPseudoLikelihood,
    ExactTrajectory,
    MeanField,
    TrajectoryPseudoLikelihood,
    token_logps,
)
from trl_dllm.models import ForwardFlops, LLaDAConfig, LLaDAModelLM, MaskedDiffusionSpec, attention_mask
from trl_dllm.models import create_tiny_model as tiny_model
from trl_dllm.noise import Purpose, hash64, row_seeds, uniform
from trl_dllm.scripts import eval as evaluation
from trl_dllm.scripts.generate import generation_config
from trl_dllm.trainer.sft_trainer import any_order_view


MASK, VOCAB, EOS = 3, 101, 1
PROMPTS = [[17, 60, 9], [44, 8, 71, 25, 90, 33, 12], [55], [81, 20, 20, 67, 5]]
SEEDS = torch.tensor([9, -(2**50), 77, 2**61])
REMASKING = ["low_confidence", "margin", "entropy", "random", "left_to_right"]
THRESHOLDS = {"low_confidence": 0.15, "margin": 0.1, "entropy": -3.5, "random": 0.6}
CACHES = [None, "exact"]


# ------------------------------------------------------------------------------------------------- the oracle


def next_logits(model, prompt: list[int], before: list[tuple[int, int]], positions: list[int]) -> torch.Tensor:
    """Logits (n, V), float64: what an any-order model says of each of `positions` after (position, token)s in order.

    A row is prompt, tokens in their order, one mask. The prompt sees the prompt; the others also what stands before
    them. The rows share everything but the mask's position, so none of them is padded.
    """
    ids = prompt + [token for _, token in before] + [MASK]
    size, dtype = len(ids), model.dtype
    seen = [[k < len(prompt) or k <= q for k in range(size)] for q in range(size)]
    for q in range(len(prompt)):
        seen[q] = [k < len(prompt) for k in range(size)]
    bias = torch.tensor([[0.0 if s else torch.finfo(dtype).min for s in line] for line in seen], dtype=dtype)
    places = list(range(len(prompt))) + [len(prompt) + position for position, _ in before]
    inputs = {
        "input_ids": torch.tensor([ids] * len(positions)),
        "position_ids": torch.tensor([[*places, len(prompt) + position] for position in positions]),
        "attention_mask": bias.expand(len(positions), 1, -1, -1),
    }
    return model(**inputs, use_cache=False).logits[:, -1].double()


def slow_any_order(model, rollout, temperature=1.0):
    """The exact any-order likelihood one token at a time: log-probs and entropies, (B, L), with a graph."""
    zero = torch.zeros((), dtype=torch.float64)
    logps, entropies = [], []
    for row in range(len(rollout)):
        tokens, steps = rollout.completion_ids[row].tolist(), rollout.unmask_step[row].tolist()
        order = sorted((i for i, s in enumerate(steps) if s >= 0), key=lambda i: (steps[i], i))
        logps.append([zero] * len(tokens))
        entropies.append([zero] * len(tokens))
        for i in order:
            before = [(j, tokens[j]) for j in order if steps[j] < steps[i]]
            p = token_distribution(next_logits(model, unpadded(rollout, row), before, [i])[0], MASK, temperature)
            logps[-1][i] = p[tokens[i]].log()
            entropies[-1][i] = -sum(q * q.log() for v, q in enumerate(p) if v != MASK)
    return torch.stack([torch.stack(r) for r in logps]), torch.stack([torch.stack(r) for r in entropies])


class OrderReader:
    """An any-order model that `slow_decode` takes for a denoiser: it reads the order off the canvases it is shown."""

    def __init__(self, model, prompt: list[int]):
        self.model, self.prompt, self.before = model, prompt, []

    def __call__(self, input_ids, use_cache):
        canvas = input_ids[0].tolist()[len(self.prompt) :]
        known = {position for position, _ in self.before}
        self.before += [(i, t) for i, t in enumerate(canvas) if t != MASK and i not in known]
        masked = [i for i, token in enumerate(canvas) if token == MASK]
        logits = torch.full((1, input_ids.shape[1], VOCAB), torch.nan, dtype=torch.float64)
        logits[0, [len(self.prompt) + i for i in masked]] = next_logits(self.model, self.prompt, self.before, masked)
        return SimpleNamespace(logits=logits)


def sample(model, cache="exact", prompts=PROMPTS, seeds=SEEDS, width=None, batch_size=None, **settings):
    defaults = {"max_new_tokens": 12, "block_length": 6, "stop_at_eos": False, "eos_token_ids": (EOS,)}
    config = DiffusionGenerationConfig(decoding="any_order", cache=cache, **{**defaults, **settings})
    ids, mask = left_pad(prompts, width)
    return generate(model, ids, mask, config, seeds=seeds, batch_size=batch_size).validate()


def assert_equals_oracle(oracle, rollout, prompts=PROMPTS, seeds=SEEDS, **settings):
    settings = {"canvas": 12, "block_length": 6, "mask": MASK, "shift": 0, **settings}
    for row, prompt in enumerate(prompts):
        reader = OrderReader(oracle, prompt)
        tokens, steps, logps = slow_decode(reader, prompt, seed=int(seeds[row]), **settings)
        assert rollout.unmask_step[row].tolist() == steps, f"steps of row {row}"
        assert rollout.completion_ids[row].tolist() == tokens, f"tokens of row {row}"
        torch.testing.assert_close(rollout.logps[row].double(), torch.tensor(logps).double(), atol=1e-5, rtol=0)


def assert_same_rollout(a, b, rows=slice(None), atol=1e-5):
    assert torch.equal(a.unmask_step[rows], b.unmask_step)
    assert torch.equal(a.completion_ids[rows], b.completion_ids)
    assert torch.equal(a.counted[rows], b.counted)
    torch.testing.assert_close(a.logps[rows], b.logps, atol=atol, rtol=0)


def random_rollouts(dtype=torch.float64):
    """Never-revealed positions, ties, 1 to 9 steps; prompts of different lengths, then none at all."""
    yield random_rollout(MASK, VOCAB, 0, dtype=dtype)
    yield random_rollout(MASK, VOCAB, 1, dtype=dtype, prompt_lengths=(0, 3, 0, 5, 1), num_steps=(9, 2, 3, 1, 5))
    yield random_rollout(MASK, VOCAB, 2, dtype=dtype, prompt_lengths=(0,) * 5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model after any-order SFT on words written twice, in float32: `(model, mean log-prob before, after)`."""
    model, tokenizer = tiny_model("llada", hidden_size=32, num_layers=2)
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


# ---------------------------------------------------------------------------------- AnyOrder against the oracle


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_identity_3_any_order_equals_slow_oracle(models, attn):
    """Log-probs and entropies of rollouts with ties, never-revealed positions, and prompts of 0 to 7 tokens."""
    for rollout in random_rollouts():
        assert not rollout.revealed.all() and (rollout.num_steps < rollout.revealed.sum(1)).any()
        with torch.no_grad():
            scores = token_logps(models("llada", attn=attn), rollout, AnyOrder(), temperature=0.7)
            logps, entropies = slow_any_order(models("llada", attn="eager"), rollout, temperature=0.7)
        torch.testing.assert_close(scores.logps, logps, atol=1e-5, rtol=0)
        torch.testing.assert_close(scores.entropies, entropies, atol=1e-5, rtol=0)
        assert torch.equal(scores.scored, rollout.revealed)
        assert scores.logps[~rollout.revealed].eq(0).all()


@pytest.fixture
def fresh_compiler():
    """For a second shape PyTorch compiles FlexAttention with dynamic shapes, which its CPU back end cannot build."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_identity_3_any_order_equals_slow_oracle_on_flex_attention(models, fresh_compiler):
    """Forward only: flex_attention has no backward on a CPU. Slow: it compiles."""
    rollout = next(random_rollouts(torch.float32))
    with torch.no_grad():
        scores = token_logps(models("llada", torch.float32, "flex_attention"), rollout, AnyOrder())
        logps, _ = slow_any_order(models("llada", attn="eager"), rollout)
    torch.testing.assert_close(scores.logps.double(), logps, atol=3e-5, rtol=0)


def test_identity_3_any_order_equals_causal_pkl_t(models):
    """On every rollout: random ones, the denoising decoder's, the any-order decoder's; equal views, so equal bits."""
    model = models("llada", torch.float32)
    ids, mask = left_pad(PROMPTS)
    denoising = DiffusionGenerationConfig(max_new_tokens=12, block_length=6, diffusion_steps=8)
    rollouts = [*random_rollouts(torch.float32), generate(model, ids, mask, denoising, seeds=SEEDS), sample(model)]
    for rollout in rollouts:
        with torch.no_grad():
            a, b = (token_logps(model, rollout, e) for e in (AnyOrder(), TrajectoryPseudoLikelihood("causal")))
        assert torch.equal(a.logps, b.logps) and torch.equal(a.entropies, b.entropies)
        assert torch.equal(a.scored, b.scored)
    assert AnyOrder().num_views(rollouts[0]) == 1
    with torch.no_grad():
        other = token_logps(model, rollouts[-2], AnyOrder()).logps
    assert (other - rollouts[-2].logps).abs().max() > 0.1, "a denoising rollout's likelihood is another number"


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("prompts", [PROMPTS, [[]] * 4, [[], [5, 6], [7], []]], ids=["P=7", "P=0", "mixed"])
@pytest.mark.parametrize(
    "settings",
    [
        {"tokens_per_step": 1},
        {"tokens_per_step": 2, "temperature": 0.7},
        {"tokens_per_step": 3, "remasking": "random"},
        {"confidence_threshold": 0.1, "remasking": "margin"},
        {"diffusion_steps": 9, "block_length": 4, "stop_at_eos": True, "eos_token_ids": tuple(range(40, 60))},
    ],
    ids=["1", "2", "3", "threshold", "stop"],
)
def test_identity_3_scores_equal_both_decoders(models, attn, prompts, settings):
    """Float32: AnyOrder on an any-order rollout is the cached decoder's log-probs and the uncached one's, to 1e-5."""
    model = models("llada", torch.float32, attn)
    cached, uncached = (sample(model, cache, prompts, **settings) for cache in ("exact", None))
    assert_same_rollout(cached, uncached)
    with torch.no_grad():
        scores = token_logps(model, cached, AnyOrder())
    torch.testing.assert_close(scores.logps, cached.logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.logps, uncached.logps, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_identity_3_scores_equal_the_cached_decoder_on_flex_attention(models, fresh_compiler):
    model = models("llada", torch.float32, "flex_attention")
    rollout = sample(model, diffusion_steps=8)
    assert model.config._attn_implementation == "flex_attention"
    with torch.no_grad():
        scores = token_logps(model, rollout, AnyOrder())
    torch.testing.assert_close(scores.logps, rollout.logps, atol=1e-5, rtol=0)


def test_identity_3_on_a_trained_model_and_on_a_fresh_one(trained):
    """The trained model is sharp, the fresh one gives every token 1/V (the mask included)."""
    for model in (trained[0], tiny_model("llada", hidden_size=16, num_layers=1)[0].eval()):
        cached, uncached = (sample(model, cache, tokens_per_step=2) for cache in ("exact", None))
        assert_same_rollout(cached, uncached)
        with torch.no_grad():
            scores = token_logps(model, cached, AnyOrder())
        torch.testing.assert_close(scores.logps, cached.logps, atol=1e-5, rtol=0)


def test_identity_7_scores_do_not_depend_on_the_batch(models):
    model, rollout = models("llada"), random_rollout(MASK, VOCAB, 4)
    for estimator in (AnyOrder(), TrajectoryPseudoLikelihood("bidirectional")):
        with torch.no_grad():
            logps = token_logps(model, rollout, estimator).logps
            wide = token_logps(model, random_rollout(MASK, VOCAB, 4, width=13), estimator).logps
            torch.testing.assert_close(wide, logps, atol=1e-5, rtol=0)
            order = torch.tensor([3, 0, 4, 1, 2])
            for size in (1, 2):
                shuffled = token_logps(model, rollout[order], estimator, batch_size=size).logps
                torch.testing.assert_close(shuffled, logps[order], atol=1e-5, rtol=0)


def _adapter_gradients(model, logps, weight):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((logps * weight).sum(), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def _lora(model):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return adapted.eval()


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_gradients_through_lora_equal_the_oracles(attn):
    torch.manual_seed(0)
    model = _lora(sharp_model("llada", attn_implementation=attn))
    rollout = random_rollout(MASK, VOCAB, 0, num_steps=(9, 3, 1), prompt_lengths=(4, 0, 6))
    weight = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = _adapter_gradients(model, token_logps(model, rollout, AnyOrder()).logps, weight)
    model.get_base_model().set_attn_implementation("eager")
    want = _adapter_gradients(model, slow_any_order(model, rollout)[0], weight)
    assert len(got) == 2 * 2 * 7 and all("lora_" in name for name in got)
    for name, gradient in got.items():
        assert (gradient - want[name]).abs().max() <= 1e-5 * max(1, want[name].abs().max()), name
        assert want[name].abs().max() > 0, name


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_4_bit_model_with_lora_decodes_scores_and_has_the_oracles_gradients(tmp_path, monkeypatch):
    import bitsandbytes
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    forward = bitsandbytes.nn.Linear4bit.forward

    def unpacked(self, x):
        # On a CPU with avx512_bf16 a forward without gradients would repack the weights for inference, for good.
        self.support_avx512bf16_for_cpu = False
        return forward(self, x)

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", unpacked)
    tiny_model("llada", hidden_size=64, num_layers=2)[0].save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32)
    torch.manual_seed(0)
    model = _lora(base)
    assert base.is_loaded_in_4bit
    rollout = sample(model, prompts=PROMPTS[:3], seeds=SEEDS[:3], tokens_per_step=2)
    scores = token_logps(model, rollout, AnyOrder())
    torch.testing.assert_close(scores.logps.detach(), rollout.logps, atol=1e-4, rtol=0)
    weight = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    got = _adapter_gradients(model, scores.logps, weight)
    base.set_attn_implementation("eager")
    want = _adapter_gradients(model, slow_any_order(model, rollout)[0], weight.double())
    for name, gradient in got.items():
        assert (gradient - want[name]).abs().max() <= 1e-3 * want[name].abs().max(), name


def test_identity_1_isolated_pkl_u_of_the_whole_canvas_is_the_mean_field_of_an_any_order_model(models):
    """All positions at once from the prompt alone, under the model's own attention: AnyOrder of a one-step rollout."""
    model, rollout = models("llada"), random_rollout(MASK, VOCAB, 0)
    fields = {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}
    at_once = type(rollout)(**{**fields, "unmask_step": rollout.unmask_step.clamp(max=0)})
    with torch.no_grad():
        want = token_logps(model, at_once, AnyOrder())
        got = token_logps(model, rollout, BlockPseudoLikelihood(block_size=9, mask_attention="isolated"))
        full = token_logps(model, rollout, MeanField())
    torch.testing.assert_close(got.logps, want.logps, atol=1e-5, rtol=0)
    assert (full.logps - want.logps).abs().max() > 1e-2, "the plain denoiser's masks see each other"


# ------------------------------------------------------------------------------------------------- identity 4


def _mask_row_logits(model, rollout, estimator):
    view = estimator.view(rollout, 0, rollout.view_seed, 0)
    mask = attention_mask(view.attention, model.config._attn_implementation, model.dtype)
    with torch.no_grad():
        out = model(
            input_ids=view.input_ids, position_ids=view.position_ids, attention_mask=mask, use_cache=False
        ).logits
    return out[:, -rollout.completion_ids.shape[1] :]


def _leak(model, rollout, estimator) -> list[float]:
    """For each position, how far the logits at its mask row move when its own token changes, in any row."""
    before, moved = _mask_row_logits(model, rollout, estimator), []
    for i in range(rollout.completion_ids.shape[1]):
        tokens = rollout.completion_ids.clone()
        hit = rollout.revealed[:, i]
        tokens[hit, i] = (tokens[hit, i] + 41) % 90 + 10
        fields = {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}
        changed = type(rollout)(**{**fields, "completion_ids": tokens})
        after = _mask_row_logits(model, changed, estimator)
        moved.append((after - before)[hit, i].abs().max().item() if hit.any() else 0.0)
        others = [j for j in range(tokens.shape[1]) if j != i]
        assert (after - before)[hit][:, others].abs().max() > 1e-3, "some later mask row must see the token"
    return moved


def test_identity_4_a_tokens_own_value_does_not_reach_its_mask_row(models):
    model, rollout = models("llada"), random_rollout(MASK, VOCAB, 0)
    for estimator in (AnyOrder(), TrajectoryPseudoLikelihood("causal")):
        assert max(_leak(model, rollout, estimator)) < 1e-5


def test_identity_4_bidirectional_pkl_t_leaks_with_two_layers_and_not_with_one(models):
    """Through the other clean rows (d2 and PADRE §4.4; docs/methods.md §2.3)."""
    rollout, estimator = random_rollout(MASK, VOCAB, 0), TrajectoryPseudoLikelihood("bidirectional")
    assert estimator.exact_for == ()
    moved = _leak(models("llada"), rollout, estimator)
    assert min(moved) > 1e-2, moved
    shallow = sharp_model("llada")
    del shallow.model.layers[1:]
    shallow.config.num_hidden_layers = 1
    assert max(_leak(shallow, rollout, estimator)) < 1e-5


# ------------------------------------------------------------------------------------ decoders against the oracle


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
@pytest.mark.parametrize("remasking", REMASKING)
def test_even_schedule_equals_slow_decoder(models, remasking, temperature, cache):
    """8 steps for 12 tokens in two blocks of 6: 2, 2, 1, 1 tokens a step; rows differ in prompt length."""
    settings = {"remasking": remasking, "temperature": temperature}
    rollout = sample(models("llada"), cache, diffusion_steps=8, **settings)
    assert_equals_oracle(models("llada", attn="eager"), rollout, schedule=[2, 2, 1, 1], **settings)
    assert rollout.num_forwards == 8 + (cache == "exact")


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("remasking", [name for name in REMASKING if name != "left_to_right"])
def test_threshold_equals_slow_decoder(models, remasking, cache):
    """Rows reveal different numbers in a step, and are in different blocks."""
    threshold = THRESHOLDS[remasking]
    rollout = sample(models("llada"), cache, remasking=remasking, confidence_threshold=threshold, temperature=0.8)
    assert_equals_oracle(
        models("llada", attn="eager"), rollout, remasking=remasking, threshold=threshold, temperature=0.8
    )
    assert len(set(rollout.num_steps.tolist())) > 1, "rows should differ in their number of steps"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_tie_widths_equal_slow_decoder(models, width, cache):
    rollout = sample(models("llada"), cache, tokens_per_step=width)
    schedule = [width] * (6 // width)
    assert_equals_oracle(models("llada", attn="eager"), rollout, schedule=schedule, remasking="low_confidence")


@pytest.mark.parametrize("cache", CACHES)
def test_empty_prompts_equal_slow_decoder(models, cache):
    """P = 0 has no prompt pass; a row without a token in a padded batch is the same row."""
    oracle, settings = models("llada", attn="eager"), {"schedule": [2, 2, 1, 1], "remasking": "low_confidence"}
    rollout = sample(models("llada"), cache, [[]] * 4, diffusion_steps=8)
    assert rollout.prompt_ids.shape == (4, 0) and rollout.num_forwards == 8
    assert_equals_oracle(oracle, rollout, [[]] * 4, **settings)
    mixed = sample(models("llada"), cache, [[], *PROMPTS[1:]], diffusion_steps=8)
    assert torch.equal(mixed.completion_ids[0], rollout.completion_ids[0])
    assert_equals_oracle(oracle, mixed, [[], *PROMPTS[1:]], **settings)


@pytest.mark.parametrize("cache", CACHES)
def test_early_stop_equals_slow_decoder(models, cache):
    """Rows finish at different blocks and leave the cache; those that go on are not changed."""
    settings = {"block_length": 4, "diffusion_steps": 6}
    tokens = sample(models("llada"), cache, **settings).completion_ids.tolist()
    ends = {  # a token of some row's first block and one of some row's second, by which all three lengths occur
        (a, b): {next((n for n in range(2) if {a, b} & set(row[4 * n : 4 * n + 4])), 2) for row in tokens}
        for first, second in itertools.permutations(tokens, 2)
        for a, b in itertools.product(first[:4], second[4:8])
    }
    eos = next(pair for pair, lengths in ends.items() if len(lengths) == 3)
    rollout = sample(models("llada"), cache, stop_at_eos=True, eos_token_ids=eos, **settings)
    assert set(rollout.num_steps.tolist()) == {2, 4, 6}, "rows should stop behind different blocks"
    assert_equals_oracle(
        models("llada", attn="eager"),
        rollout,
        block_length=4,
        schedule=[2, 2],
        eos=eos,
        stop_at_eos=True,
        remasking="low_confidence",
    )


@pytest.mark.parametrize("block_length", [4, 12])
def test_identity_3_cached_equals_uncached_for_many_rows_in_different_blocks(models, block_length):
    """64 rows with a random threshold: the widest chunk comes from one row, the fullest cache from another."""
    model, prompts = models("llada"), [PROMPTS[i % 4] for i in range(64)]
    settings = {"remasking": "random", "confidence_threshold": 0.5, "block_length": block_length}
    cached, uncached = (
        sample(model, cache, prompts, hash64(5, torch.arange(64)), **settings) for cache in ("exact", None)
    )
    assert_same_rollout(cached, uncached)
    assert len(set(cached.num_steps.tolist())) > 3


@pytest.mark.parametrize("settings", [{"diffusion_steps": 8}, {"confidence_threshold": 0.15, "stop_at_eos": True}])
def test_identity_7_cached_rows_do_not_depend_on_their_batch(models, settings):
    """Left padding, its tokens, batch order, sub-batches: same seeds, same tokens and steps."""
    model = models("llada")
    settings = {"temperature": 0.9, "eos_token_ids": tuple(range(40, 60)), **settings}
    rollout = sample(model, **settings)
    assert_same_rollout(rollout, sample(model, width=15, **settings))
    order = [2, 0, 3, 1]
    shuffled = sample(model, prompts=[PROMPTS[i] for i in order], seeds=SEEDS[order], **settings)
    assert_same_rollout(rollout, shuffled, order)
    assert_same_rollout(rollout, sample(model, batch_size=1, **settings))
    assert_same_rollout(rollout, sample(model, batch_size=3, **settings))
    ids, mask = left_pad(PROMPTS, 9, pad=0)
    config = DiffusionGenerationConfig(max_new_tokens=12, decoding="any_order", cache="exact")
    a, b = (generate(model, x, mask.long(), config, SEEDS) for x in (ids, ids.masked_fill(~mask, 88)))
    assert_same_rollout(a, b)


def _prompt_rows(model, **settings):
    """(rollout, rows of each forward of the cached decoder)."""
    shapes = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        return sample(model, **settings), shapes
    finally:
        hook.remove()


def test_a_group_costs_one_prompt_pass(models):
    """8 completions of one prompt, and of another: two rows in the prompt pass; the same completions as one by one."""
    model = models("llada")
    prompts = [PROMPTS[1]] * 8 + [PROMPTS[0]] * 8
    seeds = hash64(3, torch.arange(16))
    rollout, shapes = _prompt_rows(model, prompts=prompts, seeds=seeds, diffusion_steps=6)
    assert shapes[0] == (2, 7) and all(shape[0] == 16 for shape in shapes[1:])
    assert len(shapes) == rollout.num_forwards == 7
    assert_same_rollout(rollout, sample(model, None, prompts, seeds, diffusion_steps=6))
    assert len(rollout.completion_ids[:8].unique(dim=0)) == 8
    shuffle = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    mixed, shapes = _prompt_rows(model, prompts=[prompts[i] for i in shuffle], seeds=seeds[shuffle], diffusion_steps=6)
    assert shapes[0] == (2, 7)
    assert_same_rollout(rollout, mixed, shuffle)
    _, shapes = _prompt_rows(model, prompts=[[7, 7], [0, 7, 7], [7]], seeds=SEEDS[:3], diffusion_steps=6)
    assert shapes[0] == (3, 3), "a prompt that differs from another by its padding alone is a prompt of its own"


def test_a_process_without_rows_left_still_runs_forwards(models):
    """`still_running` keeps a finished process in step: spare forwards, the same rollout."""
    model, (ids, mask) = models("llada"), left_pad(PROMPTS)
    for cache in CACHES:
        asked = []

        def still_running(local, asked=asked):
            asked.append(local)
            return len(asked) <= 9

        config = DiffusionGenerationConfig(
            max_new_tokens=12, block_length=6, diffusion_steps=6, decoding="any_order", cache=cache
        )
        rollout = generate(model, ids, mask, config, seeds=SEEDS, still_running=still_running)
        assert asked == [True] * 6 + [False] * 4
        assert rollout.num_forwards == 9 + (cache == "exact")
        assert_same_rollout(generate(model, ids, mask, config, seeds=SEEDS), rollout)


def test_decoding_leaves_model_and_global_generator_alone(models):
    model, before = models("llada"), torch.get_rng_state()
    sample(model)
    assert torch.equal(before, torch.get_rng_state()) and model.config._attn_implementation == "sdpa"
    assert "forward" not in model.get_output_embeddings().__dict__


# ------------------------------------------------------------------------------------------------------- FLOPs


def test_forwards_of_a_cached_rollout_are_counted_as_run(models):
    """Prompt pass, then chunks: the tokens of the step before and the masks of the block, attending to the cache."""
    model, count = models("llada"), ForwardFlops(models("llada"))
    rollout, shapes = _prompt_rows(model, prompts=[PROMPTS[0]] * 4, tokens_per_step=2)
    assert shapes == [(1, 3), (4, 6), (4, 2 + 4), (4, 2 + 2), (4, 2 + 6), (4, 2 + 4), (4, 2 + 2)]
    keys = [3, 3 + 6, 3 + 6, 5 + 4, 7 + 8, 9 + 6, 11 + 4]
    heads = [0, 6, 4, 2, 6, 4, 2]
    assert rollout.flops == sum(
        count(rows, width, k, 4 * head) for (rows, width), k, head in zip(shapes, keys, heads, strict=True)
    )


def test_the_cache_takes_ten_times_fewer_flops():
    """P = 200, L = 256, block 32, 2 tokens a step. Counted on a model in which, as in LLaDA, layers outweigh the head.

    (At a tiny width and a vocabulary of its size the head's tiles of 64 rows dominate, which the cache does not
    change; here a token costs 26 times more in the layers than in the head, in LLaDA-8B 14 times.)
    """
    config = LLaDAConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        mask_token_id=3,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=None,
    )
    model = LLaDAModelLM(config).eval()
    assert 25 < ForwardFlops(model).per_token / ForwardFlops(model).per_head_row < 27
    prompt = torch.randint(4, 64, (1, 200), generator=torch.Generator().manual_seed(0))
    flops = []
    for cache in CACHES:
        settings = DiffusionGenerationConfig(
            max_new_tokens=256, block_length=32, tokens_per_step=2, decoding="any_order", cache=cache
        )
        rollout = generate(model, prompt, torch.ones_like(prompt), settings)
        assert rollout.num_forwards == 128 + (cache == "exact")
        flops.append(rollout.flops)
    assert flops[0] / flops[1] > 10, flops


@pytest.mark.parametrize("group", [1, 8])
def test_the_cache_takes_ten_times_fewer_flops_at_the_shapes_of_llada_8b(group):
    """The same count from LLaDA-8B's shapes, without running it: weights on the meta device."""
    with torch.device("meta"):
        count = ForwardFlops(LLaDAModelLM(LLaDAConfig()))
    assert 13e9 < count.per_token < 16e9 and 13 < count.per_token / count.per_head_row < 15
    uncached = cached = 0
    cached += count(1, 200, 200, 0)
    for step in range(128):
        masks, new = 32 - 2 * (step % 16), 2 * (step > 0)
        uncached += count(group, 456, 456, group * masks)
        cached += count(group, new + masks, 200 + 2 * max(0, step - 1) + new + masks, group * masks)
    assert uncached / cached > 10, (group, uncached / cached)


# ---------------------------------------------------------------------------------------- refusals, config, flags


def test_shifted_families_are_refused_with_the_reason(models, tmp_path):
    """Dream predicts a position at the row before it: estimators, decoding, GRPO and the SFT objective say so."""
    model, rollout = models("dream"), random_rollout(MASK, VOCAB, 0)
    reason = r"logits_shift=1 \(Dream\).*row before it.*no row predicts token i.*unshifted family \(LLaDA\)"
    for estimator in (AnyOrder(), TrajectoryPseudoLikelihood(), TrajectoryPseudoLikelihood("bidirectional")):
        with pytest.raises(ValueError, match=f"{type(estimator).__name__} does not apply.*{reason}"):
            token_logps(model, rollout, estimator)
    for cache in CACHES:
        with pytest.raises(ValueError, match=f"any-order decoding does not apply.*{reason}"):
            sample(model, cache)
    tiny, tokenizer = tiny_model("dream", 16, 1)
    data = Dataset.from_dict({"prompt": ["a"] * 4, "completion": ["b"] * 4})
    with pytest.raises(ValueError, match=f"objective='any_order' does not apply.*{reason}"):
        DiffusionSFTTrainer(tiny, sft_config(tmp_path), train_dataset=data, processing_class=tokenizer)
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "max_completion_length": 8}
    for settings, name in (
        ({"estimator": "any_order"}, "AnyOrder"),
        ({"decoding": "any_order"}, "decoding='any_order'"),
    ):
        with pytest.raises(ValueError, match=f"{name} does not apply.*{reason}"):
            DiffusionGRPOTrainer(
                tiny,
                lambda completions, **kwargs: [0.0] * len(completions),
                DiffusionGRPOConfig(str(tmp_path), **common, **settings),
                train_dataset=data,
                processing_class=tokenizer,
            )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"decoding": "any"}, r"decoding='any' is unknown.*any_order.*denoising"),
        ({"cache": "exact"}, r"cache='exact' is not available for decoding='denoising'"),
        ({"decoding": "any_order", "cache": "prefix"}, r"cache='prefix'.*decoding='any_order'.*exact"),
        ({"decoding": "any_order", "cfg_scale": 0.5}, r"cfg_scale=0.5 needs decoding='denoising'"),
    ],
)
def test_config_errors_of_decoding_and_cache(settings, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        DiffusionGenerationConfig(**settings)
    if "cfg_scale" not in settings:
        with pytest.raises(ValueError, match=match):
            DiffusionGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"estimator": "step_merge", "decoding": "any_order"}, "StepMerge is not exact for decoding='any_order'"),
        ({"estimator": "any_order"}, "AnyOrder is not exact for decoding='denoising'"),
        (
            {"estimator": "any_order", "decoding": "any_order", "p_mask_prompt": 0.1},
            "the sampler saw the whole prompt, and p_mask_prompt=0.1",
        ),
        (
            {"estimator": "any_order", "decoding": "any_order", "temperature": 0.9, "score_temperature": 1.0},
            "the sampler scored at temperature=0.9, not score_temperature=1.0",
        ),
    ],
)
def test_the_samplers_log_probs_are_refused_where_they_are_not_exact(settings, match, tmp_path):
    common = {"use_cpu": True, "bf16": False, "max_completion_length": 8}
    with pytest.raises(ValueError, match=f"old_logps='rollout'.*{match}.*old_logps='recompute'"):
        DiffusionGRPOConfig(str(tmp_path), old_logps="rollout", **common, **settings)
    assert DiffusionGRPOConfig(str(tmp_path), **common, **settings).old_logps == "recompute"


def test_exactness_is_declared_for_the_decoder_it_holds_for():
    assert AnyOrder.exact_for == ("any_order",) and TrajectoryPseudoLikelihood().exact_for == ("any_order",)
    assert ExactTrajectory.exact_for == ("denoising",)


def test_flags_of_eval_choose_decoding_and_cache():
    argv = ["--task", "sudoku", "--output_dir", "out", "--model_name_or_path", "model", "--max_new_tokens", "16"]
    parse = evaluation.make_parser().parse_args
    config = generation_config(parse([*argv, "--decoding", "any_order", "--cache", "exact"]))
    assert (config.decoding, config.cache) == ("any_order", "exact")
    config = generation_config(parse(argv))
    assert (config.decoding, config.cache) == ("denoising", None)


# --------------------------------------------------------------------------------------------- any-order SFT

TEXTS = (["copy abc:", "x:", "", "12345678 :", "q"], ["abc", "a longer answer", "b", "1", "yes, no"])


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
    built, tokenizer = tiny_model("llada", hidden_size=16, num_layers=2)
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
    model, _ = tiny_model("llada", hidden_size=16, num_layers=2)
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


def test_sft_makes_an_any_order_model(trained):
    """Held against random orders, two tokens a step: from 1/V to a model that has learned the words."""
    _, before, after = trained
    assert before < -4 and after > before + 2.5, (before, after)
