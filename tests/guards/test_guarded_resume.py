"""What guards have counted and learned is in every checkpoint, and messages name the one to go on from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import TrainingError
from tests.guards.guarded_runs import FakeMemory, Watch, equal, make_trainer, poison_gradient, rows, training_log

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 3, "max_steps": 6}


def run(kind: str, folder: Path, bad: tuple[int, ...], resume: str | None = None, **options: Any) -> tuple[Any, Watch]:
    watch = Watch()
    data = {} if kind == "ppo" else {"train_dataset": rows(24)}
    trainer = make_trainer(kind, folder, [watch], **{**SAVING, **data, **options})
    poison_gradient(trainer, lambda: watch.step in bad, math.nan)
    trainer.train(resume)
    return trainer, watch


@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_a_resumed_run_goes_on_counting(kind: str, tmp_path: Path) -> None:
    """Bit for bit the run that was not stopped: weights, the mean of the open window, the count."""
    whole, watch = run(kind, tmp_path, (2, 4))
    assert [each.step for each in whole.guard.skipped] == [2, 4]
    for step in (2, 3):  # within a window that has a step left out
        again, later = run(kind, tmp_path / f"again {step}", (4,), str(tmp_path / f"checkpoint-{step}"))
        assert [each.step for each in again.guard.skipped] == [2, 4]
        assert equal({step: each for step, each in watch.after.items() if step in later.after}, later.after)
        for entry, wanted in zip(training_log(again), training_log(whole), strict=True):
            assert (entry["loss"], entry.get("skipped_steps")) == (wanted["loss"], wanted.get("skipped_steps"))
    with pytest.raises(TrainingError, match=r"2 bad steps, more than max_skipped_steps=1 allows\. step 2: .*; step 4"):
        run(kind, tmp_path / "strict", (4,), str(tmp_path / "checkpoint-3"), max_skipped_steps=1)


def test_the_message_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        run("dpo", tmp_path, (3,), max_skipped_steps=0)
    checkpoint = tmp_path / "checkpoint-2"
    assert str(caught.value).endswith(
        f"The last good checkpoint is {checkpoint}: resume_from_checkpoint='{checkpoint}'."
    )
    run("dpo", tmp_path, (), str(checkpoint), max_skipped_steps=0)


def test_a_resumed_run_knows_the_smaller_budget(tmp_path: Path, caplog: Any) -> None:
    def made(folder: Path, limit: int | None) -> tuple[Any, Any]:
        trainer = make_trainer("dpo", folder, save_strategy="steps", save_steps=2, max_steps=4)
        fake = None if limit is None else FakeMemory(trainer.bundle.base, limit, lambda kwargs: trainer.model.training)
        return trainer, fake

    first, fake = made(tmp_path, 45)
    first.train()
    assert fake.failures
    first_budget = first._passes.max_tokens
    caplog.clear()
    second, fake = made(tmp_path / "again", 45)
    second.train(str(tmp_path / "checkpoint-2"))
    assert not fake.failures
    assert second._passes.max_tokens == first_budget
    assert "out of memory" not in caplog.text
    assert equal(dict(second.model.named_parameters()), dict(first.model.named_parameters()))
