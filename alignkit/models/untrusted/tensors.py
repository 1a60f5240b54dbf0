"""The header of a safetensors file, read and checked without the file's library and without its tensors.

Format: 8 bytes with the header's length, little-endian; the header, a JSON object of tensors; their bytes, in order and
without gaps. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.data.plain_files import check_regular, nesting_depth
from alignkit.errors import AlignkitError, ModelError

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_MAX_HEADER_DEPTH = 4
_MAX_DIMENSIONS = 8
_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


class TensorInfo(NamedTuple):
    """One tensor of a file: its safetensors dtype ("F32", "BF16", ...), shape, and bytes within the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(
    path: Path, *, folder: Path | None = None, error: type[AlignkitError] = ModelError
) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file by name.

    What is seen to: the header's length against the file's size, its depth, every dtype and shape, that each tensor
    has as many bytes as its shape needs, and that together they cover the file exactly, without gap or overlap. So
    nothing that is read afterwards can take more memory than the file has bytes.

    Args:
        path: the file.
        folder: where a link may lead; by default the file's own.
        error: what to raise.

    Raises:
        error: the file is not a whole, well-formed safetensors file.
    """
    size = check_regular(path, folder=folder, error=error)
    header, data_bytes = _header(path, size, error)
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            _check_metadata(path, entry, error)
        else:
            tensors[name] = _tensor(path, name, entry, error)
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise error(f"'{path}' is malformed: {name!r} {what}. {_REMEDY}")
        end = tensor.stop
    if end != data_bytes:
        raise error(f"'{path}' is malformed: its tensors take {end:,} bytes, and it holds {data_bytes:,}. {_REMEDY}")
    return tensors


_REMEDY = "Fetch it again; if it stays so, do not use it."


def _header(path: Path, size: int, error: type[AlignkitError]) -> tuple[dict[str, Any], int]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise error(
                    f"'{path}' is malformed: it says that its header has {length:,} bytes, and the whole file has "
                    f"{size:,}. {_REMEDY}"
                )
            if length > MAX_HEADER_BYTES:
                raise error(f"'{path}' has a header of {length:,} bytes; {MAX_HEADER_BYTES:,} are allowed. {_REMEDY}")
            raw = file.read(length)
    except OSError as reason:
        raise error(f"'{path}' cannot be read: {reason.strerror}. Check its rights.") from reason
    depth = nesting_depth(raw)
    if depth > _MAX_HEADER_DEPTH:
        raise error(f"'{path}' is malformed: its header nests {depth:,} deep. {_REMEDY}")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as reason:
        raise error(f"'{path}' is malformed: its header cannot be read ({reason}). {_REMEDY}") from reason
    if not isinstance(header, dict):
        raise error(f"'{path}' is malformed: its header is no JSON object. {_REMEDY}")
    return header, size - 8 - length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Two readers may take two different ones, so what was checked might not be what is loaded.
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _check_metadata(path: Path, entry: Any, error: type[AlignkitError]) -> None:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise error(f"'{path}' is malformed: its metadata is not a table of texts. {_REMEDY}")


def _tensor(path: Path, name: str, entry: Any, error: type[AlignkitError]) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as reason:
        raise error(f"'{path}' is malformed: {name!r} lacks a dtype, a shape or two offsets. {_REMEDY}") from reason
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise error(f"'{path}': {name!r} has the dtype {dtype!r}, which safetensors does not know. {_REMEDY}")
    numbers = (*shape, start, stop)
    if len(shape) > _MAX_DIMENSIONS or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise error(f"'{path}' is malformed: {name!r} has an impossible shape or offset. {_REMEDY}")
    needed, rest = divmod(math.prod(shape) * _BITS[dtype], 8)
    if rest or stop - start != needed:
        raise error(
            f"'{path}' is malformed: {name!r} of {dtype} {list(shape)} needs {needed:,} bytes, and its offsets give it "
            f"{stop - start:,}. {_REMEDY}"
        )
    return TensorInfo(dtype, shape, start, stop)
