"""A number that is not finite, wherever it comes from, moves nothing, and the rows that it came from are named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from alignkit.errors import TrainingError
from alignkit.trainers.guards import check_finite
from tests.guards.guarded_runs import (
    KINDS,
    TRAINERS,
    DropGradients,
    Watch,
    equal,
    make_trainer,
    poison_gradient,
    poison_tokens,
    rows,
    spoil_loss,
    training_log,
)
from tests.ppo_factory import scaling_on_a_cpu
from tests.tiny_preferences import adapter_weights

BAD = [math.nan, math.inf]


def run_with_bad(kind: str, where: str, value: float, folder: Path, *steps: int, **options: Any) -> tuple[Any, Watch]:
    """A run, trained to its end, whose loss or gradient is not finite in some steps."""
    watch = Watch()
    classes = {kind: spoil_loss(TRAINERS[kind], watch, steps, value)} if where == "loss" else {}
    trainer = make_trainer(kind, folder, [watch], classes=classes, **options)
    if where == "gradient":
        poison_gradient(trainer, lambda: watch.step in steps, value)
    trainer.train()
    return trainer, watch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", BAD)
def test_a_bad_step_moves_nothing(kind: str, where: str, value: float, tmp_path: Path, caplog: Any) -> None:
    trainer, watch = run_with_bad(kind, where, value, tmp_path, 2)
    assert equal(watch.before[2], watch.after[2])
    assert set(watch.gradients[2].values()) == {None}
    assert trainer.state.global_step == 4  # the step counts
    for step in (1, 3, 4):
        assert not equal(watch.before[step], watch.after[step])
        assert None not in watch.gradients[step].values()
    assert [(each.step, each.quantities) for each in trainer.guard.skipped] == [
        (2, ["loss", "gradient norm"] if where == "loss" else ["gradient norm"])
    ]
    (warning,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    named = "loss and gradient norm are" if where == "loss" else "gradient norm is"
    assert warning.startswith(f"step 2 is left out: {named} not finite (rows ")
    assert warning.endswith("No weight has moved. That is number 1 of the 3 that max_skipped_steps allows.")


def test_gradients_that_no_scale_makes_finite_are_no_secret(tmp_path: Path) -> None:
    """A gradient scaler skips steps in silence; once its scale cannot be the reason, they are counted and named."""
    with scaling_on_a_cpu():
        trainer = make_trainer("dpo", tmp_path, max_steps=40, max_skipped_steps=2)
        poison_gradient(trainer, lambda: True, math.nan)
        with pytest.raises(TrainingError, match=r"3 bad steps, .*gradient norm is not finite \(rows 0, "):
            trainer.train()
    assert trainer.accelerator.scaler.get_scale() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_is_a_run_without_that_step(kind: str, tmp_path: Path) -> None:
    """Weights, optimizer and metrics of the good steps are those of a run whose second step had no gradients."""
    options: dict[str, Any] = {"num_ppo_epochs": 2} if kind == "ppo" else {}
    bad, bad_watch = run_with_bad(kind, "gradient", math.nan, tmp_path / "bad", 2, **options)
    watch = Watch()
    good = make_trainer(kind, tmp_path / "good", [watch, DropGradients(2)], **options)
    good.train()
    assert equal(bad_watch.after, watch.after)
    logs, expected = training_log(bad), [entry for entry in training_log(good) if entry["step"] != 2]
    assert [entry["step"] for entry in logs] == [1, 3, 4]  # nothing was measured in the second
    assert [entry.get("skipped_steps") for entry in logs] == [None, 1, 1]
    if kind == "ppo":  # a rollout's figures come with its first step that is logged
        logs, expected = logs[:1] + logs[2:], expected[:1] + expected[2:]
    for found, wanted in zip(logs, expected, strict=True):
        clocks = ("per_second", "memory", "skipped", "time")
        names = [name for name in wanted if not any(clock in name for clock in clocks)]
        assert len(names) > 5
        assert {name: found[name] for name in names} == {name: wanted[name] for name in names}


def test_a_window_is_the_mean_of_its_good_steps(tmp_path: Path) -> None:
    each = make_trainer("dpo", tmp_path / "each", [DropGradients(2)])
    each.train()
    losses = {entry["step"]: entry for entry in training_log(each)}
    bad, _ = run_with_bad("dpo", "loss", math.nan, tmp_path / "bad", 2, logging_steps=4)
    (entry,) = training_log(bad)
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert entry[name] == pytest.approx(sum(losses[step][name] for step in (1, 3, 4)) / 3, rel=1e-6)
    assert entry["grad_norm"] == losses[4]["grad_norm"]
    final = bad.state.log_history[-1]["train_loss"]
    assert final == pytest.approx(sum(losses[step]["loss"] for step in (1, 3, 4)) / 3, rel=1e-6)


def test_the_norm_of_a_step_that_was_not_made_is_not_logged(tmp_path: Path) -> None:
    bad, _ = run_with_bad("dpo", "gradient", math.inf, tmp_path, 4, logging_steps=2)
    first, second = training_log(bad)
    assert math.isfinite(first["grad_norm"])
    assert "grad_norm" not in second
    assert second["skipped_steps"] == 1
    assert all(math.isfinite(value) for value in second.values())


@pytest.mark.parametrize("kind", ["dpo", "kto", "reward"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("budget", [None, 30])
def test_the_row_is_named(kind: str, accumulation: int, budget: int | None, tmp_path: Path, caplog: Any) -> None:
    """Row 5 is the second of step 2, or of the second micro-batch: no other is named."""
    watch = Watch()
    trainer = make_trainer(
        kind,
        tmp_path,
        [watch],
        poisoned=(5,),
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        max_tokens_per_forward=budget,
    )
    step = 2 if accumulation == 1 else 1
    poison_tokens(trainer.bundle.base, lambda: watch.step == step)
    trainer.train()
    (skipped,) = trainer.guard.skipped
    assert skipped.step == step
    expected = ["loss", "reward", "gradient norm"] if kind == "reward" else [
        "loss", "log-probability", "reward", "gradient norm"]  # fmt: skip
    assert skipped.quantities == expected
    # KTO's estimate of the KL is a mean over the micro-batch: a bad row spoils the loss of all its rows.
    assert skipped.rows == ([4, 5, 6, 7] if kind == "kto" else [5])
    assert equal(watch.before[step], watch.after[step])
    assert "rows 5 of the training data)" in caplog.text or kind == "kto"


def test_rows_are_those_of_the_data_as_given(tmp_path: Path, caplog: Any) -> None:
    given: list[Any] = list(rows(16, poisoned=(6,)))
    given[2] = {**given[2], "rejected_ids": given[2]["chosen_ids"]}  # dropped: both sides are the same
    watch = Watch()
    trainer = make_trainer("dpo", tmp_path, [watch], train_dataset=Dataset.from_list(given), max_steps=2)
    poison_tokens(trainer.bundle.base, lambda: watch.step == 2)
    trainer.train()
    assert [each.rows for each in trainer.guard.skipped] == [[6]]
    assert "rows 6 of the training data, 5 of those that were kept" in caplog.text


def test_bad_rewards_alone_are_seen(tmp_path: Path) -> None:
    """A reward may be infinite while the loss, which squashes it, is not."""
    watch = Watch()
    trainer = make_trainer("dpo", tmp_path, [watch], max_steps=2)
    objective = trainer.objective

    class Spoilt(type(objective)):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            result = super().__call__(*args, **kwargs)
            if watch.step == 2:
                result.chosen_rewards[1] = math.inf
            return result

    trainer.objective = Spoilt(**vars(objective))
    trainer.train()
    assert [(each.step, each.quantities, each.rows) for each in trainer.guard.skipped] == [(2, ["reward"], [5])]
    assert equal(watch.before[2], watch.after[2])


@pytest.mark.parametrize("kind", KINDS)
def test_one_more_than_allowed_stops_the_run(kind: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="max_skipped_steps=1") as caught:
        run_with_bad(kind, "gradient", math.nan, tmp_path, 2, 4, max_skipped_steps=1)
    text = str(caught.value)
    assert text.startswith(
        "2 bad steps, more than max_skipped_steps=1 allows. step 2: gradient norm is not finite (rows"
    )
    assert "; step 4: gradient norm is not finite (rows " in text
    assert "No checkpoint was saved yet." in text


def test_none_allowed_stops_at_the_first(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"1 bad steps?, more than max_skipped_steps=0 allows"):
        run_with_bad("dpo", "loss", math.nan, tmp_path, 3, max_skipped_steps=0)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_stop_at_once(kind: str, tmp_path: Path) -> None:
    watch = Watch()
    trainer = make_trainer(kind, tmp_path, [watch])
    # The output projection: what generates for PPO has its say first otherwise.
    name, weight = list(adapter_weights(trainer.model).items())[-1]
    original = watch.on_step_begin

    def spoil(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(args, state, control, **kwargs)
        if watch.step == 2:
            with torch.no_grad():
                weight.view(-1)[0] = math.nan

    watch.on_step_begin = spoil
    with pytest.raises(TrainingError, match=r"step 2: .* because weights are not: ") as caught:
        trainer.train()
    assert name in str(caught.value)
    assert "No step can repair that" in str(caught.value)


def test_weights_are_looked_at_before_a_checkpoint() -> None:
    model: Any = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    check_finite(model)
    with torch.no_grad():
        model[1].weight[0, 1] = math.inf
    with pytest.raises(TrainingError, match=r"weights are not finite, so no checkpoint is written: 1\.weight\."):
        check_finite(model)
    model[1].requires_grad_(False)
    check_finite(model)  # nobody saves those


def test_evaluation_names_its_bad_rows(tmp_path: Path, caplog: Any) -> None:
    trainer = make_trainer("dpo", tmp_path, eval_dataset=rows(6, poisoned=(3,)))
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert "not finite" not in caplog.text
    poison_tokens(trainer.bundle.base, lambda: True)
    assert math.isnan(trainer.evaluate()["eval_loss"])
    assert (
        "evaluation after step 0: loss, log-probability and reward are not finite (rows 3 of the data)." in caplog.text
    )


def test_a_best_model_is_one_that_was_measured(tmp_path: Path) -> None:
    trainer = make_trainer("dpo", tmp_path, metric_for_best_model="loss", greater_is_better=False)
    assert not trainer._determine_best_metric({"eval_loss": math.nan}, None)
    assert trainer.state.best_metric is None
    assert trainer._determine_best_metric({"eval_loss": 0.5}, None)
    assert not trainer._determine_best_metric({"eval_loss": 0.6}, None)
    assert trainer._determine_best_metric({"eval_loss": 0.4}, None)
