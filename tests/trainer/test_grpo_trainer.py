"""Every loss, on real TRL: a whole cycle runs, weights move, and one view at a time gives one graph's gradients."""

import math

import pytest
import torch
from helpers_grpo import (
    CheckedTrainer,
    OneGraphTrainer,
    build,
    chat_prompts,
    losses,
    moved,
    text_prompts,
    tiny,
    weights,
)


LOSS = ("grpo", "dapo", "dr_grpo", "bnpo")
ESTIMATORS = {"mean_field": {"estimator": "mean_field"}, "step_merge": {"estimator": "step_merge", "num_segments": 3}}


def run_checked(folder, tolerance=1e-6, **kwargs):
    trainer = build(folder, CheckedTrainer, **kwargs)
    before = weights(trainer)
    trainer.train()
    micro_steps = trainer.args.max_steps * trainer.args.gradient_accumulation_steps
    assert len(trainer.gradient_errors) == micro_steps
    assert all(math.isfinite(loss) for loss in losses(trainer)), losses(trainer)
    assert moved(before, trainer), "no weight moved"
    lengths = torch.cat([batch["counted"].sum(dim=1) for batch in trainer._buffered_inputs])
    assert len(lengths.unique()) > 1, "rows of equal length hide wrong normalisers"
    assert max(trainer.gradient_errors) < tolerance, trainer.gradient_errors
    assert max(trainer.loss_errors) < 1e-6, trainer.loss_errors
    return trainer


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("loss_type", LOSS)
def test_a_cycle_trains_and_its_gradients_are_those_of_one_graph(
    tmp_path, loss_type, num_iterations, beta, peft, estimator
):
    trainer = run_checked(
        tmp_path,
        loss_type=loss_type,
        num_iterations=num_iterations,
        max_steps=num_iterations,
        beta=beta,
        peft=peft,
        data=chat_prompts() if peft else text_prompts(),
        p_mask_prompt=0.15 if beta else 0.0,
        **ESTIMATORS[estimator],
    )
    assert ("kl" in trainer.state.log_history[0]) == (beta > 0)


NOT_SEPARABLE = {
    "sequence level": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "luspo, token level": {"loss_type": "luspo"},
    "vespo": {"loss_type": "vespo"},
    "entropy quantile": {"loss_type": "grpo", "top_entropy_quantile": 0.4},
    "entropy quantile, dapo": {"loss_type": "dapo", "top_entropy_quantile": 0.4},
    "off-policy mask": {"loss_type": "grpo", "off_policy_mask_threshold": 1e-4},
    "entropy bonus": {"loss_type": "grpo", "entropy_coef": 0.1},
    "entropy bonus on a quantile": {"loss_type": "dapo", "entropy_coef": 0.1, "top_entropy_quantile": 0.4},
}
SEPARABLE = {
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "two-sided clipping": {"loss_type": "grpo", "delta": 1.5},
    "uncorrected KL": {"loss_type": "dapo", "use_bias_correction_kl": False},
    "tight clipping": {"loss_type": "dr_grpo", "epsilon": 1e-3},
}


@pytest.mark.parametrize("name", [*NOT_SEPARABLE, *SEPARABLE])
def test_losses_that_couple_tokens_have_the_gradients_of_one_graph(tmp_path, name):
    settings = {**NOT_SEPARABLE, **SEPARABLE}[name]
    trainer = run_checked(
        tmp_path, num_iterations=2, max_steps=2, beta=0.04, num_segments=3, p_mask_prompt=0.15, **settings
    )
    assert trainer._separable == (name in SEPARABLE)


def test_adaptive_entropy_control_counts_each_token_once(tmp_path):
    """The controller's state is advanced by TRL's loss, which a segmented step evaluates more than once."""
    runs = [
        build(tmp_path, max_steps=2, use_adaptive_entropy=True, entropy_target=9.0, entropy_coef=0.01, **settings)
        for settings in ({"estimator": "mean_field"}, {"num_segments": 3})
    ]
    for trainer in runs:
        trainer.train()
    delta = runs[0].args.entropy_coef_delta
    for trainer in runs:
        assert losses(trainer, "entropy_coef") == pytest.approx([0.01 + delta, 0.01 + 2 * delta])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(tmp_path, peft, reentrant):
    """Checkpointing is on by default in TRL, and may be reentrant; the weights are those of a run without it."""
    settings = {"num_iterations": 2, "max_steps": 2, "beta": 0.04, "num_segments": 3, "peft": peft}
    trained = []
    for on in (False, True):
        trainer = build(
            tmp_path, gradient_checkpointing=on, gradient_checkpointing_kwargs={"use_reentrant": reentrant}, **settings
        )
        trainer.train()
        assert trainer.accelerator.unwrap_model(trainer.model).is_gradient_checkpointing == on
        trained.append(weights(trainer))
    plain, checkpointed = trained
    assert all(torch.allclose(plain[name], checkpointed[name], rtol=0, atol=1e-6) for name in plain)


@pytest.mark.parametrize("loss_type", ["grpo", "luspo"])
def test_a_shifted_family_trains(tmp_path, loss_type):
    model, tokenizer = tiny("dream")
    settings = {"num_segments": 3, "loss_type": loss_type, "beta": 0.04, "num_iterations": 2, "max_steps": 2}
    run_checked(tmp_path, model=model, tokenizer=tokenizer, **settings)


def test_exact_trajectory_with_rows_of_different_numbers_of_steps(tmp_path):
    """Rows that stop early have fewer steps than others: their missing views score nothing."""
    trainer = run_checked(
        tmp_path, estimator="exact_trajectory", confidence_threshold=0.08, num_iterations=2, max_steps=2
    )
    steps = torch.cat([batch["unmask_step"].amax(dim=1) for batch in trainer._buffered_inputs])
    assert len(steps.unique()) > 1


@pytest.mark.parametrize("settings", [{"loss_type": "grpo"}, {"loss_type": "cispo"}, {"loss_type": "vespo"}], ids=str)
def test_logged_metrics_are_those_of_one_graph(tmp_path, settings):
    """A segmented step evaluates TRL's loss several times, on parts of the log-probs; one evaluation may be logged."""
    logs = []
    for trainer_class in (CheckedTrainer, OneGraphTrainer):
        trainer = build(
            tmp_path, trainer_class, num_segments=3, num_iterations=2, max_steps=2, beta=0.04, epsilon=0.01, **settings
        )
        trainer.train()
        logs.append(trainer.state.log_history[:2])
    for segmented, one_graph in zip(*logs, strict=True):
        assert segmented.keys() == one_graph.keys()
        for key in (key for key in segmented if not key.endswith(("step_time", "_seconds"))):
            assert segmented[key] == pytest.approx(one_graph[key], abs=1e-5, rel=1e-5), key
    assert logs[0][1]["kl"] > 0


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_flops_are_counted_from_forwards_and_by_d2s_formula(tmp_path, peft):
    """d2 App. C.2, for each token: 2PT for sampling, 2PN old and reference each, 6PN an update (4PN if frozen).

    P are the model's own parameters, without the adapter's.
    """
    trainer = build(tmp_path, num_segments=3, num_iterations=2, max_steps=4, beta=0.04, peft=peft, stop_at_eos=False)
    trainer.train()
    parameters = sum(p.numel() for name, p in trainer.model.named_parameters() if "lora_" not in name)
    tokens, steps, views, iterations = 8 * 8, 4, 3, 2
    cycle = tokens * parameters * (2 * steps + 2 * 2 * views + iterations * (4 if peft else 6) * views)
    assert losses(trainer, "flops_paper") == [cycle, 2 * cycle]
    evaluated = build(
        tmp_path,
        num_segments=3,
        num_iterations=2,
        max_steps=4,
        beta=0.04,
        peft=peft,
        stop_at_eos=False,
        eval_dataset=text_prompts(1),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
    )
    evaluated.train()
    counted = losses(trainer, "flops")
    assert losses(evaluated, "flops") == counted, "evaluation is no part of the run's cost"
    assert 0 < counted[0] < counted[1]
    assert losses(trainer, "sampling/steps") == [4, 4] and losses(trainer, "sampling/tokens_per_forward") == [2, 2]


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "step_merge", "num_segments": 3, "kl_estimator": "k3"},
        {"estimator": "exact_trajectory", "kl_estimator": "full", "loss_type": "luspo"},
        {"estimator": "any_order", "decoding": "any_order", "cache": "exact", "kl_estimator": "k3"},
    ],
    ids=lambda s: s["estimator"],
)
def test_truncated_draws_are_scored_among_the_support_by_every_policy(tmp_path, settings, peft):
    """Ratio 1 and KL 0 while nothing moves, in every inner iteration; then weights move and the loss stays finite."""
    settings = {**settings, "top_k": 5, "top_p": 0.9, "beta": 0.04, "num_iterations": 2, "max_steps": 4, "peft": peft}
    trainer = build(tmp_path, learning_rate=0.0, **settings)
    trainer.train()
    assert all(batch["support"].shape[:2] == batch["completion_ids"].shape for batch in trainer._buffered_inputs)
    assert all(batch["support"].shape[2] <= 5 for batch in trainer._buffered_inputs)
    assert losses(trainer, "kl") == [0.0] * 4 and losses(trainer, "clip_ratio/region_mean") == [0.0] * 4
    trainer = build(tmp_path, **settings)
    before = weights(trainer)
    trainer.train()
    assert moved(before, trainer) and all(map(math.isfinite, losses(trainer) + losses(trainer, "kl")))
