"""Packed files among data from strangers: a few bytes that become as many as the disk has."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
import zlib
from pathlib import Path
from typing import Any

from alignkit.errors import DataError

_UNPACKERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_FEW_BYTES = 2**29  # no matter how well they were packed
_RATIO = 200  # text packs to a third or, where it repeats itself, a thirtieth
_STEP = 2**22


def check_packed(path: Path) -> None:
    """See that what a packed file becomes is in proportion to its bytes; other files pass.

    Raises:
        DataError: it is damaged, or a bomb.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            _check(path, size, path.stat().st_size)
        elif suffix in _UNPACKERS:
            with path.open("rb") as packed, _UNPACKERS[suffix](packed) as content:
                size = 0
                while part := content.read(_STEP):
                    size += len(part)
                    _check(path, size, packed.tell())
    except (
        OSError,
        EOFError,
        ValueError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
    ) as error:
        raise DataError(f"{path} cannot be unpacked: {error}. Fetch it again.") from error


def _check(path: Path, unpacked: int, packed: int) -> None:
    if unpacked > _FEW_BYTES and unpacked > _RATIO * packed:
        raise DataError(
            f"{path} becomes {unpacked:,} bytes or more out of {packed:,}: it would fill the disk. Do not use it."
        )
