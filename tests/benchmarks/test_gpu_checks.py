"""The GPU script is known to run before a GPU is there, and its equality check is known to fail."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alignkit.data.layout import Layout, Pairs, prefix_shared
from tests.benchmarks.gpu import check_dpo, equalities
from tests.benchmarks.gpu.equalities import Case
from tests.benchmarks.gpu.script import NO_CUDA
from tests.benchmarks.gpu.shapes import hh_lengths, token_rows

CPU = torch.device("cpu")
CASE = Case("llama", "llama", torch.float32, "sdpa")  # on a CPU it runs as products


def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_dpo.main([]) == NO_CUDA != 0
    printed = capsys.readouterr().out
    assert printed.startswith("No CUDA device here")
    assert printed.count("\n") == 1


def test_an_equality_holds_on_the_cpu() -> None:
    outcome = equalities._check(CASE, CPU)
    assert outcome.passed
    assert outcome.kernels == "products"
    assert outcome.logps_error < 1e-5


def test_wrong_positions_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_restart(pairs: Pairs, pad: int) -> Layout:
        layout = prefix_shared(pairs, pad)
        return dataclasses.replace(layout, position_ids=torch.arange(layout.tokens)[None])

    monkeypatch.setitem(equalities.LAYOUTS, "prefix_shared", without_restart)
    outcome = equalities._check(CASE, CPU)
    assert not outcome.passed
    assert outcome.logps_error > 10 * outcome.logps_allowed
    assert outcome.gradient_error > 10 * outcome.gradient_allowed


def test_a_gradient_that_is_missing_is_reported() -> None:
    one = equalities.Scored(torch.zeros(1), {"a": torch.ones(2)}, set())
    assert equalities._gradient_error(one._replace(gradients={}), one) == float("inf")
    assert equalities._gradient_error(one._replace(gradients={"a": torch.tensor([1.0, 1.5])}), one) == pytest.approx(
        0.5 / 2**0.5
    )


def test_the_mix_of_lengths_is_the_same_every_time() -> None:
    lengths = hh_lengths(64)
    assert lengths == hh_lengths(64)
    assert min(map(min, lengths)) >= 2
    assert len({prompt for prompt, _, _ in lengths}) > 32
    rows = token_rows(lengths[:2], vocabulary=9)
    assert [tuple(map(len, row.values())) for row in rows] == lengths[:2]


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the other side of the measurements")
    done = subprocess.run(
        [sys.executable, check_dpo.__file__, "--cpu-dry-run", "--caps", "8", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "check_dpo.json").read_text(encoding="utf-8"))
    assert all(outcome["passed"] for outcome in report["equalities"])
    assert [timing["name"] for timing in report["kernels"] if "note" in timing] == []
    assert all(each["fits"] for each in report["memory"])
    norms: dict[str, set[float]] = {}
    for each in report["memory"]:
        norms.setdefault(each["data"], set()).add(each["first_grad_norm"])
    for of_data in norms.values():  # both sides, every batch size and both ways of checkpointing did the same work
        assert max(of_data) < 1.05 * min(of_data)
