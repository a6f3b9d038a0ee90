"""A run resumed from any of its checkpoints is the run that was never interrupted, bit for bit."""

import shutil
import warnings

import pytest
import torch
from helpers_grpo import build, history, losses, text_prompts, weights
from test_sft_trainer import tiny
from test_sft_trainer import trainer as build_sft
from torch._dynamo import reset
from torch._dynamo.utils import counters


# A generation cycle of four optimizer steps. Logs and evaluations come between checkpoints, prompts are masked and a
# reference is scored: whatever could shift a draw or be forgotten.
CYCLE = {
    "beta": 0.04,
    "num_iterations": 2,
    "steps_per_generation": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 9,
    "num_segments": 3,
    "p_mask_prompt": 0.2,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "per_device_eval_batch_size": 4,
    "lr_scheduler_type": "linear",
}


def grpo(folder, **kwargs):
    return build(folder, eval_dataset=text_prompts(1), **{**CYCLE, **kwargs})


def resume(trainer, folder, step: int):
    """The trainer, after it went on from that checkpoint; no warning may come of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "Could not find a config file in  - ")  # PEFT 0.18, of a model without name
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return trainer


def assert_same_run(found, whole) -> None:
    assert history(found) == history(whole)
    assert all(torch.equal(value, weights(found)[name]) for name, value in weights(whole).items())


@pytest.mark.parametrize(
    "kind, steps",
    [
        ({}, range(1, 9)),
        ({"peft": True}, (1, 6)),
        # One view, no reference, no clipping; and two cycles an optimizer step.
        ({"estimator": "mean_field", "num_segments": None, "beta": 0.0, "max_grad_norm": 0.0}, (3,)),
        ({"gradient_accumulation_steps": 8, "steps_per_generation": 2, "max_steps": 4}, (1, 3)),
    ],
    ids=["full", "lora", "one view", "short cycle"],
)
def test_a_run_resumed_from_any_checkpoint_is_the_run_that_was_not_interrupted(tmp_path, kind, steps):
    whole = grpo(tmp_path, **kind)
    whole.train()
    assert len(losses(whole)) == whole.args.max_steps // 2 and whole.flops.counted > 0
    for step in steps:
        resumed = resume(grpo(tmp_path, **kind), tmp_path, step)
        assert_same_run(resumed, whole)
        assert resumed.flops == whole.flops, "the counters start anew"


@pytest.mark.parametrize("make", [grpo, build_sft], ids=["grpo", "sft"])
def test_a_run_resumed_in_any_epoch_goes_on_with_its_rows(tmp_path, make):
    """Two or more optimizer steps an epoch: TRL's sampler takes the order of every epoch from one generator."""
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "logging_steps": 1}
    settings |= {"data": text_prompts(1), "steps_per_generation": 2, "num_iterations": 1} if make is grpo else {}
    whole = make(tmp_path, **settings)
    whole.train()
    epochs = int(whole.state.epoch)
    for step in range(1, 7):
        resumed = resume(make(tmp_path, **settings), tmp_path, step)
        assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items()), step
    assert make is not grpo or epochs >= 2


@pytest.mark.parametrize("end", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 1}], ids=["steps", "epochs"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("make", [grpo, build_sft], ids=["grpo", "sft"])
def test_a_run_resumed_behind_its_last_step_takes_no_further_one(tmp_path, make, accumulation, end):
    """Killed between its last checkpoint and its end. The learning rate is constant, so a step would be seen."""
    settings = {
        "gradient_accumulation_steps": accumulation,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "no",
        "lr_scheduler_type": "constant",
        **end,
    }
    whole = make(tmp_path, **settings)
    whole.train()
    last = whole.state.global_step
    resumed = resume(make(tmp_path, **settings), tmp_path, last)
    assert resumed.state.global_step == last
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())
    if make is grpo:
        assert resumed.flops == whole.flops, "the counters start anew"


def test_a_resumed_run_draws_no_completions_that_it_has(tmp_path):
    """Of nine steps in cycles of four, they are drawn behind steps 0, 4 and 8."""
    grpo(tmp_path, eval_strategy="no").train()
    for step, expected in {1: [4, 8], 3: [4, 8], 4: [4, 8], 5: [8], 8: [8]}.items():
        trainer, drawn = grpo(tmp_path, eval_strategy="no"), []
        generate = trainer._generate_single_turn

        def generating(*args, trainer=trainer, drawn=drawn, generate=generate, **kwargs):
            drawn.append(trainer.state.global_step)
            return generate(*args, **kwargs)

        trainer._generate_single_turn = generating
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert drawn == expected, step


def test_a_resumed_run_uses_the_same_trainer_twice(tmp_path):
    whole = grpo(tmp_path)
    whole.train()
    expected, counted = history(whole), whole.flops.counted
    resume(whole, tmp_path, 6)
    assert history(whole) == expected and whole.flops.counted == counted


def test_a_resumed_run_logs_its_own_mean_loss(tmp_path):
    """`train_loss` is the mean over the steps of the call, though the first log has a step of the call before."""
    losses(single := grpo(tmp_path / "each", logging_steps=1))
    single.train()
    grpo(tmp_path / "run").train()
    resumed = resume(grpo(tmp_path / "run"), tmp_path / "run", 5)
    assert losses(resumed, "train_loss") == pytest.approx([sum(losses(single)[5:]) / 4], abs=1e-7)


def test_the_table_of_completions_is_shown_again_and_not_overwritten(tmp_path):
    import pandas

    settings = {"log_completions": True, "logging_steps": 1}
    whole = grpo(tmp_path, **settings)
    whole.train()
    files = sorted((tmp_path / "completions").glob("*.parquet"))
    before = [pandas.read_parquet(file) for file in files]
    assert all(len(table) == 16 for table in before[:-1])
    resume(grpo(tmp_path, **settings), tmp_path, 2)
    for file, table in zip(files, before, strict=True):
        pandas.testing.assert_frame_equal(pandas.read_parquet(file), table)


def test_a_reference_that_follows_the_policy_is_resumed(tmp_path):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    whole = grpo(tmp_path, **settings)
    whole.train()
    for step in (3, 4, 6):
        resumed = resume(grpo(tmp_path, **settings), tmp_path, step)
        assert_same_run(resumed, whole)
        reference = whole.ref_model.state_dict()
        assert all(torch.equal(value, reference[name]) for name, value in resumed.ref_model.state_dict().items())
    (tmp_path / "checkpoint-6" / "reference.pt").unlink()
    (tmp_path / "checkpoint-6" / "manifest.json").unlink()
    (tmp_path / "checkpoint-6" / "process_state_0.pt").unlink()
    with pytest.warns(UserWarning, match=r"sync_ref_model=True, and .*checkpoint-6 holds no reference model"):
        grpo(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize("resumed_from", [1, 2, 5])
def test_an_sft_run_resumed_from_any_checkpoint_is_the_run_that_was_not_interrupted(tmp_path, resumed_from):
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 3,
    }
    whole = build_sft(tmp_path, **settings)
    whole.train()
    assert len(losses(whole)) == 2
    resumed = resume(build_sft(tmp_path, **settings), tmp_path, resumed_from)
    assert_same_run(resumed, whole)
    assert losses(resumed, "num_tokens") == losses(whole, "num_tokens")


@pytest.mark.parametrize("make", [grpo, build_sft], ids=["grpo", "sft"])
def test_true_takes_the_newest_complete_checkpoint_and_says_what_it_skips(tmp_path, make):
    """As a kill and a full disk leave them: no trainer state; weights cut off. Each ended every later run."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}
    whole = make(tmp_path, **settings)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=True: '.*' holds no complete checkpoint"):
        whole.train(resume_from_checkpoint=True)
    whole.train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    with (tmp_path / "checkpoint-3" / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    resumed = make(tmp_path, **settings)
    expected = (
        r"checkpoint-4 \(trainer_state.json is missing or cut off\); checkpoint-3 \(model.safetensors has 100 bytes "
        r"instead of \d+\)\. The run goes on from checkpoint-2"
    )
    with pytest.warns(UserWarning, match=expected):
        resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


@pytest.mark.parametrize("make", [grpo, build_sft], ids=["grpo", "sft"])
def test_an_incomplete_checkpoint_that_is_named_is_an_error(tmp_path, make):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}
    make(tmp_path, **settings).train()
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    expected = r"checkpoint-2' is not a complete checkpoint: optimizer.pt is missing.*checkpoint-1 is complete"
    with pytest.raises(ValueError, match=expected):
        make(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"there is no complete one beside it"):
        make(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# ------------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def fresh_compiler():
    """Graphs and counters of other tests are gone, and so are this one's afterwards."""
    reset()
    counters.clear()
    yield
    reset()
    counters.clear()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_a_compiled_model_gives_the_same_numbers_from_one_graph_a_kind_of_forward(tmp_path, fresh_compiler, kind):
    """Micro-batches and prompts change their sizes: the graphs of sampler and scorer, of the reference and of training
    take them all, and so does SFT's. The backend "eager" runs the captured graphs as they are."""
    runs = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        if kind == "grpo":
            run = build(tmp_path, num_segments=2, num_iterations=2, beta=0.04, max_steps=3, **compiled)
        else:
            run = build_sft(tmp_path, tiny(num_layers=1)[0], per_device_train_batch_size=3, max_steps=3, **compiled)
        run.train()
        runs.append(run)
        graphs = counters["stats"]["unique_graphs"]
        # Packed forwards may be left with a single row, which is a size of its own to torch.compile: twice here.
        assert graphs == (0 if not compiled else 3 + 2 if kind == "grpo" else 1)
    assert not counters["recompile_limit"]
    plain, same = runs
    for name in ("loss", "grad_norm", "entropy"):
        assert losses(same, name) == pytest.approx(losses(plain, name), abs=1e-5)
    trained = weights(same)
    assert all(torch.allclose(value, trained[name], rtol=0, atol=1e-5) for name, value in weights(plain).items())
