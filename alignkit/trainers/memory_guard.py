"""Out of memory: the same passes again in smaller chunks, which leave every result what it would have been."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate.utils import DistributedType

from alignkit.data.layout import group_costs
from alignkit.errors import TrainingError
from alignkit.models.out_of_memory import is_out_of_memory, release_memory

if TYPE_CHECKING:
    from alignkit.trainers.passes import Passes

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def _nothing() -> None:
    pass


class MemoryGuard:
    """Lowers the tokens of a forward pass where memory runs out, and runs again what failed.

    A chunk's size changes no gradient, only how often it is added to, so nothing but time is lost. What was lowered
    stays so for the run; a checkpoint keeps it.

    Args:
        passes: whose `max_tokens` it is.
    """

    def __init__(self, passes: Passes) -> None:
        self._passes = passes

    def fit(self, run: Callable[[], Result], put_back: Callable[[], None] = _nothing) -> Result:
        """Return `run()`; where that takes too much memory, of smaller passes.

        Args:
            run: cuts its batch with `Passes.split` whenever it is called.
            put_back: undoes what a failed `run` has left.

        Raises:
            TrainingError: a single row does not fit, or processes would have to agree on the passes.
        """
        passes = self._passes
        before, passes.latest = passes.max_tokens, None
        while True:
            try:
                result = run()
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or passes.latest is None:
                    raise
                reason = str(error).split("\n", 1)[0]
            # Only here, where the error is gone, is the failed pass free to go.
            lowered = self._lowered(reason)
            put_back()
            passes.max_tokens = lowered
            release_memory()
        if passes.max_tokens != before:
            logger.warning(
                "out of memory: forward passes hold at most %d tokens from now on, not %s; the gradient is the same. "
                "Set max_tokens_per_forward=%d to begin with that.",
                passes.max_tokens,
                "whole micro-batches" if before is None else before,
                passes.max_tokens,
            )
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the tokens of a pass, and what the configuration had asked for."""
        return {"max_tokens": self._passes.max_tokens, "asked": self._passes.args.max_tokens_per_forward}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the tokens of a pass from `state_dict`, unless the configuration asks for something else by now.

        With "auto" too: what is free on the device differs from one start to the next, and what was found not to fit
        would be tried again.
        """
        if state_dict["asked"] == self._passes.args.max_tokens_per_forward:
            self._passes.max_tokens = state_dict["max_tokens"]

    def _lowered(self, reason: str) -> int:
        """Half of the pass that failed, but its longest row at least."""
        passes = self._passes
        assert passes.latest is not None  # a pass was laid out
        if passes.layout is None:
            raise TrainingError(
                f"out of memory while layouts were compared on a few short rows ({reason}): nothing of this model "
                "would fit. Load the base in 4 bits (quantization_config=alignkit.nf4()), or choose a smaller one."
            )
        costs = group_costs(passes.latest, passes.layout).tolist()
        tokens = sum(costs)
        if passes.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise TrainingError(
                f"out of memory in a forward pass of {tokens} tokens ({reason}). Lower per_device_train_batch_size: "
                "processes that share a model make the same passes and cannot cut them."
            )
        bound = tokens if passes.max_tokens is None else min(passes.max_tokens, tokens)
        lowered = max(bound // 2, *costs)
        if len(costs) == 1 or lowered == passes.max_tokens:  # the latter: its rows had passes of their own already
            raise TrainingError(
                f"out of memory: one row alone, of {max(costs)} tokens, does not fit ({reason}). "
                f"Lower {passes.args.LENGTH_OPTIONS}, set activation_checkpointing=True or activation_offloading=True "
                "where they are off, or load the base in 4 bits (quantization_config=alignkit.nf4())."
            )
        if passes.accelerator.num_processes > 1:
            raise TrainingError(
                f"out of memory in a forward pass of {tokens} tokens ({reason}). A second attempt by one process would "
                f"leave the others waiting: set max_tokens_per_forward={lowered} and start again."
            )
        return lowered
