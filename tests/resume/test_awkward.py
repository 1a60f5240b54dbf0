"""Options and moments that a resume, or the end of a run, could stumble over."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from alignkit.checkpoint.find import checkpoint_folders, newest_verified
from alignkit.checkpoint.manifest import read_manifest
from alignkit.errors import CheckpointError, ConfigError
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from alignkit.trainers.signals import EXIT_RESUMABLE
from tests.model_factory import tiny_model
from tests.resume.cases import BEST, EVALUATED, OPTIONS, ROWS, Case, preference_run
from tests.resume.every_step import end_of, every_step, resume_at, run_whole
from tests.tiny_preferences import character_tokenizer, lora, randomise_adapter, text_rows


def streamed_run(folder: Path, **options: Any) -> Trainer:
    """Two times through a stream of three steps that is shuffled anew each time."""
    rows = Dataset.from_list(text_rows(ROWS)).to_iterable_dataset().shuffle(seed=3, buffer_size=3)
    trainer = DPOTrainer(
        tiny_model("llama"),
        args=DPOConfig(str(folder), **{**OPTIONS, "max_steps": 6, **options}),
        train_dataset=rows,
        processing_class=character_tokenizer(),
        peft_config=lora(target_modules=["q_proj", "down_proj"]),
    )
    randomise_adapter(trainer.model)
    return trainer


def run(folder: Path, **options: Any) -> Any:
    """Six steps over two epochs, unless told otherwise."""
    return preference_run(folder, **{"per_device_train_batch_size": 2, **options})


@pytest.mark.parametrize("name", ["", " "])
def test_a_name_that_is_empty_is_no_new_start(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="resume_from_checkpoint names no checkpoint"):
        run(tmp_path).train(resume_from_checkpoint=name)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stream_that_began_anew(accumulation: int, tmp_path: Path) -> None:
    steps, found = every_step(Case(streamed_run), tmp_path, accumulation, 0)
    assert found == []
    assert steps == 6


def test_the_evaluation_at_the_start_is_not_made_again(tmp_path: Path) -> None:
    case = Case(preference_run, {**EVALUATED, "eval_on_start": True, "max_steps": 3})
    whole = run_whole(case, tmp_path, 1, 0)
    assert whole.end["log"][0]["step"] == 0
    assert resume_at(case, whole, 2, tmp_path / "again", 1, 0) == []


def test_an_order_that_cannot_be_drawn_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use_seedable_sampler"):
        run(tmp_path, accelerator_config={"use_seedable_sampler": False})


def test_a_resumed_run_saves_as_often_as_it_is_told_now(tmp_path: Path) -> None:
    run(tmp_path, save_steps=3, max_steps=3, lr_scheduler_type="constant", warmup_steps=0).train()
    longer = run(tmp_path, save_steps=1, max_steps=5, lr_scheduler_type="constant", warmup_steps=0)
    longer.train(resume_from_checkpoint=True)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]


class SignalAt(TrainerCallback):
    """Sends a signal to this process, once, at an event of a step."""

    def __init__(self, event: str, step: int) -> None:
        self.event, self.step, self.is_sent = event, step, False

    def send(self, state: Any) -> None:
        """Send it, if this is the step."""
        if state.global_step == self.step and not self.is_sent:
            self.is_sent = True
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before a step."""
        if self.event == "step":
            self.send(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the very end."""
        if self.event == "end":
            self.send(state)


def test_a_trainer_that_goes_on_after_a_signal_keeps_what_it_is_told_to_keep(tmp_path: Path) -> None:
    trainer = run(tmp_path, callbacks=lambda: [SignalAt("step", 2)], save_steps=3, logging_steps=3)
    with pytest.raises(SystemExit, match=str(EXIT_RESUMABLE)):
        trainer.train()
    trainer.train(resume_from_checkpoint="auto")
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-3", "checkpoint-6"]


def test_what_a_signal_saved_of_an_earlier_run_stays(tmp_path: Path) -> None:
    """Started anew by mistake, a run does not take the only checkpoint of the one before for its own."""
    stopped = run(tmp_path, callbacks=lambda: [SignalAt("step", 3)], save_steps=100)
    with pytest.raises(SystemExit, match=str(EXIT_RESUMABLE)):
        stopped.train()
    run(tmp_path, max_steps=2).train()
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_signal_after_the_best_model_came_back_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """Its weights are those of the last step, not of the best one."""
    worse = {**BEST, "greater_is_better": True, "callbacks": list}  # the first one is the best
    whole = run(tmp_path / "whole", **worse)
    whole.train()
    stopped = run(tmp_path / "run", **{**worse, "callbacks": lambda: [SignalAt("end", 6)]})
    with pytest.raises(SystemExit, match=str(EXIT_RESUMABLE)):
        stopped.train()
    assert whole.state.best_global_step != 6
    weights = [load_file(tmp_path / run / "checkpoint-6" / "adapter_model.safetensors") for run in ("whole", "run")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert read_manifest(tmp_path / "run" / "checkpoint-6").run["is_scheduled"]


def test_a_signal_during_a_save_makes_no_evaluation_count_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plateau = {**EVALUATED, "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 2}}
    plateau |= {"metric_for_best_model": "loss", "greater_is_better": True}  # every evaluation is a bad one
    whole = run(tmp_path / "whole", **plateau)
    whole.train()
    stopped = run(tmp_path / "run", **plateau)
    fill = stopped._fill

    def fill_and_send(staged: Path, target: Path, rest: Any) -> None:
        fill(staged, target, rest)
        if target.name == "checkpoint-2":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(stopped, "_fill", fill_and_send)
    with pytest.raises(SystemExit, match=str(EXIT_RESUMABLE)):
        stopped.train()
    again = run(tmp_path / "run", **plateau)
    again.train(resume_from_checkpoint=True)
    assert end_of(again)["scheduler"] == end_of(whole)["scheduler"]


def test_with_a_limit_of_one_the_newest_checkpoint_stays_beside_the_best(tmp_path: Path) -> None:
    other = tmp_path / "run" / "checkpoint-99"
    other.mkdir(parents=True)
    (other / "mine.txt").write_text("kept", encoding="utf-8")
    trainer = run(tmp_path / "run", **{**BEST, "greater_is_better": True, "save_total_limit": 1})
    trainer.train()
    assert trainer.args.save_total_limit == 1
    assert trainer.state.best_global_step != 6
    found = newest_verified(tmp_path / "run").folder
    assert found is not None
    assert found.name == "checkpoint-6"
    assert (other / "mine.txt").read_text(encoding="utf-8") == "kept"


def test_weights_alone_with_a_schedule_that_follows_evaluations(tmp_path: Path) -> None:
    plateau = {**EVALUATED, "lr_scheduler_type": "reduce_lr_on_plateau", "max_steps": 3}
    run(tmp_path, **plateau).train()
    again = run(tmp_path, **{**plateau, "max_steps": 4, "weights_only_resume": True})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_what_a_notebook_puts_into_a_checkpoint_is_let_be(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2).train()
    kept = tmp_path / "checkpoint-2" / ".ipynb_checkpoints"
    kept.mkdir()
    (kept / "trainer_state-checkpoint.json").write_text("{}", encoding="utf-8")
    found = newest_verified(tmp_path)
    assert found.folder == tmp_path / "checkpoint-2"
    assert found.skipped == ()


def test_tokens_are_counted_in_the_log(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_steps=2, logging_steps=1, include_num_input_tokens_seen="all")
    trainer.train()
    assert trainer.state.num_input_tokens_seen > 0
