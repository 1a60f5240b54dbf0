"""How a run is going, on the screen: loss, accuracy, margin, speed and time left."""

from __future__ import annotations

import atexit
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length

from alignkit.trainers.config_engine import EngineConfig

# Entries of a log and how they are shown, in this order; those that a log does not have are left out.
_SHOWN = {
    "loss": "loss {:.4f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "rewards/margins": "margin {:.3f}",
    "accuracy": "accuracy {:.3f}",
    "margin": "margin {:.3f}",
    "pairs_per_second": "{:.3g} pairs/s",
}


class ProgressDisplay(TrainerCallback):
    """Show a run's progress: one live line on a terminal, elsewhere (or with `disable_tqdm`) one line for each log.

    Only the main process shows anything. Evaluations get a line of their own.

    Args:
        console: where to write; by default standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._live: Progress | None = None
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._started = (0.0, 0)  # seconds, and the step that the run or its resumption began with

    def on_train_begin(self, args: EngineConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._started = (time.perf_counter(), state.global_step)
        if state.is_world_process_zero and self.console.is_terminal and not args.disable_tqdm:
            self._open()
            assert self._live is not None
            self._training = self._live.add_task(
                "training", total=state.max_steps, completed=state.global_step, metrics=""
            )

    def on_step_end(self, args: EngineConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._live is not None and self._training is not None:
            left = f"training, {self._left(state)} left"
            self._live.update(self._training, completed=state.global_step, description=left)

    def on_log(
        self,
        args: EngineConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        evaluated = next((key for key in logs if key.endswith("_loss") and key != "train_loss"), None)
        if evaluated is not None:
            name = evaluated.removesuffix("_loss")
            shown = _shown({key.removeprefix(f"{name}_"): value for key, value in logs.items()})
            self._line(f"step {state.global_step}/{state.max_steps} | {name} | {' | '.join(shown)}")
        elif "train_loss" in logs:
            seconds = _clock(logs["train_runtime"])
            self._line(f"trained {state.global_step} steps in {seconds}, mean loss {logs['train_loss']:.4f}")
        elif self._live is not None and self._training is not None:
            self._live.update(self._training, metrics=" | ".join(_shown(logs)))
        else:
            parts = [f"step {state.global_step}/{state.max_steps}", *_shown(logs), f"{self._left(state)} left"]
            self._line(" | ".join(parts))

    def on_prediction_step(
        self,
        args: EngineConfig,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not self.console.is_terminal or args.disable_tqdm:
            return
        if self._live is None:
            self._open()
        assert self._live is not None
        if self._evaluation is None:
            total = len(eval_dataloader) if has_length(eval_dataloader) else None
            self._evaluation = self._live.add_task("evaluating", total=total, metrics="")
        self._live.advance(self._evaluation)

    def on_evaluate(self, args: EngineConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._end_evaluation()

    def on_predict(
        self, args: EngineConfig, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        self._end_evaluation()

    def on_train_end(self, args: EngineConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._close()

    def _open(self) -> None:
        self._close()  # a run that ended in an error left its line open
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
        )
        self._live = Progress(*columns, console=self.console)
        self._live.start()
        atexit.register(self._close)  # or an error would leave the terminal without its cursor

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            atexit.unregister(self._close)
        self._live = self._training = self._evaluation = None

    def _end_evaluation(self) -> None:
        if self._live is None or self._evaluation is None:
            return
        self._live.remove_task(self._evaluation)
        self._evaluation = None
        if self._training is None:
            self._close()

    def _left(self, state: TrainerState) -> str:
        began, first_step = self._started
        steps = state.global_step - first_step
        if steps <= 0:
            return "?"
        return _clock((time.perf_counter() - began) / steps * max(state.max_steps - state.global_step, 0))

    def _line(self, text: str) -> None:
        # Markup and wrapping are for terminals; a log file wants the line as it is.
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def use_progress_display(trainer: Trainer) -> None:
    """Put `ProgressDisplay` in the place of Trainer's own progress bar or printer; a notebook's display stays."""
    removed = [trainer.pop_callback(kind) for kind in (ProgressCallback, PrinterCallback)]
    if any(callback is not None for callback in removed):
        trainer.add_callback(ProgressDisplay())


def _shown(logs: Mapping[str, float]) -> list[str]:
    return [form.format(logs[name]) for name, form in _SHOWN.items() if name in logs]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
