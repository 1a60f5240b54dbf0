"""The progress display: which lines, where, and what it takes the place of."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from alignkit.trainers.progress import ProgressDisplay, use_progress_display
from tests.model_factory import tiny_model
from tests.models.conftest import character_tokenizer

LOGS = {"loss": 0.65432, "rewards/accuracies": 0.625, "rewards/margins": 0.1234, "pairs_per_second": 2.345, "lr": 1.0}


def display(*, terminal: bool) -> ProgressDisplay:
    return ProgressDisplay(Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None))


def output(shown: ProgressDisplay) -> str:
    return shown.console.file.getvalue()  # type: ignore[attr-defined]


def run(shown: ProgressDisplay, folder: Path, *, main: bool = True, **options: Any) -> str:
    args, control = DPOConfig(str(folder), report_to=[], **options), TrainerControl()
    state = TrainerState(max_steps=40, is_world_process_zero=main)
    shown.on_train_begin(args, state, control)
    state.global_step = 10
    shown.on_step_end(args, state, control)
    shown.on_log(args, state, control, logs=dict(LOGS))
    shown.on_prediction_step(args, state, control, eval_dataloader=[1, 2])
    shown.on_evaluate(args, state, control)
    shown.on_log(args, state, control, logs={"eval_loss": 0.5, "eval_rewards/accuracies": 0.75, "eval_runtime": 3.0})
    shown.on_log(args, state, control, logs={"train_runtime": 65.2, "train_loss": 0.6})
    shown.on_train_end(args, state, control)
    return output(shown)


def test_without_a_terminal_every_log_is_one_plain_line(tmp_path: Path) -> None:
    first, second, third = run(display(terminal=False), tmp_path).splitlines()
    assert re.fullmatch(
        r"step 10/40 \| loss 0\.6543 \| accuracy 0\.625 \| margin 0\.123 \| 2\.35 pairs/s \| \d+:\d\d left", first
    )
    assert second == "step 10/40 | eval | loss 0.5000 | accuracy 0.750"
    assert third == "trained 10 steps in 1:05, mean loss 0.6000"


def test_a_terminal_has_one_live_line_and_lasting_ones_for_evaluations(tmp_path: Path) -> None:
    text = run(display(terminal=True), tmp_path)
    assert "\x1b[" in text  # it was redrawn
    for part in ("training, ", " left", "10/40", "loss 0.6543 | accuracy 0.625 | margin 0.123 | 2.35 pairs/s"):
        assert part in text
    assert "evaluating" in text
    assert "step 10/40 | eval | loss 0.5000" in text
    assert text.endswith("\x1b[?25h") or "\x1b[?25h" in text.splitlines()[-1]  # the cursor is back


def test_disable_tqdm_means_plain_lines_on_a_terminal_too(tmp_path: Path) -> None:
    text = run(display(terminal=True), tmp_path, disable_tqdm=True)
    assert "\x1b" not in text
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize("terminal", [True, False])
def test_other_processes_are_silent(tmp_path: Path, terminal: bool) -> None:
    assert run(display(terminal=terminal), tmp_path, main=False) == ""


def test_time_left_counts_the_steps_of_this_run_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 160.0])
    monkeypatch.setattr("alignkit.trainers.progress.time.perf_counter", lambda: next(clock))
    shown, args, control = display(terminal=False), DPOConfig(str(tmp_path), report_to=[]), TrainerControl()
    state = TrainerState(max_steps=100, is_world_process_zero=True, global_step=70)  # resumed
    shown.on_train_begin(args, state, control)
    state.global_step = 80
    shown.on_log(args, state, control, logs={"loss": 0.5})
    assert output(shown) == "step 80/100 | loss 0.5000 | 2:00 left\n"  # 6 s a step, 20 steps


def trainer(folder: Path, callbacks: list[TrainerCallback] | None = None, **options: Any) -> DPOTrainer:
    rows = [{"prompt_ids": [40, 41], "chosen_ids": [50 + i], "rejected_ids": [60 + i, 70]} for i in range(4)]
    return DPOTrainer(
        tiny_model("llama"),
        args=DPOConfig(
            str(folder),
            learning_rate=1e-3,
            bf16=False,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            **options,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=character_tokenizer(eos_token="</s>", pad_token="<pad>"),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )


def kinds(made: DPOTrainer) -> list[type]:
    return [type(callback) for callback in made.callback_handler.callbacks]


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_trainers_own_display_is_replaced(tmp_path: Path, disable_tqdm: bool) -> None:
    made = trainer(tmp_path, disable_tqdm=disable_tqdm)
    assert kinds(made).count(ProgressDisplay) == 1
    assert not {ProgressCallback, PrinterCallback} & set(kinds(made))


def test_another_display_such_as_a_notebooks_stays(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.remove_callback(ProgressDisplay)
    use_progress_display(made)  # nothing of Trainer's to replace
    assert ProgressDisplay not in kinds(made)


def test_a_real_run_prints_a_line_for_each_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(tmp_path)
    made.train()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("step", "trained"))]
    assert len(lines) == 3
    assert re.match(r"step 1/2 \| loss 0\.6931 \| accuracy 0\.000 \| margin 0\.000 \| ", lines[0])
    assert lines[2].startswith("trained 2 steps in ")
