"""PPO: a rollout that holds a number which is not finite is left out whole, and counts once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.errors import TrainingError
from alignkit.rollout.reward import RewardError
from tests.guards.guarded_runs import TRAINERS, Watch, equal, make_trainer, spoil_loss, training_log
from tests.ppo_factory import prompts, scaling_on_a_cpu, vowels

TWO_STEPS: dict[str, Any] = {"num_ppo_epochs": 2, "max_steps": 6}


def rewards(*rollouts: int) -> list[Any]:
    """Two rewards; in some rollouts each is a number in fp32 for the first sample, and their sum is none."""
    calls = 0

    def one(completions: list[str], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        is_bad = (calls + 1) // 2 in rollouts  # both are called once for every rollout
        return [3e38 if is_bad and not number else reward for number, reward in enumerate(vowels(completions))]

    def other(completions: list[str], **columns: Any) -> list[float]:
        return one(completions)

    return [one, other]


def test_a_bad_rollout_moves_nothing_and_counts_once(tmp_path: Path, caplog: Any) -> None:
    watch = Watch()
    options: dict[str, Any] = {**TWO_STEPS, "normalize_rewards": True, "kl_target": 3.0, "kl_horizon": 20}
    trainer = make_trainer("ppo", tmp_path, [watch], reward=rewards(2), **options)
    carried: dict[int, Any] = {}
    begin = watch.on_step_begin

    def note(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin(args, state, control, **kwargs)
        carried[watch.step] = trainer.ppo_state.kl_coef, trainer.ppo_state.moments.state_dict()

    watch.on_step_begin = note
    trainer.train()
    assert trainer.state.global_step == 6
    for step in (3, 4):
        assert equal(watch.before[step], watch.after[step])
        assert set(watch.gradients[step].values()) == {None}
        assert equal(carried[step], carried[2])  # neither the KL coefficient nor the rewards' moments moved
    for step in (1, 2, 5, 6):
        assert not equal(watch.before[step], watch.after[step])
    assert not equal(carried[5], carried[2])
    (skipped,) = trainer.guard.skipped
    assert (skipped.step, skipped.quantities) == (3, ["reward", "advantage"])
    assert trainer.guard.steps_left_out == 2
    (row,) = skipped.rows
    assert f"steps 3 to 4 are left out: reward and advantage are not finite (rows {row} of the" in caplog.text
    logs = training_log(trainer)
    assert [entry["step"] for entry in logs] == [1, 2, 5, 6]
    assert [entry.get("skipped_steps") for entry in logs] == [None, None, 2, 2]
    assert all(math.isfinite(value) for entry in logs for value in entry.values())


def test_log_probs_of_a_rollout(tmp_path: Path) -> None:
    watch = Watch()
    trainer = make_trainer("ppo", tmp_path, [watch], **TWO_STEPS)
    score = trainer.score

    def spoilt(prompts: Any, completions: Any) -> Any:
        table = score(prompts, completions)
        if trainer.state.global_step == 2:
            table.ref_logps[1, 0] = -math.inf
        return table

    trainer.score = spoilt
    trainer.train()
    (skipped,) = trainer.guard.skipped
    assert (skipped.step, skipped.quantities[0]) == (3, "log-probability")
    ids = trainer.train_dataset["row_id"]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(42)).tolist()  # `RolloutSampler`'s
    assert skipped.rows == [ids[order[4 + 1]]]
    assert equal(watch.before[3], watch.after[4])


def test_evaluation_names_its_bad_rows(tmp_path: Path, caplog: Any) -> None:
    trainer = make_trainer("ppo", tmp_path, eval_dataset=prompts(5, seed=4))
    assert math.isfinite(trainer.evaluate()["eval_kl"])
    assert "not finite" not in caplog.text
    score = trainer.score

    def spoilt(asked: Any, completions: Any) -> Any:
        table = score(asked, completions)
        table.ref_logps[3, 0] = math.nan
        return table

    trainer.score = spoilt
    assert not math.isfinite(trainer.evaluate()["eval_kl"])
    assert "evaluation after step 0: log-probability is not finite (rows 3 of the data)." in caplog.text


def test_too_many_bad_rollouts(tmp_path: Path) -> None:
    trainer = make_trainer("ppo", tmp_path, reward=rewards(1, 3), max_skipped_steps=1, **TWO_STEPS)
    with pytest.raises(TrainingError, match=r"2 bad steps, more than max_skipped_steps=1 allows\. step 1: reward"):
        trainer.train()
    assert trainer.state.global_step == 4


def test_a_reward_that_is_no_number_is_still_the_business_of_on_reward_error(tmp_path: Path) -> None:
    def nan(completions: list[str], **columns: Any) -> list[float]:
        return [math.nan, *vowels(completions)[1:]]

    with pytest.raises(RewardError, match=r"sample 0: the reward is .*nan"):
        make_trainer("ppo", tmp_path / "raise", reward=nan).train()
    trainer = make_trainer("ppo", tmp_path / "drop", reward=nan, on_reward_error="drop")
    trainer.train()
    assert not trainer.guard.skipped  # the sample is left out, not the step
    assert all(math.isfinite(value) for entry in training_log(trainer) for value in entry.values())


@pytest.mark.parametrize("where", ["step", "rollout"])
def test_a_gradient_scaler_stays_as_it_is(where: str, tmp_path: Path) -> None:
    """Under fp16 a bad loss is left out as elsewhere, and the scale is not what pays for it."""
    with scaling_on_a_cpu():
        watch = Watch()
        classes = {"ppo": spoil_loss(TRAINERS["ppo"], watch, (3,), math.nan)} if where == "step" else {}
        reward = rewards(2) if where == "rollout" else vowels
        trainer = make_trainer("ppo", tmp_path, [watch], reward=reward, classes=classes, **TWO_STEPS)
        scaler = trainer.accelerator.scaler
        states: dict[int, Any] = {}
        end = watch.on_step_end

        def note(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            states[watch.step] = scaler.get_scale(), scaler._get_growth_tracker()
            end(args, state, control, **kwargs)

        watch.on_step_end = note
        trainer.train()
        assert trainer.accelerator.scaler is scaler
    assert [each.step for each in trainer.guard.skipped] == [3]
    assert equal(watch.before[3], watch.after[3])
    assert states[3] == states[2]
    assert states[5][1] == states[2][1] + (2 if where == "step" else 1)  # the good steps go on counting
    assert not equal(watch.before[5], watch.after[5])
