"""The YAML at the top of cards from strangers: bounded before it is built, since a few bytes can ask for years."""

from __future__ import annotations

import re
from typing import Any

import yaml

_END = re.compile(r"[\r\n]---(\r\n|\n|$)")  # as in huggingface_hub
_MAX_ALIASES = 1_000
_MAX_SCALAR = 100_000
_MAX_EVENTS = 1_000_000


def check_yaml(text: str) -> None:
    """See that building the values of a YAML text takes time in proportion to its length.

    Merge keys (`<<`) of aliases multiply, level by level; numbers in base 60 take the square of their length; and
    aliases of aliases, small in memory, grow without bound where they are written out.

    Raises:
        ValueError: it holds more aliases, longer plain words or more parts than any card, or merges what it repeats.
        yaml.YAMLError: it is no YAML.
    """
    aliases = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        aliases += isinstance(event, yaml.AliasEvent)
        is_scalar = isinstance(event, yaml.ScalarEvent)
        if is_scalar and event.value == "<<" and event.implicit[0]:
            raise ValueError("it merges mappings ('<<'), which can ask for more than any memory holds")
        if is_scalar and event.implicit[0] and len(event.value) > _MAX_SCALAR:
            raise ValueError(f"it holds a plain word of {len(event.value):,} characters")
        if aliases > _MAX_ALIASES or count > _MAX_EVENTS:
            raise ValueError(f"it has more than {_MAX_ALIASES:,} aliases or {_MAX_EVENTS:,} parts")


def front_matter(text: str) -> str:
    """The YAML between the `---` lines at the top of a card, or nothing; no reader of cards takes more."""
    text = text.lstrip("\ufeff \t\r\n\f\v")
    end = _END.search(text, 3) if text.startswith("---") else None
    return "" if end is None else text[3 : end.start()]


def safe_values(text: str) -> Any:
    """The values of a YAML text.

    Raises:
        ValueError, yaml.YAMLError, RecursionError: as `check_yaml`, or it cannot be read.
    """
    check_yaml(text)
    return yaml.safe_load(text)
