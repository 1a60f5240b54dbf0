"""The run record that every trainer keeps: filled when the trainer is made and when training ends."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit import __version__
from alignkit.data.report import PreparationReport
from alignkit.errors import DataError
from alignkit.hub.card import write_card
from alignkit.hub.identity import (
    describe_adapter,
    describe_base,
    describe_command,
    describe_data,
    describe_settings,
    hardware,
    versions,
)
from alignkit.hub.record import RunRecord, now
from alignkit.trainers.data_checks import named_datasets
from alignkit.trainers.metrics import peak_memory_bytes

logger = logging.getLogger(__name__)

_TRAINED_AGAIN = "It was trained more than once by the same trainer: steps, time and curves are those of the last time."
_SPEEDS = ("pairs_per_second", "tokens_per_second", "completions/tokens_per_second")


def begin_record(
    trainer: Trainer,
    method: str,
    train: Any,
    evaluation: Any,
    reports: Mapping[str, PreparationReport],
    rewards: Sequence[str] = (),
) -> RunRecord:
    """Return the record of a run that is about to start, and let the trainer fill it in when training ends.

    Args:
        trainer: set up, with its datasets prepared.
        method: "dpo", "kto", "reward" or "ppo".
        train, evaluation: the datasets as the trainer was handed them.
        reports: of their preparation, by name.
        rewards: names of what rewards completions.
    """
    args: Any = trainer.args
    settings, changed = describe_settings(args)
    given = named_datasets(train, evaluation)
    prepared = named_datasets(trainer.train_dataset, trainer.eval_dataset)
    model: Any = trainer.model
    tokenizer: Any = trainer.processing_class
    base = describe_base(model, (args.model_init_kwargs or {}).get("revision"))
    record = RunRecord(
        method=method,
        alignkit=__version__,
        created=now(),
        command=describe_command(),
        base={**base, "is_chat": tokenizer.chat_template is not None},
        adapter=describe_adapter(model),
        data=[describe_data(name, given[name], rows, reports.get(name)) for name, rows in prepared.items()],
        reward=list(rewards),
        settings=settings,
        changed=changed,
        versions=versions(),
        hardware=hardware(args.device, args.world_size),
        seeds={"seed": args.seed, "data_seed": args.seed if args.data_seed is None else args.data_seed},
    )
    described: Any = trainer  # one of ours
    model.add_model_tags(list(described._tag_names))
    trainer.add_callback(FinishRecord(record))
    return record


class FinishRecord(TrainerCallback):
    """Complete the record when training ends, and write it into the output directory."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the step that a resumed run goes on from; what was measured of an earlier training holds no longer."""
        self.first_step = state.global_step
        if self.record.finished is not None:
            self.record.finished = None
            self.record.evaluations, self.record.samples = [], []
            if _TRAINED_AGAIN not in self.record.notes:
                self.record.notes.append(_TRAINED_AGAIN)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self.record.log = [dict(entry) for entry in state.log_history]
        self.record.usage = describe_usage(state, args, self.first_step)
        self.record.finished = now()
        if state.is_world_process_zero:
            try:
                self.record.save(str(args.output_dir))
            except OSError as error:  # what was trained is worth more than its description
                logger.warning(
                    "The run's record could not be written (%s). Make room; a resume of the finished run writes it.",
                    error,
                )


def describe_usage(state: TrainerState, args: TrainingArguments, first_step: int = 0) -> dict[str, Any]:
    """Steps, epochs, seconds of training, peak memory in bytes, and the median of each speed over the log.

    Of a run that was resumed after `first_step`, seconds and memory are those since then, which it says.
    """
    log = state.log_history
    seconds = [entry["train_runtime"] for entry in log if "train_runtime" in entry]
    speeds = {name: [entry[name] for entry in log if name in entry] for name in _SPEEDS}
    return {
        "steps": state.global_step,
        "resumed_from_step": first_step or None,
        "epochs": state.epoch,
        "training_seconds": seconds[-1] if seconds else None,
        "peak_memory_bytes": peak_memory_bytes(args.device),
        **{name: statistics.median(values) for name, values in speeds.items() if values},
    }


def save_description(trainer: Any, folder: str | Path) -> None:
    """Write the run's record and card into a folder that a model was saved in.

    Args:
        trainer: a trainer with a `record`.
        folder: where its model lies.
    """
    record: RunRecord = trainer.record
    record.log = [dict(entry) for entry in trainer.state.log_history]
    record.save(folder)
    try:
        write_card(folder, record)
    except DataError as error:  # a person's own card that cannot be read: it stays, and so does the model
        logger.warning("No model card was written: %s", error)
