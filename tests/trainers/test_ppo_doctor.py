"""The PPO doctor: each diagnosis on a history that shows it and on healthy ones, and what the doctor does about it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from alignkit.errors import ConfigError
from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.ppo_diagnosis import DIAGNOSES, diagnose
from alignkit.trainers.ppo_doctor import PPODoctor, finished_records, last_checkpoint_before, lower_rate

STEPS = 4  # optimizer steps per rollout
Rows = list[dict[str, float]]


def healthy(count: int) -> Rows:
    """A run that learns: the score rises, KL and explained variance too, entropy falls a little."""
    return [
        {
            "objective/kl": 0.1 + 6 * i / count + 0.1 * (-1) ** i,
            "objective/scores": 2 * i / count + 0.2 * (-1) ** i,
            "objective/scores_std": 1.0 - 0.3 * i / count,
            "policy/approxkl_avg": 0.004,
            "policy/clipfrac_avg": 0.08,
            "policy/entropy_avg": 1.5 - 0.5 * i / count,
            "val/ratio": 1.01,
            "val/explained_variance": -0.5 + min(i, 8) * 0.1,
            "completions/eos_rate": 0.6 + 0.2 * i / count,
            "completions/mean_length": 30 - 5 * i / count,
            "rewards/length_correlation": 0.3,
            "rewards/ensemble_std": 0.2 + 0.05 * i / count,
        }
        for i in range(count)
    ]


def changed(count: int = 40, last: int | None = None, **values: Any) -> Rows:
    """A healthy run with metrics (`__` for `/`) changed in its last rollouts, by number or by function of the index."""
    rows = healthy(count)
    begin = 0 if last is None else count - last
    for i in range(begin, count):
        for name, value in values.items():
            rows[i][name.replace("__", "/")] = value(i) if callable(value) else value
    return rows


# Name of the diagnosis: a history that shows it, and one that nearly does.
CASES: dict[str, tuple[Rows, Rows]] = {
    "negative KL": (changed(last=3, objective__kl=-0.5), changed(last=2, objective__kl=-0.5)),
    "KL blow-up": (changed(last=2, objective__kl=31.0), changed(last=1, objective__kl=12.0)),
    "updates too large": (changed(last=2, policy__approxkl_avg=0.11), changed(last=1, policy__approxkl_avg=0.5)),
    "clip fraction too high": (changed(last=3, policy__clipfrac_avg=0.4), changed(last=2, policy__clipfrac_avg=0.4)),
    "standstill": (
        changed(12, last=5, policy__clipfrac_avg=0.0, policy__approxkl_avg=0.0, objective__kl=0.001),
        changed(12, policy__clipfrac_avg=0.0, policy__approxkl_avg=0.0),  # one step per rollout, and it learns
    ),
    "dead critic": (changed(10, last=5, val__explained_variance=-0.1), changed(9, val__explained_variance=-0.1)),
    "entropy collapse": (changed(last=3, policy__entropy_avg=0.3), changed(last=3, policy__entropy_avg=0.6)),
    "completions do not end": (changed(last=3, completions__eos_rate=0.0), changed(last=2, completions__eos_rate=0.0)),
    "empty answers": (
        changed(last=3, completions__eos_rate=1.0, completions__mean_length=1.0),
        changed(completions__eos_rate=1.0, completions__mean_length=1.0),  # one token was the task from the start
    ),
    "length hacking": (
        changed(completions__mean_length=lambda i: 20 + i, rewards__length_correlation=0.7),
        changed(completions__mean_length=lambda i: 20 + i),  # it grows, and is not paid for
    ),
    "reward spread gone": (changed(last=3, objective__scores_std=0.05), changed(last=3, objective__scores_std=0.3)),
    "reward hacking": (
        changed(rewards__ensemble_std=lambda i: 0.2 + 0.02 * i),
        changed(rewards__ensemble_std=lambda i: 0.2 + 0.02 * i, objective__scores=lambda i: 0.1 * (-1) ** i)[:20],
    ),
    "no learning": (
        changed(30, objective__scores=lambda i: 0.1 * (-1) ** i),
        changed(29, objective__scores=lambda i: 0.1 * (-1) ** i),
    ),
}
OTHER_SIGNS = {
    "a sudden KL": ("KL blow-up", changed(last=1, objective__kl=26.0)),
    "a ratio far from 1": ("updates too large", changed(last=2, val__ratio=0.85)),
    "a ratio far from 1, above": ("updates too large", changed(last=2, val__ratio=1.15)),
}


def names(history: Rows) -> list[str]:
    return [finding.name for finding in diagnose(history)]


def test_every_diagnosis_has_a_case():
    assert list(CASES) == [diagnosis.name for diagnosis in DIAGNOSES]


@pytest.mark.parametrize("name", CASES)
def test_a_history_that_shows_it_gets_this_diagnosis_alone(name):
    sick, nearly = CASES[name]
    assert names(sick) == [name]
    assert names(nearly) == []


@pytest.mark.parametrize("case", OTHER_SIGNS)
def test_other_signs_of_the_same(case):
    name, history = OTHER_SIGNS[case]
    assert names(history) == [name]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6, 10, 20, 40, 400])
def test_a_healthy_run_gets_none_at_any_time(count):
    history = healthy(count)
    for length in range(count + 1):
        assert names(history[:length]) == []


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_said_of_metrics_that_are_missing(name):
    """Without a critic, an ensemble, or reports of completions."""
    sick, _ = CASES[name]
    for missing in {key for row in sick for key in row}:
        assert set(names([{key: value for key, value in row.items() if key != missing} for row in sick])) <= {name}
    assert names([{} for _ in sick]) == []


def test_a_metric_that_some_rollouts_lack_is_judged_by_the_others():
    rows = changed(last=6, val__explained_variance=-0.1)
    del rows[-2]["val/explained_variance"]
    assert names(rows) == ["dead critic"]


def test_numbers_that_are_not_finite_are_no_finding():
    assert names(changed(last=5, **dict.fromkeys(("objective__kl", "policy__entropy_avg"), float("nan")))) == []


@pytest.mark.parametrize("name", CASES)
def test_findings_say_what_to_change(name):
    (finding,) = diagnose(CASES[name][0])
    options = {option.name for option in fields(PPOConfig)}
    assert set(re.findall(r"\w+", finding.remedy)) & options
    written = set(re.findall(r"(\w+)(?:=|: )", finding.remedy))
    assert all(word in options for word in written if "_" in word or word in ("temperature", "gamma")), written
    assert finding.explanation.endswith(".")
    assert finding.remedy.endswith(".")
    assert re.search(r"\d", finding.evidence)
    assert 1 <= finding.rollouts <= 10


def test_values_that_remedies_give_are_ones_that_the_config_takes(tmp_path):
    text = " ".join(diagnosis.remedy for diagnosis in DIAGNOSES)
    for name, value in re.findall(r"(\w+)=([\w.']+[\w'])", text):
        options: dict[str, Any] = {name: json.loads(value.replace("'", '"').replace("True", "true"))}
        if name == "overlong_penalty":
            options["overlong_buffer_tokens"] = 13
        if name == "advantage_estimator":
            options["num_generations"] = 2
        PPOConfig(str(tmp_path), report_to=[], bf16=False, **options)


def test_evidence_has_the_numbers():
    (finding,) = diagnose(changed(last=3, objective__kl=-0.5))
    assert finding.evidence == "objective/kl was -0.5, -0.5, -0.5 nats in the last 3 rollouts"
    (finding,) = diagnose(changed(last=3, policy__entropy_avg=0.3))
    assert finding.evidence == "policy/entropy_avg went from 1.49 at the start to 0.3 nats over the last 3 rollouts"


# --- the doctor at work ---


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
