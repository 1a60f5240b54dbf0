"""Two processes over gloo agree on what is a bad step: what one of them saw, none of them uses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.guards import two_process_guards
from tests.two_processes import launch_copied

pytestmark = pytest.mark.slow  # two Python processes import torch and transformers


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process saw."""
    folder = tmp_path_factory.mktemp("processes")
    launch_copied(two_process_guards, str(folder), cache=folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["dpo", "reward", "ppo"])
def test_a_bad_number_of_one_process_is_skipped_by_both(kind: str, found: list[dict[str, Any]]) -> None:
    first, second = (each[kind] for each in found)
    assert first == second
    ((step, named),) = first["skipped"]
    assert step == 2
    assert named == [11] if kind != "ppo" else len(named) == 4
    assert first["stays"]
    assert first["moves"]
    assert first["agrees"]
