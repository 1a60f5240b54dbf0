"""What preparation did to a dataset: counts and row ids by reason, and token lengths, in one table."""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignkit.data.reasons import DropReason
from alignkit.errors import DataError, printable

logger = logging.getLogger(__name__)

_MAX_ROW_IDS = 20
_QUANTILES = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}


@dataclass(slots=True)
class RowCount:
    """How many rows, the ids of the first 20, and what was found in the first."""

    count: int = 0
    row_ids: list[int] = field(default_factory=list)
    example: str = ""

    def add(self, row_id: int, detail: str = "") -> None:
        """Count one row."""
        self.count += 1
        if len(self.row_ids) < _MAX_ROW_IDS:
            self.row_ids.append(row_id)
        self.example = self.example or detail

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"count": self.count, "row_ids": list(self.row_ids), "example": self.example}


@dataclass(slots=True)
class PreparationReport:
    """Counts of one dataset's preparation. For a stream it fills while the stream is read, and starts anew with it.

    Attributes:
        rows_in, rows_kept: input rows read, and of these the ones that are trained on.
        drops: rows left out, by reason.
        truncated_completions: completions that lost tokens to `max_length`.
        eos_lost: rows that lost a completion's end to `max_length`; they stay.
        not_prefix: rows whose prompt is not a token prefix of prompt + completion; they stay.
        token_lengths: for "prompt", "chosen" and "rejected" ("completion" if unpaired; of prompts only "prompt"):
            {tokens: rows kept}.
    """

    name: str = "train"
    rows_in: int = 0
    rows_kept: int = 0
    drops: dict[DropReason, RowCount] = field(default_factory=dict)
    truncated_completions: int = 0
    eos_lost: RowCount = field(default_factory=RowCount)
    not_prefix: RowCount = field(default_factory=RowCount)
    token_lengths: dict[str, Counter[int]] = field(default_factory=dict)

    @property
    def rows_dropped(self) -> int:
        """Input rows that are not trained on."""
        return self.rows_in - self.rows_kept

    def clear(self) -> None:
        """Forget all counts, as at the start of another pass over a stream."""
        self.rows_in = self.rows_kept = self.truncated_completions = 0
        self.drops, self.token_lengths = {}, {}
        self.eos_lost, self.not_prefix = RowCount(), RowCount()

    def drop(self, row_id: int, reason: DropReason, detail: str) -> None:
        """Count a row that is left out."""
        self.rows_in += 1
        self.drops.setdefault(reason, RowCount()).add(row_id, detail)

    def keep(
        self, row_id: int, lengths: Mapping[str, list[int]], *, truncated: int, eos_lost: bool, not_prefix: bool
    ) -> None:
        """Count a row that stays, with the token lengths of its parts and its number of truncated completions."""
        self.rows_in += 1
        self.rows_kept += 1
        self.truncated_completions += truncated
        if eos_lost:
            self.eos_lost.add(row_id)
        if not_prefix:
            self.not_prefix.add(row_id)
        for part, values in lengths.items():
            self.token_lengths.setdefault(part, Counter()).update(values)

    def check(self, max_drop_fraction: float) -> None:
        """Raise if too many of the rows read so far were dropped, or all of them.

        Raises:
            DataError: with the whole table in its message.
        """
        share = self.rows_dropped / self.rows_in if self.rows_in else 0.0
        if self.rows_in and not self.rows_kept:
            raise DataError(f"{self.name}: none of the {self.rows_in} rows can be used.\n{self.text()}")
        if share > max_drop_fraction:
            raise DataError(
                f"{self.name}: {self.rows_dropped} of {self.rows_in} rows ({share:.1%}) were dropped, more than "
                f"max_drop_fraction={max_drop_fraction:g} allows. Repair these rows, or raise max_drop_fraction if "
                f"you can do without them.\n{self.text()}"
            )

    def finish(self, max_drop_fraction: float) -> None:
        """Check the drops of a dataset that was read to its end, and warn of those that are allowed.

        Raises:
            DataError: as `check`.
        """
        self.check(max_drop_fraction)
        if self.rows_dropped:
            reasons = ", ".join(f"{reason.value} ({rows.count})" for reason, rows in self.drops.items())
            logger.warning(
                "%s: %d of %d rows are left out: %s. The trainer's `reports` say which.",
                printable(self.name),
                self.rows_dropped,
                self.rows_in,
                reasons,
            )

    def quantiles(self) -> dict[str, dict[str, int]]:
        """Return min, median, p95 and max of the token lengths of each part."""
        return {part: _quantiles(counts) for part, counts in self.token_lengths.items()}

    def table(self) -> Table:
        """Return everything as one `rich` table."""
        table = Table(title=Text(f"Preparation of {printable(self.name)}"), title_justify="left")
        table.add_column("what", no_wrap=True)
        table.add_column("count", justify="right", no_wrap=True)
        table.add_column("rows", overflow="fold", ratio=1)
        table.add_column("found in the first", overflow="fold", ratio=1)
        table.add_row("rows read", str(self.rows_in), "", "")
        table.add_row("rows kept", str(self.rows_kept), "", "", end_section=True)
        for reason in DropReason:
            if reason in self.drops:
                table.add_row(f"dropped: {reason.value}", *_cells(self.drops[reason]))
        table.add_section()
        table.add_row("kept: completions truncated", str(self.truncated_completions), "", "")
        table.add_row("kept: EOS lost", *_cells(self.eos_lost))
        table.add_row("kept: prompt not a token prefix", *_cells(self.not_prefix), end_section=True)
        for part, values in self.quantiles().items():
            numbers = ", ".join(f"{name} {value}" for name, value in values.items())
            table.add_row(f"{part} tokens", "", numbers, "")
        return table

    def text(self) -> str:
        """Return the table as plain text."""
        console = Console(file=io.StringIO(), width=120, color_system=None, force_terminal=False, highlight=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()

    def as_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON can hold."""
        return {
            "name": self.name,
            "rows_in": self.rows_in,
            "rows_kept": self.rows_kept,
            "drops": {reason.value: count.as_dict() for reason, count in self.drops.items()},
            "truncated_completions": self.truncated_completions,
            "eos_lost": self.eos_lost.as_dict(),
            "not_prefix": self.not_prefix.as_dict(),
            "token_lengths": self.quantiles(),
        }


def _cells(rows: RowCount) -> tuple[str, str, Text]:
    ids = ", ".join(map(str, rows.row_ids)) + (", …" if rows.count > len(rows.row_ids) else "")
    return str(rows.count), ids, Text(printable(rows.example))


def _quantiles(counts: Counter[int]) -> dict[str, int]:
    """Nearest-rank quantiles of a histogram."""
    lengths, total = sorted(counts), sum(counts.values())
    found, seen, wanted = {}, 0, list(_QUANTILES.items())
    for length in lengths:
        seen += counts[length]
        while wanted and seen >= max(1, -(-wanted[0][1] * total // 1)):
            found[wanted.pop(0)[0]] = length
    return found
