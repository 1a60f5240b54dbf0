"""One way to try many inputs: the same ones on every machine, each counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy


def effort(quick: int, slow: int) -> Any:
    """Parametrise a test with its number of `examples`: `quick` in every run, `slow` with `-m slow`."""
    return pytest.mark.parametrize("examples", [quick, pytest.param(slow, marks=pytest.mark.slow)])


def try_all(check: Callable[..., None], examples: int, tally: Counter[str], **strategies: SearchStrategy[Any]) -> None:
    """Call `check` with inputs drawn from the strategies, the same in every run; a failure is shrunk and printed.

    Args:
        check: raises where a property does not hold.
        examples: how many inputs to try.
        tally: its `inputs` are counted.
        **strategies: one per argument of `check`.
    """

    def counted(**drawn: Any) -> None:
        tally["inputs"] += 1
        check(**drawn)

    counted.__name__ = check.__qualname__.partition(".")[0]  # what is drawn is derived from it
    run = given(**strategies)(counted)
    settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )(run)()


def is_printable(text: str) -> bool:
    """Whether a text can be written anywhere and commands no terminal."""
    return all(letter.isprintable() or letter == "\n" for letter in text)
