"""A run with data workers, alone in its process group, that stands still in a step and sends the group a signal.

`python -m tests.signals.group FOLDER SIGNAL`: what Ctrl-C in a terminal does, or a scheduler that ends a job.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.resume.cases import preference_run


class SignalGroup(TrainerCallback):
    """Sends the signal before the third step's save is finished, and leaves the workers time to hear it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights have moved by now, so that the signal waits."""
        if state.global_step == 3:
            os.killpg(os.getpgid(0), self.number)
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                time.sleep(0.01)


if __name__ == "__main__":
    number = signal.Signals[sys.argv[2]]
    preference_run(
        Path(sys.argv[1]),
        per_device_train_batch_size=1,
        dataloader_num_workers=2,
        dataloader_prefetch_factor=1,
        save_steps=100,
        callbacks=lambda: [SignalGroup(number)],
    ).train()
