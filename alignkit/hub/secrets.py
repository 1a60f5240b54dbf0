"""The last look before anything goes up: every byte of every file is searched for secrets and paths of this machine."""

from __future__ import annotations

import bisect
import gzip
import io
import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from huggingface_hub import get_token

from alignkit.errors import ConfigError
from alignkit.hub.secret_patterns import (
    LONGEST_MATCH,
    SHAPES,
    Needle,
    Shape,
    environment_secrets,
    machine_paths,
    secret_needles,
)

CHUNK_BYTES = 1 << 20
_MAX_FINDINGS_PER_FILE = 20
_MAX_ARCHIVE_DEPTH = 3
_PNG = b"\x89PNG\r\n\x1a\n"
_HUB_TOKEN = "the Hub's token in use"
_WINDOW = 1024  # bytes behind a hint in which its match begins and ends, where it may begin before the hint
_SHORTEST_TEXT = 6  # bytes: shorter than any match of a shape or a needle
_IS_TEXT = np.zeros(256, dtype=bool)
_IS_TEXT[[9, 10, 13, *range(32, 127)]] = True
_ASSIGNED = re.compile(r"""(?<![A-Za-z0-9_-])[A-Za-z_]{1,16}["']{0,2} ?[:=] ?["']?$""")


class SecretFound(ConfigError):
    """Files that were about to go up hold secrets or paths of this machine; `findings` says which and where."""

    def __init__(self, message: str, findings: tuple[Finding, ...]) -> None:
        super().__init__(message)
        self.findings = findings


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that must not go up.

    Attributes:
        file: the file, for a member of an archive followed by `!` and its name.
        kind: what it is, with the variable's name where it is one's value.
        offset: bytes from the start of the file (or of the unpacked member).
        line: counted from 1; `None` in a file that is not text.
        excerpt: the place with the secret masked. Never the secret itself.
    """

    file: str
    kind: str
    offset: int
    line: int | None
    excerpt: str

    def __str__(self) -> str:
        place = f"byte {self.offset}" if self.line is None else f"line {self.line}"
        return f"{self.file}, {place}: {self.kind}: {self.excerpt}"


@dataclass(frozen=True, slots=True)
class Scanner:
    """Searches files for the shapes of secrets and for known values; `Scanner.of_this_machine` makes the usual one."""

    needles: tuple[Needle, ...]
    chunk_bytes: int = CHUNK_BYTES
    _patterns: dict[Needle, re.Pattern[bytes]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_patterns", {needle: _needle_pattern(needle) for needle in self.needles})

    @classmethod
    def of_this_machine(
        cls, *, token: str | None = None, secrets: Mapping[str, str] | None = None, paths: Iterable[str | Path] = ()
    ) -> Scanner:
        """Make the scanner that knows this process's secrets and paths.

        Args:
            token: the Hub's token, if it is not the one that is logged in with.
            secrets: more values by name, such as `hub_token` of a configuration.
            paths: more folders of this machine, such as the output folder and the base model's.
        """
        values = environment_secrets()
        tokens = {_HUB_TOKEN: token, "the Hub's token of this machine": get_token()}
        values |= {name: value for name, value in tokens.items() if value} | dict(secrets or {})
        return cls((*secret_needles(values), *machine_paths(*paths)))

    def scan(self, files: Mapping[str, Path]) -> tuple[Finding, ...]:
        """Search files, given by the names they will have; return what was found, the file's order kept."""
        found: list[Finding] = []
        for name, path in files.items():
            found += self.scan_bytes(name, name.encode())  # a file's name goes up too
            with path.open("rb") as stream:
                found += self.scan_stream(name, stream)
        return tuple(found)

    def scan_bytes(self, name: str, data: bytes) -> list[Finding]:
        """Search bytes as if they were a file."""
        return self.scan_stream(name, io.BytesIO(data))

    def scan_stream(self, name: str, stream: BinaryIO, *, depth: int = 0) -> list[Finding]:
        """Search a stream, and what is packed in it, up to three archives deep."""
        found: list[Finding] = []
        for finding in self._scan_raw(name, stream):
            found.append(finding)
            if len(found) >= _MAX_FINDINGS_PER_FILE:
                break
        if depth < _MAX_ARCHIVE_DEPTH:
            stream.seek(0)
            for member, unpacked in _members(stream):
                found += self.scan_bytes(f"{name}!{member}", member.encode())
                found += self.scan_stream(f"{name}!{member}", unpacked, depth=depth + 1)
        return found

    def _scan_raw(self, name: str, stream: BinaryIO) -> Iterator[Finding]:
        """Search in chunks that overlap by the longest match, so that a match is seen whole, once."""
        stream.seek(0)
        start, buffer, lines, is_text = 0, b"", 0, True
        searched = 0  # matches that begin before this offset were reported, or there were none
        ends: dict[re.Pattern[bytes], int] = {}  # where the last match of each pattern ended
        while True:
            piece = stream.read(self.chunk_bytes)
            is_text = is_text and b"\0" not in piece
            buffer += piece
            is_last = not piece
            limit = len(buffer) if is_last else max(len(buffer) - LONGEST_MATCH, searched - start)
            newlines: list[int] | None = None
            for kind, match in self._matches(buffer, searched - start, limit):
                if start + match.start() < ends.get(match.re, 0):
                    continue  # inside a match that was reported
                ends[match.re] = start + match.end()
                if newlines is None:
                    newlines = [hit.start() for hit in re.finditer(b"\n", buffer)]
                begin, end = match.span(match.lastindex or 0)
                line = lines + bisect.bisect_left(newlines, begin) + 1 if is_text else None
                yield Finding(name, kind, start + begin, line, self._masked(buffer, begin, end))
            searched = start + limit
            if is_last:
                return
            # Keep what was not searched yet, and as much before it, for patterns that look behind.
            cut = max(0, limit - LONGEST_MATCH)
            lines += buffer.count(b"\n", 0, cut)
            start, buffer = start + cut, buffer[cut:]

    def _matches(self, buffer: bytes, first: int, limit: int) -> list[tuple[str, re.Match[bytes]]]:
        """Return the matches that begin in `[first, limit)`, in order."""
        text, wide = _text_of(buffer), _text_of(buffer[::2]) + b"\0" + _text_of(buffer[1::2])
        folded_text, folded = text.lower(), b""
        found: list[tuple[str, re.Match[bytes]]] = []
        for shape in SHAPES:
            for hint in shape.hints:
                if hint not in (folded_text if shape.folded else text):
                    continue
                folded = folded or (buffer.lower() if shape.folded else b"")
                found += [(shape.kind, m) for m in _around(shape, hint, buffer, folded if shape.folded else buffer)]
        for needle, pattern in self._patterns.items():
            if any(spelled in text or spelled in wide for spelled in needle.spellings) or not needle.is_plain:
                kind = f"{needle.kind} ({needle.name})" if needle.name else needle.kind
                found += [(kind, match) for match in pattern.finditer(buffer, first)]
        return sorted(((k, m) for k, m in found if first <= m.start() < limit), key=lambda row: row[1].start())

    def _masked(self, buffer: bytes, begin: int, end: int) -> str:
        """Show the name before a match, as in `api_key = "***`, unless that is, or may be, a secret itself."""
        text = buffer[max(0, begin - 24) : begin].decode("ascii", "replace")
        name = _ASSIGNED.search(text)
        is_safe = name is not None and not any(needle in name[0].encode() for needle in self._spelled())
        return f"{name[0] if name and is_safe else ''}*** ({end - begin} bytes)"

    def _spelled(self) -> Iterator[bytes]:
        return (spelling for needle in self.needles for spelling in needle.spellings)


def _around(shape: Shape, hint: bytes, buffer: bytes, hay: bytes) -> Iterator[re.Match[bytes]]:
    position = hay.find(hint)
    while position >= 0:
        if shape.before == 0:
            match = shape.pattern.match(buffer, position)
        else:
            match = shape.pattern.search(buffer, max(0, position - shape.before), position + _WINDOW)
        if match is not None:
            yield match
        position = hay.find(hint, position + 1)


def _text_of(buffer: bytes) -> bytes:
    """Return the runs of text in a buffer, of six bytes or more, one after another.

    Weights hardly have any, so that searching these first makes searching weights fast.
    """
    is_text = _IS_TEXT[np.frombuffer(buffer, np.uint8)]
    if len(is_text) < _SHORTEST_TEXT:
        return buffer
    count = len(is_text) - _SHORTEST_TEXT + 1
    starts = np.logical_and.reduce([is_text[shift : shift + count] for shift in range(_SHORTEST_TEXT)])
    kept = np.zeros(len(is_text), dtype=bool)
    for shift in range(_SHORTEST_TEXT):
        kept[shift : shift + count] |= starts
    return np.frombuffer(buffer, np.uint8)[kept].tobytes()


def _needle_pattern(needle: Needle) -> re.Pattern[bytes]:
    spelled = sorted(needle.spellings, key=len, reverse=True)
    if needle.kind == "secret value":
        return re.compile(b"|".join(re.escape(text) for text in spelled))
    # `/tmp` alone is a word of many vocabularies; `/tmp/x` is somebody's file. A longer path speaks for itself.
    rows = []
    for text in spelled:
        is_short = len(re.findall(rb"[/\\]+[^/\\]", text)) < 2 and b"\0" not in text
        rows.append(re.escape(text) + (rb"(?=[/\\]+[A-Za-z0-9_.-])" if is_short else rb"(?![A-Za-z0-9_-])"))
    return re.compile(b"|".join(rows))


def _members(stream: BinaryIO) -> Iterator[tuple[str, BinaryIO]]:
    """Yield what is packed in a zip, tar or gzip file, or in the texts of a PNG; nothing of a broken file."""
    head = stream.read(264)
    stream.seek(0)
    try:
        if head[:4] == b"PK\x03\x04" and zipfile.is_zipfile(stream):
            with zipfile.ZipFile(stream) as archive:
                for entry in archive.infolist():
                    if not entry.is_dir() and not entry.flag_bits & 1:
                        yield entry.filename, io.BytesIO(archive.read(entry))
        elif head[:2] == b"\x1f\x8b":
            with gzip.open(stream) as unpacked:
                yield "(unpacked)", io.BytesIO(unpacked.read())
        elif head[257:262] == b"ustar":
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for entry in archive:
                    if entry.isfile() and (unpacked := archive.extractfile(entry)) is not None:
                        yield entry.name, io.BytesIO(unpacked.read())
        elif head.startswith(_PNG):
            yield from _png_texts(stream)
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, NotImplementedError, RuntimeError, zlib.error):
        return


def _png_texts(stream: BinaryIO) -> Iterator[tuple[str, BinaryIO]]:
    """Yield the compressed texts of a PNG file; the others stand in it as they are."""
    stream.seek(len(_PNG))
    while len(head := stream.read(8)) == 8:
        content = stream.read(int.from_bytes(head[:4], "big"))
        stream.read(4)  # the checksum
        keyword, _, rest = content.partition(b"\0")
        packed = b""
        if head[4:] in (b"zTXt", b"iCCP"):
            packed = rest[1:]
        elif head[4:] == b"iTXt" and rest[:1] == b"\1":
            packed = rest[2:].split(b"\0", 2)[-1]
        if packed:
            yield f"({keyword.decode('latin-1')})", io.BytesIO(zlib.decompress(packed))


_PATH = re.compile(r"(?:/[\w.@+~ -]+){2,}/?|[A-Za-z]:[\\/][^\n]+|\\\\[^\n]+\\[^\n]+")


def config_paths(files: Mapping[str, Path]) -> tuple[Finding, ...]:
    """Return the absolute paths in configurations: of whatever machine they are, nobody else can use them.

    In other files an absolute path may be an example, so that only those of this machine are looked for there.

    Args:
        files: as for `Scanner.scan`; of these, `*config.json` are read.
    """
    found = []
    for name, path in files.items():
        if not name.endswith("config.json"):
            continue
        text = path.read_text(encoding="utf-8")
        for key, value in _strings("", json.loads(text)):
            if _PATH.fullmatch(value):
                offset = max(0, text.find(f'"{key.rsplit(".", 1)[-1]}"'))
                line = text.count("\n", 0, offset) + 1
                found.append(Finding(name, "absolute path", len(text[:offset].encode()), line, f"{key}: ***"))
    return tuple(found)


def _strings(key: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield every text in JSON content, with the names that lead to it."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(f"{key}.{name}".lstrip("."), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(key, inner)


def refuse_secrets(findings: tuple[Finding, ...]) -> None:
    """Raise if anything was found.

    Raises:
        SecretFound: with every finding and what to do about them.
    """
    if not findings:
        return
    listed = "\n".join(f"  {finding}" for finding in findings[:_MAX_FINDINGS_PER_FILE])
    more = len(findings) - _MAX_FINDINGS_PER_FILE
    rest = f"\n  and {more} more" if more > 0 else ""
    raise SecretFound(
        f"nothing was uploaded: {len(findings)} secrets or paths of this machine stand in the files:\n{listed}{rest}\n"
        "Remove them from the files. If a token is real and these files were shared before, revoke it. If the value of "
        "an environment variable is no secret, unset the variable for this command.",
        findings,
    )
