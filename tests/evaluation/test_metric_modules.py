"""Metric modules load through `evaluate`, offline, and say what our functions say."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from alignkit.errors import ConfigError
from alignkit.evaluation.calibration import calibrate
from alignkit.evaluation.estimates import accuracy_interval
from alignkit.evaluation.length_control import length_controlled_win_rate
from alignkit.evaluation.metrics import load, names, path_of

CHOSEN, REJECTED = [1.0, 2.0, 0.5, 0.0], [0.0, 2.5, 0.5, -1.0]
PREFERENCES, LENGTHS = [1.0, 0.0, 0.5, 1.0], [10.0, -3.0, 4.0, 2.0]

# Loads by path in a process that may open no connection; the environment is that of a machine without network.
OFFLINE = """
import socket, sys
class NoNetwork(socket.socket):
    def connect(self, address):
        raise AssertionError(f"connected to {address}")
    connect_ex = connect
socket.socket = NoNetwork
def refuse(*args, **kwargs):
    raise AssertionError(f"looked up {args}")
socket.getaddrinfo = socket.create_connection = refuse
import evaluate
metric = evaluate.load(sys.argv[1])
print(metric.compute(predictions=["a b a"])["distinct_1"])
"""


@pytest.fixture
def cache(tmp_path: Path) -> str:
    pytest.importorskip("evaluate", reason="the extra `eval` is not installed")
    return str(tmp_path / "cache")


def test_they_are_all_there() -> None:
    assert names() == ["calibration", "distinct_n", "preference_accuracy", "win_rate"]
    with pytest.raises(ConfigError, match="Did you mean 'win_rate'"):
        path_of("win_rates")


def test_preference_accuracy(cache: str) -> None:
    found = load("preference_accuracy", cache_dir=cache).compute(predictions=CHOSEN, references=REJECTED)
    expected = accuracy_interval(2.5, 4)
    assert (found["accuracy"], found["accuracy_low"], found["accuracy_high"]) == pytest.approx(expected)
    assert found["margin"] == pytest.approx(1.5 / 4)
    assert found["ties"] == 1


def test_win_rate(cache: str) -> None:
    found = load("win_rate", cache_dir=cache).compute(predictions=PREFERENCES, references=LENGTHS)
    expected = length_controlled_win_rate(PREFERENCES, LENGTHS)
    assert found["win_rate"] == pytest.approx(0.625)
    assert found["length_controlled_win_rate"] == pytest.approx(expected.win_rate.value)
    assert found["length_controlled_win_rate_low"] == pytest.approx(expected.win_rate.low)
    assert found["length_effect"] == pytest.approx(expected.length)


def test_calibration_and_distinct(cache: str) -> None:
    found = load("calibration", cache_dir=cache).compute(predictions=CHOSEN, references=REJECTED)
    expected = calibrate([1.0, -0.5, 0.0, 1.0])
    assert found["calibration_error"] == pytest.approx(expected.error)
    assert [part["rows"] for part in found["bins"]] == [part.rows for part in expected.bins]
    distinct = load("distinct_n", cache_dir=cache).compute(predictions=["a b a b", "a c"], n=3)
    assert distinct == pytest.approx({"distinct_1": 0.5, "distinct_2": 0.75, "distinct_3": 1.0})


@pytest.mark.slow
def test_a_metric_loads_where_nothing_can_be_reached(cache: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, path_of("distinct_n")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(2 / 3)
    assert socket.socket.__name__ == "socket"  # in this process nothing was changed
