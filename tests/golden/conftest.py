"""Fixtures of the comparisons with TRL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def quiet_datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No progress bars, and none of these rows in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
        from datasets import disable_progress_bars

        disable_progress_bars()
        yield


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for trainers that live as long as their test module."""
    return tmp_path_factory.mktemp("golden")
