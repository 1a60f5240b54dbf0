"""Errors that alignkit raises on purpose: each says what was found and what to change.

Every class is also a `ValueError` or a `RuntimeError`, so code that catches the built-in keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AlignkitError(Exception):
    """Base of everything that alignkit raises deliberately.

    Messages quote rows, file names and other people's errors; what a terminal would act on in them is escaped.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class DataError(AlignkitError, ValueError):
    """Rows, files or columns that cannot be used as they are."""


class ConfigError(AlignkitError, ValueError):
    """An option that is unknown, out of range, contradictory, or would have no effect."""


class ModelError(AlignkitError, ValueError):
    """A model, adapter or tokenizer that cannot play the role it was given."""


class TrainingError(AlignkitError, RuntimeError):
    """A run that cannot go on: non-finite loss, no gradient, ranks that disagree."""


class CheckpointError(AlignkitError, RuntimeError):
    """A checkpoint or cache on disk that is incomplete or does not belong to this run."""


class PublishError(AlignkitError, RuntimeError):
    """The Hub refused, could not be reached, or does not hold what was sent; what lies on disk is as it was."""


def printable(text: str) -> str:
    """Escape whatever a terminal might act on: control characters, marks that reverse the direction of text.

    Line breaks stay. Everything that a dataset, a model or a stranger's file wrote goes through here on its way to a
    terminal or a log.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the candidate closest to `name`, or an empty string if none is close."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""
