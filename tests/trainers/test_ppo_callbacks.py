"""PPO's events, and the callbacks that report."""

from __future__ import annotations

import io
import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from alignkit.errors import ConfigError
from alignkit.functional.statistics import RunningMoments
from alignkit.trainers.pooled import PooledWindow, mean
from alignkit.trainers.ppo_callbacks import (
    SAMPLES_FILE,
    PPOCallback,
    PPOEvent,
    RewardCallback,
    RolloutCallback,
    StopOnKL,
    ValueCallback,
    call_event,
    reporting_callbacks,
    steps_per_rollout,
)
from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.ppo_metrics import completion_metrics, reward_metrics, shaping_metrics, value_metrics
from tests.trainers.ppo_rollouts import MASK, RETURNS, rewards, rollout

MODEL, TOKENIZER = object(), object()
ROLLOUT: dict[str, Any] = {"kl_coef": 0.1, "moments": None}


def handler(*callbacks: TrainerCallback) -> CallbackHandler:
    return CallbackHandler([DefaultFlowCallback(), *callbacks], MODEL, TOKENIZER, None, None)


def config(folder: Path, **options: Any) -> PPOConfig:
    return PPOConfig(str(folder), report_to=[], bf16=False, num_ppo_epochs=2, num_mini_batches=2, **options)


def state(step: int = 0, *, main: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=100, is_world_process_zero=main)


def display() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=140, color_system=None)


def shown(callback: RolloutCallback) -> str:
    return callback.console.file.getvalue()  # type: ignore[attr-defined]


def end_rollout(callback: PPOCallback, args: PPOConfig, at: TrainerState, **given: Any) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    kwargs = {**ROLLOUT, "rollout": rollout(), **given}
    call_event(handler(callback), "on_rollout_end", args, at, TrainerControl(), metrics=metrics, **kwargs)
    return metrics


# --- events ---


class Recorder(PPOCallback):
    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def on_rollout_begin(self, args, state, control, **kwargs):
        self.seen.append(("on_rollout_begin", kwargs))

    def on_rewards(self, args, state, control, **kwargs):
        self.seen.append(("on_rewards", kwargs))

    def on_values(self, args, state, control, **kwargs):
        self.seen.append(("on_values", kwargs))

    def on_rollout_end(self, args, state, control, **kwargs):
        self.seen.append(("on_rollout_end", kwargs))

    def on_minibatch_end(self, args, state, control, **kwargs):
        self.seen.append(("on_minibatch_end", kwargs))


EVENTS: tuple[PPOEvent, ...] = ("on_rollout_begin", "on_rewards", "on_values", "on_rollout_end", "on_minibatch_end")


def test_every_event_reaches_ppo_callbacks_with_what_trainers_events_bring(tmp_path):
    recorder = Recorder()
    for event in EVENTS:
        call_event(handler(recorder), event, config(tmp_path), state(), TrainerControl(), extra=event)
    assert [event for event, _ in recorder.seen] == list(EVENTS)
    for event, kwargs in recorder.seen:
        assert kwargs["extra"] == event
        assert kwargs["model"] is MODEL
        assert kwargs["processing_class"] is TOKENIZER
        assert {"optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"} <= kwargs.keys()


class Strict(TrainerCallback):
    """A stock callback that would object to any event it does not have."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was looked up")


def test_stock_callbacks_are_left_alone(tmp_path):
    control = TrainerControl()
    recorder = Recorder()
    for event in EVENTS:
        assert call_event(handler(Strict(), recorder), event, config(tmp_path), state(), control) is control
    assert len(recorder.seen) == len(EVENTS)


class Stopper(PPOCallback):
    def on_rollout_begin(self, args, state, control, **kwargs):
        return TrainerControl(should_training_stop=True)


class Witness(PPOCallback):
    def on_rollout_begin(self, args, state, control, **kwargs):
        self.control = control


def test_a_returned_control_takes_effect_and_is_passed_on(tmp_path):
    witness, control = Witness(), TrainerControl()
    found = call_event(handler(Stopper(), witness), "on_rollout_begin", config(tmp_path), state(), control)
    assert found.should_training_stop
    assert witness.control is found
    assert not control.should_training_stop


def test_base_events_do_nothing(tmp_path):
    control = TrainerControl()
    assert end_rollout(PPOCallback(), config(tmp_path), state()) == {}
    for event, given in (
        ("on_rollout_begin", {}),
        ("on_rewards", {"rewards": rewards(), "metrics": {}}),
        ("on_minibatch_end", {"metrics": {}}),
    ):
        assert call_event(handler(PPOCallback()), event, config(tmp_path), state(), control, **given) is control


def test_steps_per_rollout(tmp_path):
    assert steps_per_rollout(config(tmp_path)) == 4


# --- rollouts ---


def test_completion_metrics_are_logged_on_every_process(tmp_path):
    for main in (True, False):
        metrics = end_rollout(RolloutCallback(console=display()), config(tmp_path), state(main=main))
        expected = completion_metrics(rollout(), processes=1)
        assert {name: figure.read() for name, figure in metrics.items()} == {
            name: figure.read() for name, figure in expected.items()
        }


def test_samples_go_to_the_table_and_all_to_the_file(tmp_path):
    callback = RolloutCallback(samples=3, console=display())
    end_rollout(callback, config(tmp_path), state())
    text = shown(callback)
    for part in ("rollout 0, step 0", "Hello", "one", "1.000", "polite 0.500", "2, cut", "dropped", "user: Bye"):
        assert part in text
    assert "four" not in text
    rows = [json.loads(line) for line in (tmp_path / SAMPLES_FILE).read_text().splitlines()]
    assert [row["completion"] for row in rows] == ["one", "two", "", "four"]
    assert [row["prompt"] for row in rows] == ["Hello"] * 2 + [[{"role": "user", "content": "Bye"}]] * 2
    assert rows[3] == {
        "step": 0,
        "rollout": 0,
        "prompt": [{"role": "user", "content": "Bye"}],
        "completion": "four",
        "tokens": 3,
        "finished": True,
        "kept": True,
        "rewards": {"polite": None, "short": 4.5},
        "reward": 4.5,
        "score": 4.5,
    }
    assert [row["kept"] for row in rows] == [True, True, False, True]


def test_samples_come_every_few_rollouts_from_the_main_process(tmp_path):
    callback = RolloutCallback(every_rollouts=2, console=display())
    for step in (0, 4, 8, 12):  # four steps to a rollout
        end_rollout(callback, config(tmp_path), state(step))
        end_rollout(RolloutCallback(console=display()), config(tmp_path / "other"), state(step, main=False))
    rows = [json.loads(line) for line in (tmp_path / SAMPLES_FILE).read_text().splitlines()]
    assert [(row["rollout"], row["step"]) for row in rows] == [(0, 0)] * 4 + [(2, 8)] * 4
    assert shown(callback).count("step ") == 2
    assert not (tmp_path / "other" / SAMPLES_FILE).exists()


def test_a_terminal_is_shown_nothing_that_it_obeys(tmp_path):
    wicked = "\x1b]0;title\x07 \x1b[2J \x9b31m \u202eabc \r[red]x[/red]"
    callback = RolloutCallback(console=display())
    end_rollout(
        callback, config(tmp_path), state(), rollout=rollout(texts=[wicked, "b\nc", "", ""], sources=[wicked, "p"])
    )
    text = shown(callback)
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(text)
    assert "\\x1b[2J" in text
    assert "[red]x[/red]" in text  # nor is it markup
    (first, *_) = (tmp_path / SAMPLES_FILE).read_text().splitlines()
    assert json.loads(first)["completion"] == wicked  # the file keeps it
    assert not {"\x1b", "\x9b", "\u202e"} & set(first)


def test_long_texts_are_cut_on_the_terminal_only(tmp_path):
    callback = RolloutCallback(console=display())
    long = "x" * 5000
    end_rollout(callback, config(tmp_path), state(), rollout=rollout(texts=[long, "", "", ""]))
    assert shown(callback).count("x") == 600
    assert json.loads((tmp_path / SAMPLES_FILE).read_text().splitlines()[0])["completion"] == long


def test_a_resumed_run_leaves_the_file_as_one_that_never_stopped(tmp_path, caplog):
    def run(folder: Path, begin: int, steps: tuple[int, ...]) -> str:
        callback = RolloutCallback(every_rollouts=1, console=display())
        handler(callback).on_train_begin(config(folder), state(begin), TrainerControl())
        for step in steps:
            end_rollout(callback, config(folder), state(step))
        return (folder / SAMPLES_FILE).read_text()

    whole = run(tmp_path / "whole", 0, (0, 4, 8, 12))
    assert not caplog.records
    run(tmp_path / "killed", 0, (0, 4, 8))
    with (tmp_path / "killed" / SAMPLES_FILE).open("a") as file:
        file.write('{"step": 1')  # torn
    assert run(tmp_path / "killed", 8, (8, 12)) == whole
    assert "removed 5 samples of an earlier run, from step 8 on" in caplog.text
    assert list((tmp_path / "killed").iterdir()) == [tmp_path / "killed" / SAMPLES_FILE]


def test_other_processes_do_not_touch_the_file(tmp_path):
    (tmp_path / SAMPLES_FILE).write_text('{"step": 3}\n')
    handler(RolloutCallback()).on_train_begin(config(tmp_path), state(main=False), TrainerControl())
    assert (tmp_path / SAMPLES_FILE).read_text() == '{"step": 3}\n'


@pytest.mark.parametrize("options", [{"every_rollouts": 0}, {"samples": 0}])
def test_impossible_numbers_are_refused(options):
    with pytest.raises(ConfigError, match="must be 1 or more"):
        RolloutCallback(**options)


def test_trackers_get_samples_where_the_run_reports_to_them(tmp_path, monkeypatch):
    sent: list[Any] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def add_text(self, name: str, text: str, step: int) -> None:
            sent.append((self.folder, name, text, step))

    wandb = types.ModuleType("wandb")
    wandb.run = None  # type: ignore[attr-defined]
    wandb.Table = lambda columns, data: (columns, data)  # type: ignore[attr-defined]
    wandb.log = lambda values, commit: sent.append((values, commit))  # type: ignore[attr-defined]
    tensorboard = types.ModuleType("tensorboard")
    tensorboard.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    callback, args = RolloutCallback(samples=1, console=display()), config(tmp_path)
    end_rollout(callback, args, state())
    assert sent == []
    args.report_to = ["wandb", "tensorboard"]
    end_rollout(callback, args, state())  # no run of wandb is open
    ((folder, name, text, step),) = sent
    assert (folder, name, step) == (str(tmp_path / "runs" / "samples"), "completions/samples", 0)
    assert text == "    Helloone\n    [1.000]"
    wandb.run = object()  # type: ignore[attr-defined]
    end_rollout(callback, args, state(40))
    columns = ["step", "prompt", "completion", "score", "tokens"]
    assert sent[1] == ({"completions/samples": (columns, [[40, "Hello", "one", 1.0, 3]])}, False)


# --- rewards and values ---


def test_reward_metrics_are_logged(tmp_path):
    callback, args = RewardCallback(), config(tmp_path)
    metrics: dict[str, Any] = {}
    call_event(handler(callback), "on_rewards", args, state(), TrainerControl(), rewards=rewards(), metrics=metrics)
    assert metrics.keys() == reward_metrics(rewards()).keys()
    moments = RunningMoments(5, 1.0, 4.0)
    found = end_rollout(callback, args, state(), moments=moments, kl_coef=0.3)
    assert {name: figure.read() for name, figure in found.items()} == {
        name: figure.read() for name, figure in shaping_metrics(rollout(), kl_coef=0.3, moments=moments).items()
    }
    assert found["objective/kl_coef"].read() == pytest.approx(0.3)
    assert found["rewards/running_std"].read() == 2.0


@pytest.mark.parametrize(("estimator", "logged"), [("gae", True), ("rloo", False)])
def test_explained_variance_is_logged_where_there_is_a_critic(tmp_path, estimator, logged):
    metrics: dict[str, Any] = {}
    args = config(tmp_path, advantage_estimator=estimator, num_generations=2)
    given = {"tokens": rollout().tokens, "returns": RETURNS, "mask": MASK, "metrics": metrics}
    call_event(handler(ValueCallback()), "on_values", args, state(), TrainerControl(), **given)
    assert ("val/explained_variance" in metrics) is logged
    if logged:
        expected = value_metrics(rollout().tokens, RETURNS, MASK)["val/explained_variance"].read()
        assert metrics["val/explained_variance"].read() == expected


def test_warm_up_is_announced_once_at_each_end(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="alignkit")
    args = config(tmp_path, critic_warmup_rollouts=2)
    for step in range(0, 20, 4):
        for main in (True, False):
            event_state = state(step, main=main)
            call_event(handler(ValueCallback()), "on_rollout_begin", args, event_state, TrainerControl())
        if step == 4:
            assert len(caplog.records) == 1
    first, second = caplog.messages
    assert first.startswith("Critic warm-up: the first 2 rollouts train the critic alone")
    assert second.startswith("Critic warm-up is over after 2 rollouts")
    caplog.clear()
    call_event(handler(ValueCallback()), "on_rollout_begin", config(tmp_path), state(), TrainerControl())
    assert not caplog.records


def test_every_run_gets_all_three_reports():
    assert [type(each) for each in reporting_callbacks()] == [RolloutCallback, RewardCallback, ValueCallback]


class OwnReward(RewardCallback):
    pass


def test_a_report_that_the_user_has_given_is_not_made_twice():
    given = [RolloutCallback(every_rollouts=1), OwnReward, DefaultFlowCallback]
    assert [type(each) for each in reporting_callbacks(given)] == [ValueCallback]


class Shouting(PPOCallback):
    def on_rewards(self, args, state, control, *, rewards, metrics, **kwargs):
        metrics["rewards/shouting"] = mean(torch.tensor([1.0, 0.0, 0.0, 1.0])[rewards.kept])


def test_a_metric_of_ones_own_joins_the_others(tmp_path):
    metrics: dict[str, Any] = {}
    both = handler(Shouting(), RewardCallback())
    call_event(both, "on_rewards", config(tmp_path), state(), TrainerControl(), rewards=rewards(), metrics=metrics)
    window = PooledWindow()
    window.add(metrics)
    window.add(metrics)
    assert window.figures()["rewards/shouting"].kind == "mean"
    assert window.figures()["rewards/shouting"].sums.tolist() == [6.0, 4.0]
    assert {"rewards/polite", "rewards/dropped"} <= window.state_dict().keys()


# --- stopping ---


@pytest.mark.parametrize(
    ("logs", "stops"),
    [
        ({"objective/kl": 10.1}, True),
        ({"objective/kl": 10.0}, False),
        ({"eval_objective/kl": 99.0}, False),
        ({"loss": 99.0}, False),
        (None, False),
    ],
)
@pytest.mark.parametrize("main", [True, False])
def test_stop_on_kl(tmp_path, caplog, logs, stops, main):
    control = handler(StopOnKL(10.0)).on_log(config(tmp_path), state(7, main=main), TrainerControl(), logs)
    assert control.should_training_stop is stops
    assert ("Training stops at step 7: objective/kl is 10.1 nats, above max_kl=10." in caplog.text) is (stops and main)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_bound_that_would_stop_at_once_is_refused(bound):
    with pytest.raises(ConfigError, match="must be positive"):
        StopOnKL(bound)
