"""The comparison of runs finds no difference where there is none, and every one that is made by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_pt_utils import safe_globals

from alignkit.checkpoint.states import read_states, write_states
from tests.crash.compare import differences, unequal
from tests.crash.nursery import Nursery
from tests.crash.runs import RUNS, SAVED

STATES = "states_0.safetensors"
CHECKPOINT = f"checkpoint-{SAVED[-1]}"


@pytest.fixture(scope="module")
def whole(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of PPO leaves, which has most kinds of files."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    outcome = nursery.run("ppo", folder)
    assert outcome.error == "", outcome.said
    return folder


def edit_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def edit_pickle(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        with safe_globals():
            content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return edit


def edit_states(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = read_states(path)
        change(content)
        write_states(path, content)

    return edit


def edit_tensors(path: Path) -> None:
    """Move one value by one unit in its last place."""
    tensors = load_file(path)
    name = sorted(tensors)[0]
    values = tensors[name].view(-1)
    values[0] = torch.nextafter(values[0], torch.tensor(9.0))
    save_file(tensors, path, metadata={"format": "pt"})


def nudge(tensor: torch.Tensor) -> None:
    tensor.view(-1)[0] += 1


EDITS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a weight": ("adapter_model.safetensors", edit_tensors),
    "a moment": ("optimizer.pt", edit_pickle(lambda found: nudge(found["state"][0]["exp_avg"]))),
    "the optimizer's step": ("optimizer.pt", edit_pickle(lambda found: nudge(found["state"][3]["step"]))),
    "a learning rate": ("optimizer.pt", edit_pickle(lambda found: found["param_groups"][0].update(lr=0.5))),
    "the schedule": ("scheduler.pt", edit_pickle(lambda found: found.update(last_epoch=3))),
    "torch's generator": ("rng_state.pth", edit_pickle(lambda found: nudge(found["cpu"]))),
    "Python's generator": ("rng_state.pth", edit_pickle(lambda found: found.update(python=(3, (1,), None)))),
    "numpy's generator": ("rng_state.pth", edit_pickle(lambda found: found["numpy"][1].put(0, 1))),
    "the KL coefficient": (STATES, edit_states(lambda found: found["states"]["ppo"].update(kl_coef=0.5))),
    "the rewards' mean": (STATES, edit_states(lambda found: found["states"]["ppo"]["moments"].update(mean=0.5))),
    "the open window": (STATES, edit_states(lambda found: found["states"]["ppo"]["window"].popitem())),
    "the sum of losses": (STATES, edit_states(lambda found: nudge(found["trainer"]["loss"]))),
    "the step": ("trainer_state.json", edit_json(lambda found: found.update(global_step=3))),
    "a logged loss": ("trainer_state.json", edit_json(lambda found: found["log_history"][0].update(loss=0.25))),
    "a logged line": ("trainer_state.json", edit_json(lambda found: found["log_history"].pop())),
    "a missing file": ("scheduler.pt", Path.unlink),
    "another file": ("more.json", lambda path: path.write_text("{}")),
    "the tokenizer": ("tokenizer_config.json", edit_json(lambda found: found.update(pad_token="x"))),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_every_time_and_another_order_is_not(nursery: Nursery, tmp_path: Path, name: str):
    outcomes = [nursery.run(name, tmp_path / number) for number in ("first", "second")]
    assert [outcome.error for outcome in outcomes] == ["", ""], outcomes[0].said
    assert differences(tmp_path / "first", tmp_path / "second") == []
    assert nursery.run(name, tmp_path / "other", data_seed=1).error == ""
    found = differences(tmp_path / "other", tmp_path / "first")
    for part in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json"):
        assert any(line.startswith(f"{CHECKPOINT}/{part}") for line in found), part


@pytest.mark.parametrize("what", EDITS)
def test_every_kind_of_state_is_compared(whole: Path, tmp_path: Path, what: str):
    changed = tmp_path / "changed"
    shutil.copytree(whole, changed)
    assert differences(changed, whole) == []
    name, edit = EDITS[what]
    edit(changed / CHECKPOINT / name)
    found = differences(changed, whole)
    assert found
    assert all(line.startswith(f"{CHECKPOINT}/{name}: ") for line in found), found


def test_the_clock_is_not_compared(whole: Path, tmp_path: Path):
    changed = tmp_path / "changed"
    shutil.copytree(whole, changed)
    edit = edit_json(lambda found: found["log_history"][0].update({"pairs_per_second": 1, "eval_runtime": 2}))
    edit(changed / CHECKPOINT / "trainer_state.json")
    assert differences(changed, whole) == []


@pytest.mark.parametrize(
    ("found", "expected", "said"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0]), "differs in 0 of 1"),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), "torch.float64"),
        (torch.zeros(2), torch.zeros(1, 2), r"(1, 2)"),
        (0.0, -0.0, "is 0.0, not -0.0"),
        (1, 1.0, "is int, not float"),
        (True, 1, "is bool, not int"),
        (np.array([1], dtype=np.uint32), np.array([2], dtype=np.uint32), "[0] is 1, not 2"),
        ({"a": 1, "b": 2}, {"a": 1}, "['b'] is not expected"),
        ({"a": [1, (2,)]}, {"a": [1, (3,)]}, "['a'][1][0] is 2, not 3"),
        ([1], [1, 2], "has 1 items, not 2"),
    ],
)
def test_values_are_compared_by_their_bits(found: Any, expected: Any, said: str):
    lines = list(unequal(found, expected))
    assert len(lines) == 1
    assert said in lines[0]
    assert list(unequal(expected, expected)) == []


def test_equal_nans_are_equal():
    assert list(unequal([float("nan"), torch.tensor(float("nan"))], [float("nan"), torch.tensor(float("nan"))])) == []
