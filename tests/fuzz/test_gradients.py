"""One batch, accumulation and token-bounded pieces are one gradient, for rows, losses and bounds as they come."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.fuzz.harness import effort, try_all
from tests.invariants.test_equalities import COUPLED, SEPARABLE, logged, rows_for, steps
from tests.tiny_preferences import assert_close_tensors

LOSSES = SEPARABLE | COUPLED
RTOL = 3e-5  # two rows of opposite signs leave little of what was rounded


@effort(4, 40)
def test_a_step_in_any_pieces_is_one_step(examples: int, tally: Counter[str], tmp_path: Path) -> None:
    def check(loss: str, per_device: int, accumulation: int, bound: int | None, layout: str, seed: int) -> None:
        options = LOSSES[loss]
        rows = rows_for(options, count=per_device * accumulation)
        random.Random(seed).shuffle(rows)
        if loss in COUPLED:  # in several micro-batches these are another loss
            per_device, accumulation = per_device * accumulation, 1
        with tempfile.TemporaryDirectory(dir=tmp_path) as name:
            whole = steps(Path(name), {**options, "layout": "padded"}, rows=rows)
            pieces: dict[str, Any] = {
                "per_device_train_batch_size": per_device,
                "gradient_accumulation_steps": accumulation,
                "max_tokens_per_forward": bound,
                "layout": layout,
            }
            found = steps(Path(name), {**options, **pieces}, rows=rows)
        for gradients, wanted in zip(found[0], whole[0], strict=True):
            assert_close_tensors(gradients, wanted, rtol=RTOL)
        for entry, wanted in zip(logged(found[1]), logged(whole[1]), strict=True):
            assert entry == pytest.approx(wanted, rel=RTOL, abs=1e-6)
        tally[loss] += 1

    try_all(
        check,
        examples,
        tally,
        loss=st.sampled_from(sorted(LOSSES)),
        per_device=st.integers(2, 4),
        accumulation=st.integers(1, 3),
        bound=st.sampled_from([None, 1, 20, 35, 60, 90]),
        layout=st.sampled_from(["prefix_shared", "packed", "padded"]),
        seed=st.integers(0, 99),
    )
