"""Damage to files: bytes flipped, put in, taken out, cut off and spliced, and what breaks readers of JSON."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

SECONDS = 1.0  # of this process's own time, for one input

# What a reader may stumble over wherever it stands.
TOKENS = (
    b"null",
    b"true",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"-0",
    b"1" * 400,
    b"9" * 5000,
    b"0.1e-400",
    b'"\\ud83d"',
    b'"\\u0000"',
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\x00",
    b"\\",
    b'"',
    b"{}",
    b"[]",
    b",",
    b":",
    b"/*",
    b'"../../etc/passwd"',
    b'"/etc/passwd"',
    b'"format": 2',
    b'"seal": "x",',
    b'"__class__": "os.system",',
)
LEVELS = (2, 50, 200, 400, 900, 960, 985, 990, 995, 1000, 5000, 100_000)


def _flip(data: bytearray, source: random.Random) -> None:
    for _ in range(source.choice((1, 1, 2, 8))):
        at = source.randrange(len(data))
        data[at] ^= 1 << source.randrange(8)


def _put_in(data: bytearray, source: random.Random) -> None:
    at = source.randint(0, len(data))
    data[at:at] = source.choice(TOKENS) if source.random() < 0.7 else source.randbytes(source.randint(1, 9))


def _replace(data: bytearray, source: random.Random) -> None:
    at = source.randrange(len(data))
    data[at : at + source.randint(1, 12)] = source.choice(TOKENS)


def _take_out(data: bytearray, source: random.Random) -> None:
    at = source.randrange(len(data))
    del data[at : at + source.choice((1, 1, 3, 40))]


def _cut_off(data: bytearray, source: random.Random) -> None:
    del data[source.randrange(len(data)) :]


def _splice(data: bytearray, source: random.Random) -> None:
    """Copy a piece from elsewhere over another."""
    begin, at = source.randrange(len(data)), source.randrange(len(data))
    piece = data[begin : begin + source.randint(1, 80)]
    data[at : at + source.choice((0, len(piece)))] = piece


def _nest(data: bytearray, source: random.Random) -> None:
    """Wrap a value, or what stands anywhere, in many brackets."""
    opened, closed = source.choice(((b"[", b"]"), (b'{"a":', b"}")))
    levels = source.choice(LEVELS)
    colons = [place for place, byte in enumerate(data) if byte == ord(":")]
    at = source.choice(colons) + 1 if colons and source.random() < 0.8 else source.randint(0, len(data))
    data[at : at + source.choice((0, 0, 1, 4))] = opened * levels + source.choice((b"", b"1")) + closed * levels
    if source.random() < 0.5:
        data[at + (len(opened) + len(closed)) * levels + 1 : 0] = b","


def _double(data: bytearray, source: random.Random) -> None:
    """Say a line twice: in JSON, the same key again."""
    lines = bytes(data).split(b"\n")
    at = source.randrange(len(lines))
    lines.insert(source.randint(0, len(lines)), lines[at])
    data[:] = b"\n".join(lines)


_MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip,
    _put_in,
    _replace,
    _take_out,
    _cut_off,
    _splice,
    _nest,
    _double,
)


def mutated(data: bytes, source: random.Random) -> bytes:
    """One to four kinds of damage, one after another."""
    found = bytearray(data)
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        if found:
            source.choice(_MUTATIONS)(found, source)
    return bytes(found)


_VALUES: tuple[Callable[[random.Random], Any], ...] = (
    lambda source: None,
    lambda source: source.choice((True, False)),
    lambda source: source.choice((0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400)),
    lambda source: source.choice((0.0, 0.5, 1e308, float("nan"), float("inf"))),
    lambda source: source.choice(("", "\ud83d", "\x00", "..", "../x", "/x", ".", "a//b", "a\\b", "C:\\x", "x" * 3000)),
    lambda source: [],
    lambda source: {},
    lambda source: [None, {}],
    lambda source: {"bytes": 3, "sha256": "0" * 64},
    lambda source: _deep(source.choice((2, 50, 200, 400, 700))),  # deeper, nothing here could write it
)


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def changed(value: Any, source: random.Random) -> Any:
    """A copy of plain data with one value or key somewhere in it replaced, lost or added."""
    places = list(_places(value))
    if not places or source.random() < 0.02:
        return source.choice(_VALUES)(source)
    path = source.choice(places)
    copy = json.loads(json.dumps(value))
    holder = copy
    for key in path[:-1]:
        holder = holder[key]
    kind, new = source.random(), source.choice(_VALUES)(source)
    if kind < 0.6:
        holder[path[-1]] = new
    elif kind < 0.8:
        del holder[path[-1]]
    elif isinstance(holder, dict):
        holder[source.choice(("", "..", "/etc/passwd", "unknown", "a/../../b", "\ud83d"))] = new
    else:
        holder.append(new)
    return copy


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterable[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def try_inputs(
    inputs: Iterable[bytes], read: Callable[[bytes], str], tally: Counter[str], *, seconds: float = SECONDS
) -> None:
    """Hand every input to `read`, which returns a word on what became of it, and hold it to its time."""
    for number, data in enumerate(inputs):
        began = time.process_time()
        try:
            outcome = read(data)
        except BaseException as error:
            raise AssertionError(f"input {number}, {len(data)} bytes: {data[:400]!r}...") from error
        took = time.process_time() - began
        assert took < seconds, f"input {number} took {took:.1f} s: {data[:400]!r}..."
        tally["inputs"] += 1
        tally[outcome] += 1
