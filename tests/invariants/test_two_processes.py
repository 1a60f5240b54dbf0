"""Two processes, with the weights copied or sharded, give what one process gives on the same global batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.invariants import sharded_run, two_process_run
from tests.invariants.two_process_run import SCENARIOS, SHARDED
from tests.tiny_preferences import assert_close_tensors
from tests.two_processes import launch_copied, launch_sharded

pytestmark = pytest.mark.slow  # three Python processes import torch and transformers

RTOL = 1e-5


class Results(NamedTuple):
    """What every scenario left: with one process, with two."""

    one: dict[str, Any]
    two: dict[str, Any]


def results_in(folder: Path, scenarios: dict[str, dict[str, Any]]) -> Results:
    """Run the scenarios in this process too, where two others have run them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        two_process_run.main(folder, scenarios, processes=1)
    return Results(torch.load(folder / "1.pt"), torch.load(folder / "2.pt"))


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """DDP over gloo."""
    folder = tmp_path_factory.mktemp("copied")
    launch_copied(two_process_run, str(folder), cache=folder)
    return results_in(folder, SCENARIOS)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """FSDP2 over gloo."""
    folder = tmp_path_factory.mktemp("sharded")
    launch_sharded(sharded_run, str(folder), cache=folder)
    return results_in(folder, SHARDED)


def check(results: Results, name: str, *, is_sharded: bool) -> None:
    one, two = (result[name] for result in results)
    assert (one["is_sharded"], two["is_sharded"]) == (False, is_sharded)
    assert len(one["gradients"]) == len(two["gradients"]) == 2
    for found, expected in zip(two["gradients"], one["gradients"], strict=True):
        assert_close_tensors(found, expected, rtol=RTOL)
    assert_close_tensors(two["weights"], one["weights"], rtol=RTOL)
    evaluations = 3 if name.startswith("best") else 1
    assert len(one["logs"]) == len(two["logs"]) == 2 + evaluations
    assert one["best_step"] == two["best_step"] == (1 if name.startswith("best") else None)
    for found, expected in zip(two["logs"], one["logs"], strict=True):
        assert len(expected) >= 5
        assert found == pytest.approx(expected, rel=RTOL, abs=1e-6)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_equal_one(name: str, copied: Results) -> None:
    check(copied, name, is_sharded=False)


@pytest.mark.parametrize("name", SHARDED)
def test_two_processes_with_sharded_weights_equal_one(name: str, sharded: Results) -> None:
    check(sharded, name, is_sharded=True)
