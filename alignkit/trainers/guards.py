"""Numbers that are not finite: seen before the optimizer moves, and named with the rows that they came from.

Flags are gathered on the device while a step's chunks run, and read once, just before the optimizer would move: that is
the only time that the host waits for the device, and the only time that processes talk. A bad step leaves no trace but
its number: gradients are None, not zeros, which would still move AdamW, and windows and sums of losses are put back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alignkit.data.layout import Layout
from alignkit.errors import TrainingError

ROW_ID = "row_id"  # the column of a batch that says which rows of the data as given it holds, `(B,)`
# What is looked at, in the order in which it is named; every process sends a flag for each.
QUANTITIES = ("loss", "log-probability", "reward", "value", "advantage", "gradient norm")
# Rows and weights that a message lists before it only counts them.
MOST_NAMED = 20


class Look(NamedTuple):
    """One chunk's look: its rows `(B,)`, if they are known, and by quantity where it is not finite, `(B,)` or `()`."""

    rows: Tensor | None
    is_bad: dict[str, Tensor]


class SkippedStep(NamedTuple):
    """A step that moved nothing: its number, what was not finite, and the rows of the data that it came from."""

    step: int
    quantities: list[str]
    rows: list[int]


class FiniteGuard:
    """What was looked at in the open step, and the bad steps of the run so far.

    Args:
        accelerator: through which processes agree on what is bad.

    Attributes:
        skipped: bad steps, of which a rollout's together count as one.
        steps_left_out: optimizer steps that moved nothing because of them.
        last_left_out: the latest of those; 0 for none.
        norm: of the open step's gradients, before clipping.
        is_resting: the rollout of the open step is bad, so none of its steps moves anything.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.begin_run()

    def begin_run(self) -> None:
        """Forget everything."""
        self.skipped: list[SkippedStep] = []
        self.steps_left_out = self.last_left_out = 0
        self.is_resting = False
        self.begin_step()

    def begin_step(self) -> None:
        """Forget what was looked at."""
        self.looks: list[Look] = []
        self.norm: Any = None

    def look(self, inputs: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
        """Note where a chunk's numbers are not finite; nothing is read back from the device.

        Args:
            inputs: the chunk.
            found: by quantity, a tensor whose first dimension is the chunk's rows, or one number for all of them.
        """
        is_bad = {}
        for quantity, values in found.items():
            finite = torch.isfinite(values.detach())
            is_bad[quantity] = ~(finite.flatten(1).all(1) if finite.dim() > 1 else finite)
        self.looks.append(Look(inputs.get(ROW_ID), is_bad))

    def look_at_tokens(self, layout: Layout, counts: Tensor, inputs: Mapping[str, Any], **found: Tensor | None) -> None:
        """The same for values of a layout's tokens, `(S,)`, where `counts`, boolean `(S,)`, says so."""
        groups, completions = layout.completion_tokens.shape
        of_token = layout.sequence_index // completions
        is_bad = {}
        for quantity, values in found.items():
            if values is not None:
                bad = ~torch.isfinite(values.detach()) & counts
                number = torch.zeros(groups, dtype=torch.int32, device=bad.device)
                is_bad[quantity.replace("_", "-")] = number.index_add_(0, of_token.to(bad.device), bad.int()) > 0
        self.looks.append(Look(inputs.get(ROW_ID), is_bad))

    def bad_quantities(self) -> list[str]:
        """Which quantities any process found not to be finite; the one place that waits for the device."""
        accelerator = self.accelerator
        flags = []
        for quantity in QUANTITIES:
            seen = [look.is_bad[quantity].flatten() for look in self.looks if quantity in look.is_bad]
            flags.append(torch.cat(seen).any() if seen else torch.zeros((), dtype=torch.bool))
        if self.norm is not None:
            norm = self.norm.full_tensor() if isinstance(self.norm, DTensor) else torch.as_tensor(self.norm)
            flags[-1] = ~torch.isfinite(norm) & self._is_telling(norm.device)
        mine: Any = torch.stack([flag.to(accelerator.device, torch.int32) for flag in flags])
        counts: Any = accelerator.reduce(mine, reduction="sum")
        return [quantity for quantity, count in zip(QUANTITIES, counts.tolist(), strict=True) if count]

    def _is_telling(self, device: torch.device) -> Tensor:
        """Whether an infinite gradient norm means anything, `()`.

        A gradient scaler meets infinite gradients all the time: it skips their step itself, and lowers its scale. Where
        the scale is no more than 1, it was not the scale that made them infinite, and it would go on for ever.
        """
        scaler: Any = self.accelerator.scaler
        if scaler is None or not scaler.is_enabled():
            return torch.ones((), dtype=torch.bool, device=device)
        scale = scaler._get_scale_async()  # get_scale() would wait for the device; None before the first loss
        return torch.tensor(False, device=device) if scale is None else (scale <= 1).to(device).reshape(())

    def bad_rows(self) -> list[int]:
        """Rows of all processes that bad numbers came from; where none can be told apart, all rows of the step."""
        looks = [
            (look.rows.cpu(), [bad.cpu() for bad in look.is_bad.values()])
            for look in self.looks
            if look.rows is not None
        ]
        by_row = [rows[bad] for rows, flags in looks for bad in flags if bad.dim()]
        by_chunk = [rows[bad.expand(len(rows))] for rows, flags in looks for bad in flags if not bad.dim()]
        whole = [rows for rows, _ in looks]
        for found in (by_row, by_chunk, whole):
            everything = gather_object([row for rows in found for row in rows.tolist()])
            if everything:
                return sorted(set(everything))
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return the bad steps so far."""
        return {
            "skipped": [[each.step, list(each.quantities), list(each.rows)] for each in self.skipped],
            "steps_left_out": self.steps_left_out,
            "last_left_out": self.last_left_out,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set them to what `state_dict` returned."""
        self.skipped = [SkippedStep(*each) for each in state_dict["skipped"]]
        self.steps_left_out, self.last_left_out = state_dict["steps_left_out"], state_dict["last_left_out"]


def not_finite_weights(model: nn.Module) -> list[str]:
    """Names of trainable parameters that hold a number which is not finite."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        return []
    device = named[0][1].device
    finite = torch.stack([torch.isfinite(parameter.detach()).all().to(device) for _, parameter in named])
    return [name for (name, _), fine in zip(named, finite.tolist(), strict=True) if not fine]


def check_finite(model: nn.Module) -> None:
    """Refuse weights that nobody could go on from; to be called before a checkpoint is written.

    Raises:
        TrainingError: a trainable parameter holds a number that is not finite.
    """
    bad = not_finite_weights(model)
    if bad:
        raise TrainingError(
            f"weights are not finite, so no checkpoint is written: {few(bad)}. Go on from an earlier checkpoint, with "
            "a lower learning_rate."
        )


def listed(quantities: Sequence[str]) -> str:
    """`"loss and gradient norm are"`."""
    if len(quantities) == 1:
        return f"{quantities[0]} is"
    return f"{', '.join(quantities[:-1])} and {quantities[-1]} are"


def few(items: Sequence[Any]) -> str:
    """The first items, and how many more there are."""
    more = len(items) - MOST_NAMED
    return ", ".join(map(str, items[:MOST_NAMED])) + (f" and {more} more" if more > 0 else "")
