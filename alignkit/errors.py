"""Errors that alignkit raises on purpose: each says what was found and what to change.

Every class is also a `ValueError` or a `RuntimeError`, so code that catches the built-in keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AlignkitError(Exception):
    """Base of everything that alignkit raises deliberately."""


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


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the candidate closest to `name`, or an empty string if none is close."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""
