"""The traps work: each hostile file does its harm to a reader that is careless."""

from __future__ import annotations

import io
import pickle

import pytest
import torch

from tests.hostile.harness import MARKER, bare_pickle, hostile_archive, torch_archive


@pytest.mark.parametrize("content", [hostile_archive(), torch_archive(bare_pickle())], ids=["saved", "made"])
def test_a_careless_reader_runs_it(content):
    torch.load(io.BytesIO(content), weights_only=False)
    assert MARKER.is_dir()
    MARKER.rmdir()


def test_a_bare_pickle_runs():
    pickle.loads(bare_pickle())
    assert MARKER.is_dir()
    MARKER.rmdir()
