"""The model class for lm-evaluation-harness."""

import pytest
import torch

from trl_dllm.models import create_tiny_model


pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'trl-dllm[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

import trl_dllm.harness  # noqa: F401  registers the model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tiny"))
    model, tokenizer = create_tiny_model(hidden_size=16, num_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def ask(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_the_harness_finds_the_model_by_name(folder):
    model = get_model("trl_dllm").create_from_arg_string(f"pretrained={folder},max_new_tokens=16,diffusion_steps=8")
    assert type(model).__name__ == "DiffusionLM" and model._config(16).diffusion_steps == 8


def test_generation_is_cut_at_the_stop_strings_and_does_not_depend_on_the_batch(folder):
    create = get_model("trl_dllm")
    requests = ask(
        "generate_until",
        ("12+3=", {"until": [], "max_gen_toks": 8}),
        ("7=", {"until": [], "max_gen_toks": 16}),
        ("12=", {"until": [], "max_gen_toks": 8}),
    )
    whole = create(folder, batch_size=4, temperature=1.0).generate_until(requests, disable_tqdm=True)
    assert whole == create(folder, batch_size=1, temperature=1.0).generate_until(requests, disable_tqdm=True)
    stop = whole[1][2]
    cut = ask("generate_until", ("12+3=", {"max_gen_toks": 8}), ("7=", {"until": [stop], "max_gen_toks": 16}))
    assert create(folder, temperature=1.0).generate_until(cut, disable_tqdm=True)[1] == whole[1].split(stop)[0]


def test_loglikelihood_is_the_exact_bound_where_one_token_is_asked_for(folder):
    """With one token the bound has no choice of masks: it is the log-prob of that token."""
    model = get_model("trl_dllm")(folder, num_samples=3, is_greedy=True)
    results = model.loglikelihood(
        ask("loglikelihood", *[("12+3=", chr(c)) for c in range(32, 127)]), disable_tqdm=True
    )
    ids = model.tokenizer(["12+3="], return_tensors="pt")["input_ids"]
    ids = torch.cat([ids, torch.tensor([[model.spec.mask_token_id]])], dim=1)
    logits = model.model(input_ids=ids).logits[0, -1].detach()
    logits[model.spec.mask_token_id] = -torch.inf
    tokens = [model.tokenizer(chr(c))["input_ids"][0] for c in range(32, 127)]
    assert [value for value, _ in results] == pytest.approx(logits.log_softmax(-1)[tokens].tolist(), abs=1e-5)
    best = logits.argmax().item()
    assert [greedy for _, greedy in results] == [token == best for token in tokens]


def test_the_bound_of_two_tokens_is_the_mean_over_all_draws(folder):
    model = get_model("trl_dllm")(folder, num_samples=4000, batch_size=1000)
    (value, _), *_ = model.loglikelihood(ask("loglikelihood", ("1=", "23")), disable_tqdm=True)
    mask, (a, b) = model.spec.mask_token_id, model.tokenizer("23")["input_ids"]
    prompt = model.tokenizer("1=")["input_ids"]

    def logp(first, second):
        logits = model.model(input_ids=torch.tensor([[*prompt, first, second]])).logits[0, -2:].detach()
        logits[:, mask] = -torch.inf
        return logits.log_softmax(-1)

    both, only_a, only_b = logp(mask, mask), logp(mask, b), logp(a, mask)
    one = 2 * (only_a[0, a] + only_b[1, b]) / 2  # l = 1: weight 2, either position
    exact = (one + both[0, a] + both[1, b]) / 2
    assert value == pytest.approx(exact.item(), abs=0.05)


def test_an_empty_context_and_rolling_text_have_a_bound(folder):
    model = get_model("trl_dllm")(folder, num_samples=2)
    ((value, greedy),) = model.loglikelihood(ask("loglikelihood", ("", "12")), disable_tqdm=True)
    assert value < 0 and greedy is False
    assert model.loglikelihood_rolling(ask("loglikelihood_rolling", ("12",)), disable_tqdm=True)[0] < 0
