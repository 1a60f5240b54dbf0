"""Why a row is left out: the reasons, with values that reports and tests can rely on."""

from __future__ import annotations

import reprlib
from enum import Enum
from typing import Any

from alignkit.errors import DataError


class DropReason(str, Enum):
    """Stable names for what can be wrong with one row; the value is what the report prints."""

    NOT_TEXT = "not text"
    EMPTY = "empty"
    IDENTICAL = "identical"
    IDENTICAL_AFTER_TRUNCATION = "identical after truncation"
    PROMPT_FILLS_LENGTH = "prompt fills the length"
    PROMPT_TOO_LONG = "prompt longer than max_prompt_tokens"
    TOO_LONG = "longer than max_length"
    WRONG_ROLES = "wrong roles"
    NOT_A_CONTINUATION = "chosen does not continue the prompt"
    NOT_A_NUMBER = "not a number"
    NOT_A_LABEL = "not a label"
    NOT_TOKEN_IDS = "not token ids"
    BAD_TEMPLATE_ARGUMENTS = "bad tools or chat_template_kwargs"
    TEMPLATE_REFUSED = "chat template refuses the row"


class _Short(reprlib.Repr):
    """Few items and few levels of anything; Python itself refuses to print an integer of thousands of digits."""

    def repr_int(self, x: int, level: int) -> str:
        return (
            super().repr_int(x, level) if x.bit_length() <= _MAX_SHOWN_BITS else f"<a number of {x.bit_length()} bits>"
        )


_MAX_SHOWN_BITS = 256
_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """Return what a message says of a value that a row holds: short, printable, however large or deep it is."""
    return _SHORT.repr(value)


class BadRow(DataError):
    """One row that cannot be trained on: `reason` is counted, `detail` says what was found in this row."""

    def __init__(self, reason: DropReason, detail: str) -> None:
        super().__init__(reason, detail)  # both in args, so that the error survives pickling between processes
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}"
