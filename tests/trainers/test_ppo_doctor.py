"""The PPO doctor at work: what it says and when, what it does, and that a resumed run does the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from alignkit.errors import ConfigError
from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.ppo_doctor import PPODoctor, finished_records, last_checkpoint_before, lower_rate
from tests.trainers.ppo_histories import CASES

STEPS = 4  # optimizer steps per rollout


class Run:
    """Logs as Trainer does, through a real handler."""

    def __init__(self, doctor: PPODoctor, folder: Path, state: TrainerState | None = None, **options: Any) -> None:
        settings = {"report_to": [], "bf16": False, "num_ppo_epochs": 2, "num_mini_batches": 2, **options}
        self.args = PPOConfig(str(folder), **settings)
        self.state = state or TrainerState(is_world_process_zero=True)
        self.control = TrainerControl()
        weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
        self.optimizer = torch.optim.SGD([{"params": [weights[0]], "lr": 1e-3}, {"params": [weights[1]], "lr": 1e-2}])
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 - step / 100)
        callbacks = [DefaultFlowCallback(), doctor]
        self.handler = CallbackHandler(callbacks, None, None, self.optimizer, self.scheduler)

    def log(self, metrics: dict[str, float], steps: int = STEPS) -> TrainerControl:
        self.state.global_step += steps
        logs = {"loss": 0.1, **metrics}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.handler.on_log(self.args, self.state, self.control, logs)
        return self.control

    def rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]


BAD = {"objective/kl": 50.0}
LARGE = {"objective/kl": 1.0, "policy/approxkl_avg": 0.3}
FINE = {"objective/kl": 1.0, "policy/approxkl_avg": 0.01}


def test_a_finding_is_logged_once_and_again_after_it_went_away(tmp_path, caplog):
    run = Run(PPODoctor(), tmp_path)
    counts = []
    for metrics in [FINE, LARGE, LARGE, LARGE, FINE, LARGE, LARGE, LARGE]:
        run.log(metrics)
        counts.append(len(caplog.records))
    assert counts == [0, 0, 1, 1, 1, 1, 2, 2]
    assert caplog.messages[0] == (
        "PPO doctor: updates too large at step 12: policy/approxkl_avg was 0.3, 0.3 nats per token in the last 2 "
        "rollouts. Within one rollout the policy moves so far that the samples no longer speak for it; PPO's estimate "
        "of the gradient is then wrong. Change learning_rate: a third. num_ppo_epochs: one or two fewer. "
        "target_approx_kl=0.05 ends a rollout's steps early. Now: learning_rate=3e-06, num_ppo_epochs=2, "
        "target_approx_kl=None."
    )
    assert not run.control.should_training_stop
    assert run.rates() == [1e-3, 1e-2]


def test_other_processes_are_silent_and_act_alike(tmp_path, caplog):
    run = Run(PPODoctor("stop"), tmp_path, TrainerState(is_world_process_zero=False))
    for _ in range(2):
        run.log(BAD)
    assert run.control.should_training_stop
    assert not caplog.records


def test_evaluations_are_not_training(tmp_path, caplog):
    run = Run(PPODoctor(), tmp_path)
    for metrics in (LARGE, LARGE):
        run.log(metrics)
        for logs in ({"eval_loss": 1.0, "eval_objective/kl": 99.0}, {"train_loss": 1.0, "train_runtime": 2.0}):
            run.state.log_history.append({**logs, "step": run.state.global_step})
            run.handler.on_log(run.args, run.state, run.control, logs)
    assert len(caplog.records) == 1


def test_a_rollout_is_judged_when_its_last_step_was_logged(tmp_path, caplog):
    """Logged at every step: the first step of a rollout has a ratio of 1 and no KL from the rollout's policy yet."""
    run = Run(PPODoctor(), tmp_path)
    counts = []
    for _ in range(3):
        run.log({"objective/kl": 1.0, "policy/approxkl_avg": 0.0}, steps=1)
        for approx_kl in (0.05, 0.2, 0.3):
            run.log({"policy/approxkl_avg": approx_kl}, steps=1)
            counts.append(len(caplog.records))
    assert counts == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert "was 0.3, 0.3 nats" in caplog.messages[0]


def test_records_of_logs_that_do_not_fall_on_rollouts(tmp_path):
    run = Run(PPODoctor(), tmp_path)
    for kl in (1.0, 2.0, 3.0, 4.0):
        run.log({"objective/kl": kl}, steps=3)
    entries = run.state.log_history
    found = [[record.metrics["objective/kl"] for record in finished_records(entries[:n], run.args)] for n in range(5)]
    assert found == [[], [], [1.0], [1.0, 2.0], [1.0, 2.0, 3.0, 4.0]]  # step 12 ends a rollout
    assert [record.begin for record in finished_records(entries, run.args)] == [0, 3, 6, 9]


def test_critic_warm_up_is_not_judged(tmp_path, caplog):
    still = {"objective/kl": 0.0, "policy/approxkl_avg": 0.0, "policy/clipfrac_avg": 0.0}
    run = Run(PPODoctor(), tmp_path, critic_warmup_rollouts=3)
    counts = []
    for _ in range(9):
        run.log(still)
        counts.append(len(caplog.records))
    assert counts == [0] * 7 + [1, 1]  # five rollouts after the third


def test_the_rate_is_lowered_once_per_finding_for_the_rest_of_the_run(tmp_path, caplog):
    run, reference = Run(PPODoctor("lower_rate", 0.25), tmp_path), Run(PPODoctor(), tmp_path)
    for metrics in (LARGE, LARGE, LARGE):
        run.log(metrics)
    assert run.rates() == pytest.approx([2.5e-4, 2.5e-3])
    for each in (run, reference):
        each.optimizer.step()
        each.scheduler.step()
    assert run.rates() == pytest.approx([rate / 4 for rate in reference.rates()])
    assert reference.rates() == pytest.approx([0.99e-3, 0.99e-2])
    assert caplog.messages[1:] == ["PPO doctor: the learning rate was multiplied by 0.25."]
    run.log({**LARGE, "objective/kl": 40.0, "policy/clipfrac_avg": 0.1})  # a KL that jumps asks for more than that
    assert run.rates() == pytest.approx([rate / 16 for rate in reference.rates()])
    assert not run.control.should_training_stop


def test_two_findings_at_once_lower_it_twice(tmp_path):
    run = Run(PPODoctor("lower_rate"), tmp_path)
    for _ in range(3):
        run.log({"objective/kl": 1.0, "val/ratio": 1.01, "policy/clipfrac_avg": 0.5})
    assert run.rates() == pytest.approx([5e-4, 5e-3])
    run = Run(PPODoctor("lower_rate"), tmp_path)
    for metrics in (FINE, BAD, BAD):
        run.log({**metrics, "policy/clipfrac_avg": 0.5})
    assert run.rates() == pytest.approx([2.5e-4, 2.5e-3])


@pytest.mark.parametrize("name", ["dead critic", "length hacking", "no learning"])
def test_findings_that_ask_for_nothing_change_nothing(tmp_path, caplog, name):
    for act in ("lower_rate", "stop", "rollback"):
        run = Run(PPODoctor(act), tmp_path)
        for metrics in CASES[name][0]:
            run.log(metrics)
        assert run.rates() == [1e-3, 1e-2]
        assert not run.control.should_training_stop
    assert len(caplog.records) == 3


def test_a_lowered_rate_survives_a_checkpoint(tmp_path):
    run = Run(PPODoctor("lower_rate"), tmp_path)
    for metrics in (LARGE, LARGE):
        run.log(metrics)
    resumed = Run(PPODoctor("lower_rate"), tmp_path)
    resumed.optimizer.load_state_dict(run.optimizer.state_dict())
    resumed.scheduler.load_state_dict(run.scheduler.state_dict())
    for each in (run, resumed):
        each.optimizer.step()
        each.scheduler.step()
    assert resumed.rates() == run.rates() == pytest.approx([0.99 * 5e-4, 0.99 * 5e-3])


def test_a_plateau_scheduler_goes_on_from_the_lowered_rate():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    lower_rate(optimizer, scheduler, 0.5)
    for _ in range(2):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tmp_path, caplog):
    story = [FINE, LARGE, LARGE, LARGE, FINE, LARGE, LARGE, BAD, BAD]

    def messages(stop_at: int | None) -> list[str]:
        caplog.clear()
        run = Run(PPODoctor(), tmp_path)
        for number, metrics in enumerate(story):
            if number == stop_at:
                run.state.save_to_json(str(tmp_path / "state.json"))
                run = Run(PPODoctor(), tmp_path, TrainerState.load_from_json(str(tmp_path / "state.json")))
            run.log(metrics)
        return list(caplog.messages)

    whole = messages(None)
    assert len(whole) == 3
    for stop_at in range(1, len(story)):
        assert messages(stop_at) == whole


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")


@pytest.mark.parametrize("act", ["stop", "rollback"])
def test_training_stops_and_the_last_good_checkpoint_is_named(tmp_path, caplog, act):
    save(tmp_path, 4, 8, 12, 16)
    run = Run(PPODoctor(act), tmp_path)
    for metrics in (FINE, FINE, FINE, BAD):
        assert not run.log(metrics).should_training_stop or metrics is BAD
    assert run.control.should_training_stop  # a jump: the rollout of steps 12 to 16 is the first bad one
    assert caplog.messages[1] == "PPO doctor: training stops at step 16."
    if act == "stop":
        assert len(caplog.messages) == 2
    else:
        good = tmp_path / "checkpoint-8"  # the weights of step 12 wrote the bad completions
        assert caplog.messages[2].startswith(
            f"PPO doctor: the last good checkpoint is {good}; the first bad rollout began at step 12."
        )
        assert f"trainer.train(resume_from_checkpoint='{good}')" in caplog.messages[2]


def test_the_first_bad_rollout_is_where_the_finding_begins(tmp_path, caplog):
    save(tmp_path, 4, 8, 12, 16, 20)
    run = Run(PPODoctor("rollback"), tmp_path)
    for kl in (1.0, 1.0, -1.0, -1.0, -1.0):
        run.log({"objective/kl": kl})
    assert (
        f"the last good checkpoint is {tmp_path / 'checkpoint-4'}; the first bad rollout began at step 8"
        in (caplog.messages[-1])
    )


def test_without_an_older_checkpoint_it_says_so(tmp_path, caplog):
    run = Run(PPODoctor("rollback"), tmp_path)
    for _ in range(2):
        run.log(BAD)
    assert caplog.messages[-1].startswith(
        f"PPO doctor: no checkpoint in {tmp_path} is older than the first bad rollout, which began at step 0."
    )


def test_torn_checkpoints_and_other_folders_are_passed_over(tmp_path):
    save(tmp_path, 9, 10)
    (tmp_path / "checkpoint-11").mkdir()  # torn
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint_before(tmp_path, 100) == tmp_path / "checkpoint-10"  # by number, not by name
    assert last_checkpoint_before(tmp_path, 10) == tmp_path / "checkpoint-9"
    assert last_checkpoint_before(tmp_path, 9) is None
    assert last_checkpoint_before(tmp_path / "nowhere", 9) is None


MAKE: list[tuple[Callable[[], PPODoctor], str]] = [
    (lambda: PPODoctor("lower_rates"), "Did you mean 'lower_rate'"),  # type: ignore[arg-type]
    (lambda: PPODoctor(rate_factor=1.0), "between 0 and 1"),
    (lambda: PPODoctor(rate_factor=0.0), "between 0 and 1"),
]


@pytest.mark.parametrize(("make", "message"), MAKE)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
