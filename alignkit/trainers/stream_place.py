"""Where a run stands in a stream, which has no length to tell it by."""

from __future__ import annotations

from typing import Any


class StreamPlace:
    """The pass over the stream that a run is in, and the optimizer step at which it began.

    Trainer derives both from the dataset's length. Without one it takes all steps for a single pass, and a resume from
    a later pass would skip to another place.
    """

    def __init__(self) -> None:
        self.number, self.first_step = 0, 0
        self._earlier = 0  # passes that were made before this call of `train`

    def state_dict(self) -> dict[str, Any]:
        """Return both."""
        return {"number": self.number, "first_step": self.first_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set both."""
        self.number, self.first_step = state_dict["number"], state_dict["first_step"]

    def enter(self, epoch: dict[str, Any], step: int, accumulation: int, *, is_known: bool) -> dict[str, Any]:
        """Correct what Trainer tells `_run_epoch`, at the beginning of a pass or in the middle of a resumed one.

        Args:
            epoch: its arguments by name.
            step: optimizer steps that were made.
            accumulation: micro-batches of a step.
            is_known: whether a checkpoint said where it was made.
        """
        if epoch["epoch"] > epoch["epochs_trained"]:
            self.number, self.first_step = epoch["epoch"] + self._earlier, step
            return {**epoch, "epoch": self.number, "epochs_trained": self._earlier}
        if not is_known:
            self.number, self.first_step, self._earlier = epoch["epoch"], 0, 0
            return epoch
        self._earlier = self.number
        passed = (step - self.first_step) * accumulation
        return {
            **epoch,
            "epoch": self.number,
            "epochs_trained": self.number,
            "steps_trained_in_current_epoch": passed,
        }
