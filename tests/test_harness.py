"""The model class for lm-evaluation-harness."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_dllm.generation import save_decoding
from trl_dllm.models import create_tiny_model


pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'trl-dllm[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from trl_dllm.harness import DiffusionLM


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


def test_an_adapter_is_put_on_the_model(folder, tmp_path):
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path)
    model = get_model("trl_dllm").create_from_arg_string(f"pretrained={folder},peft={tmp_path}").model
    ids = torch.arange(5, 25)[None]
    assert not model.training and torch.equal(model(ids).logits.cpu(), adapted.eval()(ids).logits)


def test_every_decoding_setting_is_taken_and_scaled_to_another_canvas(folder):
    create = get_model("trl_dllm").create_from_arg_string
    common = f"pretrained={folder},max_new_tokens=16,block_length=8,remasking=margin,stop_at_eos=false"
    model = create(f"{common},tokens_per_step=1", {"batch_size": 2, "max_batch_size": None, "device": "cpu"})
    for length, block, steps in ((16, 8, 16), (24, 8, 24), (12, 12, 12), (7, 7, 7), (37, 1, 37)):
        found = model._config(length)
        assert (found.block_length, found.diffusion_steps, found.steps_per_block) == (block, steps, block)
        assert found.remasking == "margin" and not found.stop_at_eos and found.temperature == 0
    model = create(f"{common},diffusion_steps=8")  # two tokens a step
    for length, steps in ((24, 12), (12, 6), (7, 3), (37, 37)):
        assert model._config(length).diffusion_steps == steps


@pytest.mark.parametrize(
    ("setting", "error", "match"),
    [
        ("token_per_step=1", TypeError, "token_per_step"),
        ("block_length=5", ValueError, "block_length=5 does not divide max_new_tokens=16"),
        ("tokens_per_step=1.0", ValueError, "tokens_per_step=1.0 must be a whole number"),
    ],
)
def test_a_setting_to_mend_is_an_error_before_the_model_loads(setting, error, match):
    with pytest.raises(error, match=match):
        get_model("trl_dllm").create_from_arg_string(f"pretrained=no/such-model,max_new_tokens=16,{setting}")


def test_the_decoding_is_the_models_and_what_is_given_wins(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "model")
    trained = {
        "max_new_tokens": 12,
        "block_length": 4,
        "diffusion_steps": 6,
        "remasking": "margin",
        "temperature": 0.9,
    }
    save_decoding(trained, tmp_path / "model")
    create = get_model("trl_dllm").create_from_arg_string
    found = create(f"pretrained={tmp_path / 'model'}").sampling
    assert (found.max_new_tokens, found.block_length, found.diffusion_steps) == (12, 4, 6)
    assert (found.remasking, found.temperature) == ("margin", 0.0)
    assert "Decoding as saved with" in capsys.readouterr().out
    found = create(f"pretrained={tmp_path / 'model'},max_new_tokens=24,remasking=random").sampling
    assert (found.max_new_tokens, found.block_length, found.diffusion_steps) == (24, 4, 12)
    assert found.remasking == "random"


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


@pytest.mark.slow
def test_the_harness_runs_from_the_command_line_without_a_gpu(folder, tmp_path):
    """The harness names a GPU where its user names no device."""
    (tmp_path / "rows.json").write_text('{"q": "1+2=", "a": "3"}\n{"q": "2+2=", "a": "4"}\n')
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "rows.json")},
        "test_split": "train",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"max_gen_toks": 8, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(task))  # which is YAML too
    argv = ["--model", "trl_dllm", "--tasks", "sums", "--include_path", ".", "--output_path", "out"]
    argv += ["--model_args", f"pretrained={folder},max_new_tokens=8"]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "trl_dllm.harness", *argv],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "it runs on the CPU" in done.stdout and "|sums |" in done.stdout
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(results.read_text())["results"]["sums"]["exact_match,none"] <= 1


def test_a_device_that_is_here_is_taken_without_a_word(folder, capsys):
    assert get_model("trl_dllm")(folder, device="cpu")._device.type == "cpu"
    assert "device" not in capsys.readouterr().out


def test_a_block_causal_model_is_run_in_its_own_blocks(tmp_path):
    create_tiny_model("sdar", 16, 1)[0].save_pretrained(tmp_path)
    create_tiny_model("sdar", 16, 1)[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"block_length=8, and the model is block-causal .*Set block_length=4"):
        DiffusionLM(str(tmp_path), max_new_tokens=16, block_length=8)
    lm = DiffusionLM(str(tmp_path), max_new_tokens=16, num_samples=2, is_greedy=True)
    assert (lm._config(16).block_length, lm._config(10).max_new_tokens) == (4, 12)
    assert len(lm._bound([5, 6], [7, 8, 9], 0)) == 2
    assert lm._bound([5, 6], [], 0) == (0.0, True)
