"""The two binary formats of Xet storage, read: xorbs (chunks of content) and shards (which chunks make which file).

Source: the Xet protocol specification, https://huggingface.co/docs/xet (formats of xorb and shard).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import lz4.frame

_CHUNK_HEADER = 8
_FOOTER = b"XETBLOB"
_ENTRY = 48
_BOOKEND = b"\xff" * 32
_HAS_VERIFICATION, _HAS_METADATA = 1 << 31, 1 << 30


def hash_text(raw: bytes) -> str:
    """Write a 32-byte hash as the protocol does: four little-endian 64-bit numbers, in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk: its place in the serialized xorb, and its content."""

    start: int
    end: int
    data: bytes


def read_xorb(raw: bytes) -> list[Chunk]:
    """Return the chunks of a serialized xorb, decompressed; a footer is left out.

    Raises:
        ValueError: the bytes are no xorb.
    """
    chunks, position = [], 0
    while position < len(raw) and raw[position : position + len(_FOOTER)] != _FOOTER:
        version, packed, scheme, unpacked = (
            raw[position],
            int.from_bytes(raw[position + 1 : position + 4], "little"),
            raw[position + 4],
            int.from_bytes(raw[position + 5 : position + 8], "little"),
        )
        start, position = position, position + _CHUNK_HEADER
        data = _unpack(raw[position : position + packed], scheme)
        position += packed
        if version != 0 or len(data) != unpacked or position > len(raw):
            raise ValueError(f"a chunk at byte {start} that is not what its header says")
        chunks.append(Chunk(start, position, data))
    return chunks


def _unpack(data: bytes, scheme: int) -> bytes:
    if scheme == 0:
        return data
    unpacked = lz4.frame.decompress(data)
    if scheme == 1:
        return unpacked
    if scheme != 2:
        raise ValueError(f"unknown compression scheme {scheme}")
    # Bytes grouped by their place in 4-byte words: all first bytes, then all second ones, and so on.
    merged, position = bytearray(len(unpacked)), 0
    for place in range(4):
        count = len(range(place, len(unpacked), 4))
        merged[place::4] = unpacked[position : position + count]
        position += count
    return bytes(merged)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of chunks `[first, last)` of a xorb."""

    xorb: str
    length: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A file in a shard; `sha256` is None where the client did not say."""

    file_hash: str
    segments: tuple[Segment, ...]
    sha256: str | None


def read_shard(raw: bytes) -> tuple[list[ShardFile], dict[str, list[str]]]:
    """Return the files of a shard, and the chunk hashes of each xorb that it describes."""
    position, files = _ENTRY, []
    while raw[position : position + 32] != _BOOKEND:
        file_hash = hash_text(raw[position : position + 32])
        flags, count = struct.unpack_from("<II", raw, position + 32)
        position += _ENTRY
        segments = []
        for _ in range(count):
            xorb = hash_text(raw[position : position + 32])
            _, length, first, last = struct.unpack_from("<4I", raw, position + 32)
            segments.append(Segment(xorb, length, first, last))
            position += _ENTRY
        position += _ENTRY * count if flags & _HAS_VERIFICATION else 0
        sha256 = None
        if flags & _HAS_METADATA:
            sha256 = hash_text(raw[position : position + 32])
            position += _ENTRY
        files.append(ShardFile(file_hash, tuple(segments), sha256))
    return files, _read_xorb_table(raw, position + _ENTRY)


def _read_xorb_table(raw: bytes, position: int) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    while position + _ENTRY <= len(raw) and raw[position : position + 32] != _BOOKEND:
        xorb = hash_text(raw[position : position + 32])
        _, count = struct.unpack_from("<II", raw, position + 32)
        position += _ENTRY
        table[xorb] = [hash_text(raw[position + _ENTRY * i : position + _ENTRY * i + 32]) for i in range(count)]
        position += _ENTRY * count
    return table
