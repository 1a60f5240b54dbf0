"""What two runs left behind, compared at zero tolerance: tensors, optimizer, random states, histories, every file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers.trainer_pt_utils import safe_globals

from alignkit.checkpoint.manifest import MANIFEST

# Clock, throughput and memory: what no two runs have in common. A metric may have a prefix, `eval_runtime`.
MEASURED = (
    "runtime",
    "_per_second",
    "training_seconds",
    "peak_memory_bytes",
    "created",
    "finished",
)
# Of one process alone: hashes of its files (which are compared themselves), how often it saved, where and when.
OWN = {MANIFEST: ("files", "seal", "sequence"), "run_record.json": ("usage", "output_dir", "logging_dir", "command")}
TENSORS, PICKLES, TREES, LINES = (".safetensors",), (".pt", ".pth", ".bin"), (".json",), (".jsonl",)


def differences(found: Path, expected: Path) -> list[str]:
    """Compare two output directories, or two checkpoints, file by file and tensor by tensor.

    Left out are values that are measured (clock, throughput, memory), the digests of files that hold them, and hidden
    files at the root, which belong to the process that writes there.

    Args:
        found: a folder.
        expected: another one.

    Returns:
        What differs, a line each, beginning with the file's path; empty if the runs are equal bit for bit.
    """
    names = [_files(found), _files(expected)]
    lines = [f"{name}: is missing" for name in sorted(names[1] - names[0])]
    lines += [f"{name}: is not expected" for name in sorted(names[0] - names[1])]
    for name in sorted(names[0] & names[1]):
        lines += [f"{name}: {line}" for line in _compare(found, expected, name)]
    return lines


def _files(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if len(path.parts) > 1 or not path.name.startswith(".")}


def _compare(found: Path, expected: Path, name: str) -> Iterator[str]:
    suffix = Path(name).suffix
    readers = {TENSORS: _tensors, PICKLES: _pickle, TREES: _tree, LINES: _lines}
    reader = next((read for suffixes, read in readers.items() if suffix in suffixes), _raw)
    yield from unequal(reader(found, name), reader(expected, name))


def _tensors(folder: Path, name: str) -> Any:
    with safe_open(folder / name, "pt") as file:
        metadata = {key: _plain(_parsed(text), folder, ()) for key, text in (file.metadata() or {}).items()}
        names = [key for key in file.keys() if not any(part.endswith(MEASURED) for part in key.split("/"))]  # noqa: SIM118
        return {"metadata": metadata, **{name: file.get_tensor(name) for name in names}}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _pickle(folder: Path, name: str) -> Any:
    with safe_globals():
        return torch.load(folder / name, weights_only=True)


def _tree(folder: Path, name: str) -> Any:
    return _plain(json.loads((folder / name).read_text(encoding="utf-8")), folder, OWN.get(Path(name).name, ()))


def _lines(folder: Path, name: str) -> Any:
    return [_plain(json.loads(line), folder, ()) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def _raw(folder: Path, name: str) -> Any:
    return (folder / name).read_bytes()


def _plain(value: Any, folder: Path, own: tuple[str, ...]) -> Any:
    """Leave out what is measured, and the folder's own name."""
    if isinstance(value, dict):
        kept = {key: inner for key, inner in value.items() if key not in own and not key.endswith(MEASURED)}
        return {key: _plain(inner, folder, own) for key, inner in kept.items()}
    if isinstance(value, list):
        return [_plain(inner, folder, own) for inner in value]
    return value.replace(str(folder), "") if isinstance(value, str) else value


def unequal(found: Any, expected: Any, where: str = "") -> Iterator[str]:
    """Yield where two values differ: tensors and floats by their bits, types too."""
    if type(found) is not type(expected):
        yield f"{where} is {type(found).__name__}, not {type(expected).__name__}"
    elif isinstance(expected, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            if key in found and key in expected:
                yield from unequal(found[key], expected[key], f"{where}[{key!r}]")
            else:
                yield f"{where}[{key!r}] is {'missing' if key in expected else 'not expected'}"
    elif isinstance(expected, list | tuple):
        if len(found) != len(expected):
            yield f"{where} has {len(found)} items, not {len(expected)}"
        for number, (one, other) in enumerate(zip(found, expected, strict=False)):
            yield from unequal(one, other, f"{where}[{number}]")
    elif isinstance(expected, torch.Tensor):
        yield from _unequal_tensors(found, expected, where)
    elif isinstance(expected, np.ndarray):
        yield from unequal(found.tolist(), expected.tolist(), where)
    elif isinstance(expected, float):
        if struct.pack("d", found) != struct.pack("d", expected):
            yield f"{where} is {found!r}, not {expected!r}"
    elif found != expected:
        yield f"{where} is {_short(found)}, not {_short(expected)}"


def _unequal_tensors(found: torch.Tensor, expected: torch.Tensor, where: str) -> Iterator[str]:
    kinds = [(tensor.dtype, tuple(tensor.shape)) for tensor in (found, expected)]
    if kinds[0] != kinds[1]:
        yield f"{where} is {kinds[0]}, not {kinds[1]}"
        return
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected)]
    if not torch.equal(*bits):
        count = int((found != expected).sum())
        yield f"{where} differs in {count} of {found.numel()} values"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
