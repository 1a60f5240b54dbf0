"""Readers of files that anybody may have written, damaged or made up: right, or refused in words, and soon."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from alignkit.checkpoint import manifest as manifests
from alignkit.checkpoint.manifest import MANIFEST, Manifest, read_manifest, seal, verify
from alignkit.checkpoint.states import read_states, write_states
from alignkit.data.sources import load_preferences
from alignkit.errors import AlignkitError
from alignkit.hub.record import RECORD_FILE, RunRecord
from tests.fuzz.harness import effort, is_printable
from tests.fuzz.mutations import changed, mutated, try_inputs
from tests.hub.record_factory import make_record

RUN: dict[str, Any] = {"method": "dpo", "seed": 42, "settings": {"beta": 0.1, "loss_type": ["sigmoid"]}, "world": 1}
ROWS = [
    {"prompt": "hi", "chosen": "yes", "rejected": "no", "weight": 1.5},
    {"prompt": [{"role": "user", "content": "é👩‍👩"}], "chosen": "a\nb", "rejected": None, "tools": []},
    {"prompt": "three", "chosen": 'with "quotes", and more', "rejected": "d", "weight": None},
]


def damage(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    source = random.Random(seed)
    return (mutated(data, source) for _ in range(count))


def refused(error: AlignkitError) -> str:
    assert is_printable(str(error).replace("\t", " "))
    return "refused"


@effort(2_000, 10_000)
def test_damaged_records(examples: int, tmp_path: Path, tally: Counter[str]) -> None:
    record = make_record()
    path = record.save(tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))

    def read(data: bytes) -> str:
        path.write_bytes(data)
        try:
            found = RunRecord.load(path)
        except AlignkitError as error:
            return refused(error)
        assert RunRecord.from_dict(found.as_dict()) == found  # and it can be written and read again
        return "read, equal" if found == record else "read, valid"

    try_inputs(damage((tmp_path / RECORD_FILE).read_bytes(), examples // 2, 1), read, tally)
    source = random.Random(2)
    made_up = (json.dumps(changed(content, source)).encode() for _ in range(examples // 2))
    try_inputs(made_up, read, tally)
    assert min(tally["refused"], tally["read, equal"], tally["read, valid"]) > examples // 100


@pytest.fixture
def sealed(tmp_path: Path) -> tuple[Path, Manifest]:
    """A folder of a few files under a seal."""
    folder = tmp_path / "checkpoint-3"
    (folder / "value").mkdir(parents=True)
    for name, content in (("a.bin", b"abc"), ("value/b.bin", b"d" * 100), ("c.json", b"{}")):
        (folder / name).write_bytes(content)
    return folder, seal(folder, sequence=4, step=3, run=RUN)


def check_manifest(folder: Path, expected: Manifest, data: bytes) -> str:
    (folder / MANIFEST).write_bytes(data)
    try:
        found = verify(folder)
    except AlignkitError as error:
        return refused(error)
    assert found == expected
    return "verified"


@effort(2_500, 15_000)
def test_a_damaged_manifest_verifies_only_if_it_says_the_same(
    examples: int, sealed: tuple[Path, Manifest], tally: Counter[str]
) -> None:
    folder, manifest = sealed
    original = (folder / MANIFEST).read_bytes()
    assert check_manifest(folder, manifest, original) == "verified"
    inputs = damage(original, examples, 3)
    try_inputs(inputs, lambda data: check_manifest(folder, manifest, data), tally)
    assert tally["refused"] > examples // 2
    assert tally["verified"] > 5  # spaces, or a key said twice


def test_a_manifest_nested_as_deep_as_it_can_be_read(sealed: tuple[Path, Manifest], tally: Counter[str]) -> None:
    """Between the depth that can be read and the depth that can be written again lies no other error."""
    folder, manifest = sealed
    original = (folder / MANIFEST).read_bytes()
    inputs = (original.replace(b'"dpo"', b"[" * levels + b"]" * levels) for levels in range(600, 1_010))
    try_inputs(inputs, lambda data: check_manifest(folder, manifest, data), tally)
    assert tally["verified"] == 0


@effort(1_500, 6_000)
def test_a_manifest_that_somebody_made_up(examples: int, sealed: tuple[Path, Manifest], tally: Counter[str]) -> None:
    """With a seal that fits: nothing outside the folder is named, and every file is what the manifest says."""
    folder, manifest = sealed
    content = json.loads((folder / MANIFEST).read_bytes())
    del content["seal"]
    source = random.Random(4)

    def read(data: bytes) -> str:
        (folder / MANIFEST).write_bytes(data)
        try:
            found = read_manifest(folder)
        except AlignkitError as error:
            return refused(error)
        for name in found.files:
            inside = (folder / name).resolve()
            assert inside.is_relative_to(folder.resolve())
            assert inside != folder.resolve()
        try:
            assert verify(folder).files == manifest.files
        except AlignkitError as error:
            return refused(error)
        return "verified"

    def made_up() -> Iterator[bytes]:
        for _ in range(examples):
            found = changed(content, source)
            kept = {**found, "seal": manifests._seal_of(found)} if isinstance(found, dict) else found
            yield json.dumps(kept).encode()

    try_inputs(made_up(), read, tally)
    assert min(tally["refused"], tally["verified"]) > examples // 20


@effort(1_500, 6_000)
def test_damaged_states(examples: int, tmp_path: Path, tally: Counter[str]) -> None:
    path = tmp_path / "states_0.safetensors"
    window = {"sums": {"loss": torch.tensor(1.5, dtype=torch.float64)}, "moments": torch.arange(4.0), "none": None}
    write_states(path, {"states": {"window": window, "kl": {"value": 0.1, "names": ["a"]}}, "trainer": {"step": 3}})
    original, source = path.read_bytes(), random.Random(5)
    header = {"states": {"window": {"sums": {"$tensor": "/a"}}, "kl": {"value": 0.1}}, "trainer": {"$tensor": "/b"}}

    def read(data: bytes) -> str:
        path.write_bytes(data)
        try:
            found = read_states(path)
        except AlignkitError as error:
            return refused(error)
        assert isinstance(found, dict)
        return "read"

    def inputs() -> Iterator[bytes]:
        yield from damage(original, examples // 2, 6)
        for _ in range(examples // 2):
            save_file(
                {"/a": torch.ones(2), "/b": torch.zeros(1)}, path, {"states": json.dumps(changed(header, source))}
            )
            yield path.read_bytes()

    try_inputs(inputs(), read, tally)
    assert min(tally["refused"], tally["read"]) > examples // 50


@effort(250, 1_000)
def test_damaged_datasets(examples: int, tmp_path: Path, tally: Counter[str]) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    texts = {
        "rows.jsonl": lines,
        "rows.json": json.dumps(ROWS, indent=0).encode(),
        "rows.csv": b'prompt,chosen,rejected,weight\nhi,yes,no,1.5\n"a ""b""","c\nd",e,\n',
    }
    for seed, (name, data) in enumerate(texts.items()):
        path = tmp_path / name

        def read(data: bytes, path: Path = path) -> str:
            path.write_bytes(data)
            try:
                rows = load_preferences(str(path))
            except AlignkitError as error:
                return refused(error)
            assert len(list(rows)) > 0
            return "read"

        # Building a table takes longer than reading the file.
        try_inputs(damage(data, examples // 3, 10 + seed), read, tally, seconds=3.0)
    assert min(tally["refused"], tally["read"]) > examples // 20
