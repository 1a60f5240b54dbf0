"""Two processes over gloo give what one process gives on the same prompts and seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.invariants import ppo_two_process_run
from tests.invariants.ppo_two_process_run import REWARD_MODEL, SCENARIOS
from tests.tiny_preferences import assert_close_tensors
from tests.two_processes import launch_copied

pytestmark = pytest.mark.slow  # three Python processes import torch and transformers

RTOL = 1e-4


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every scenario left: with one process, with two."""
    folder = tmp_path_factory.mktemp("processes")
    launch_copied(ppo_two_process_run, str(folder), cache=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        ppo_two_process_run.main(folder, processes=1)
    return torch.load(folder / "1.pt"), torch.load(folder / "2.pt")


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_equal_one(name: str, results: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = (result[name] for result in results)
    assert len(one["gradients"]) == len(two["gradients"]) >= 2
    for found, expected in zip(two["gradients"], one["gradients"], strict=True):
        assert_close_tensors(found, expected, rtol=RTOL)
    assert_close_tensors(two["weights"], one["weights"], rtol=RTOL)
    assert two["kl_coef"] == pytest.approx(one["kl_coef"], rel=RTOL)
    assert two["moments"] == pytest.approx(one["moments"], rel=RTOL)
    assert len(one["logs"]) == len(two["logs"]) == 5  # four steps and an evaluation
    for found, expected in zip(two["logs"], one["logs"], strict=True):
        assert len(expected) >= 2
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_reward_model_is_evaluated_alike(results: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = (result[REWARD_MODEL] for result in results)
    assert [evaluation["eval_accuracy"] for evaluation in one] != [1.0, 1.0]
    for found, expected in zip(two, one, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
