"""Objects that a user hands to a trainer: their state is saved, or the run says that it would be lost."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from alignkit.checkpoint.states import read_states
from alignkit.errors import CheckpointError
from alignkit.trainers.outsiders import owner_of
from tests.ppo_factory import ppo_trainer, vowels

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


class Drifting:
    """A reward that depends on how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0
        self.unused: list[int] = []

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        self.calls += 1
        return [value + self.calls for value in vowels(completions)]


class Saved(Drifting):
    """The same, with state that can be saved."""

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls = state_dict["calls"]


class Half(Drifting):
    """One half of the protocol is none."""

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}


@pytest.mark.parametrize(
    "reward",
    [Drifting(), Half(), Drifting().__call__, partial(Drifting())],
    ids=["object", "half", "method", "partial"],
)
def test_a_reward_whose_state_would_be_lost_is_refused(reward: Any, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"changes its 'calls' .* give it state_dict\(\) and load_state_dict\(\)"):
        ppo_trainer(tmp_path, reward, **SAVING).train()
    ppo_trainer(tmp_path / "unsaved", reward, max_steps=2).train()


def test_a_reward_with_state_goes_on_where_it_was(tmp_path: Path):
    reward = Saved()
    ppo_trainer(tmp_path, reward, **SAVING).train()
    assert reward.calls == 3
    for step in (1, 2, 3):
        saved = read_states(tmp_path / f"checkpoint-{step}" / "states_0.safetensors")
        assert saved["states"]["reward/Saved"] == {"calls": step}
    again = Saved()
    ppo_trainer(tmp_path / "again", again, **SAVING).train(str(tmp_path / "checkpoint-2"))
    assert again.calls == 3


def test_state_can_be_declared_to_be_of_no_matter(tmp_path: Path):
    reward = Drifting()
    trainer = ppo_trainer(tmp_path, reward, **SAVING)
    trainer.states.leave_out(reward)
    trainer.train()
    assert reward.calls == 3


class Counting(TrainerCallback):
    """A callback of a user's."""

    def __init__(self) -> None:
        self.entries: list[Any] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.entries.append(logs)


def test_a_callback_that_changes_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    ppo_trainer(tmp_path, callbacks=[Counting()], logging_steps=1, **SAVING).train()
    told = [record for record in caplog.records if "Counting changes its 'entries'" in record.message]
    assert len(told) == 1


def test_a_plain_function_has_no_owner():
    assert owner_of(vowels) is None
    assert owner_of(partial(vowels)) is None
    assert isinstance(owner_of(Drifting().__call__), Drifting)
