"""Turn what a YAML file or a command line says into the type that a dataclass field declares, or say why not.

YAML 1.1 reads `1e-6` as text and `no` as false, and a command line knows nothing but text, so a value is taken in the
first of the declared types that it fits. Nothing is guessed beyond that: text is not a number unless it spells one.
"""

from __future__ import annotations

import json
import types
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from alignkit.errors import nearest

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


class Mismatch(Exception):
    """A value that does not fit a type; `expected` says what would.

    `final` forbids trying the other members of a union: a misspelt enum name is no free text.
    """

    def __init__(self, expected: str, *, final: bool = False) -> None:
        super().__init__(expected)
        self.expected = expected
        self.final = final


def members(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def takes_list(hint: Any) -> bool:
    """Whether a field of this type accepts several values."""
    return any(get_origin(member) is list for member in members(hint))


def coerce(value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint` (a builtin, a list or dict of them, an enum, a literal, or a union of these).

    Raises:
        Mismatch: if it cannot be read as any of them.
    """
    alternatives = sorted(members(hint), key=_preference)
    if Any in alternatives:
        return value
    if type(None) in alternatives:
        if value is None:
            return None
        if isinstance(value, str) and value.lower() in ("none", "null") and str not in alternatives:
            return None
    if str in alternatives and not isinstance(value, (list, tuple)):
        alternatives = [member for member in alternatives if get_origin(member) is not list]
    problems = []
    for member in alternatives:
        if member is type(None):
            continue
        try:
            return _coerce_one(value, member)
        except Mismatch as mismatch:
            if mismatch.final:
                raise
            problems.append(mismatch.expected)
    raise Mismatch(" or ".join(dict.fromkeys(problems)))


def _is_enum(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, Enum)


def _preference(member: Any) -> int:
    """Strict types first, text last, because every value from a command line is text."""
    if member is str:
        return 2
    return 1 if member is float else 0


def _coerce_one(value: Any, member: Any) -> Any:
    if _is_enum(member):
        return _as_enum(value, member)
    origin = get_origin(member)
    if origin is Literal:
        return _as_literal(value, get_args(member))
    if origin is list or member is list:
        return _as_list(value, get_args(member))
    if origin is dict or member is dict:
        return _as_dict(value)
    readers = {bool: _as_bool, int: _as_int, float: _as_float, str: _as_text}
    if member not in readers:
        raise Mismatch(f"a Python object ({member.__name__}), which text cannot give")
    return readers[member](value)


def _as_enum(value: Any, member: type[Enum]) -> str:
    names = [item.value for item in member]
    if value is False and "no" in names:  # YAML 1.1 reads a bare `no` as false
        return "no"
    if isinstance(value, str) and value in names:
        return value
    hint = nearest(value, names) if isinstance(value, str) else ""
    raise Mismatch(f"one of {', '.join(names)}.{hint}".rstrip("."), final=isinstance(value, str))


def _as_literal(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        same_text = isinstance(value, str) and value.lower() == str(choice).lower()
        if same_text or (value == choice and type(value) is type(choice)):
            return choice
    raise Mismatch("one of " + ", ".join(repr(choice) for choice in choices))


def _as_list(value: Any, item_types: tuple[Any, ...]) -> list[Any]:
    if isinstance(value, dict):
        raise Mismatch("a list")
    items = value if isinstance(value, (list, tuple)) else [value]
    return [coerce(item, item_types[0]) for item in items] if item_types else list(items)


def _as_dict(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise Mismatch(f"a JSON mapping ({error})", final=True) from None
    raise Mismatch("a mapping, as JSON on a command line: '{\"key\": 1}'")


def _as_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    raise Mismatch("true or false")


def _as_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    raise Mismatch("a whole number")


def _as_float(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    raise Mismatch("a number")


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise Mismatch("text (in YAML, put it in quotes)")
