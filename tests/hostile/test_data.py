"""Data from strangers: files, folders, tables, and texts that are made to be shown."""

from __future__ import annotations

import gzip
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, Features, Image

from alignkit.data.sources import load_preferences
from alignkit.hub.identity import _card_facts
from alignkit.hub.plain_card import read_card
from tests.hostile.harness import MARKER, Attack, attempt, bare_pickle, deep, hostile_archive, refuse, sparse
from tests.tiny_preferences import text_rows

pytestmark = pytest.mark.timeout(60)


def written(name: str, content: bytes | str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / name

    return make


def zeros(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        sparse(folder / name, 2**42)
        return folder / name

    return make


def list_of_zeros(folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_bytes(b"[")
    with path.open("r+b") as file:
        file.truncate(2**42)
    return path


def pipe(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        os.mkfifo(folder / name)
        return folder / name

    return make


def parquet_bomb(folder: Path) -> Path:
    """Ten million equal rows in a few kilobytes."""
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(10**7, np.int8)), pyarrow.array(["a"]))
    table = pyarrow.table({"prompt": column, "chosen": column, "rejected": column})
    with pyarrow.parquet.ParquetWriter(folder / "rows.parquet", table.schema) as writer:
        writer.write_table(table, row_group_size=10**7)
    return folder / "rows.parquet"


def script_alone(folder: Path) -> Path:
    (folder / "data").mkdir()
    (folder / "data" / "data.py").write_text(f"import os\nos.mkdir({str(MARKER)!r})\n")
    return folder / "data"


def data_folder(spoil: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        inside = folder / "data"
        inside.mkdir()
        (inside / "train.jsonl").write_text("\n".join(json.dumps(row) for row in text_rows(4)))
        spoil(inside)
        return inside

    return make


def saved(spoil: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        Dataset.from_list(text_rows(4)).save_to_disk(folder / "saved")
        spoil(folder / "saved")
        return folder / "saved"

    return make


def card(data_files: str) -> Callable[[Path], Any]:
    text = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {data_files}\n---\n"
    return lambda folder: (folder / "README.md").write_text(text)


def state(**changes: Any) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        path = folder / "state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def bomb(header: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "README.md").write_text(f"---\n{header}\n---x\n---\n")


def packed(name: str) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        zeros = bytes(10**7)
        if name.endswith(".zip"):
            with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("rows.jsonl", zeros * 60, compresslevel=1)
        else:
            (folder / name).write_bytes(gzip.compress(zeros) * 60)

    return spoil


merges = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n" for level in range(1, 10)
)

REFUSED: dict[str, Attack] = {
    "a row nested 100,000 deep": Attack(written("r.jsonl", deep()), r"r\.jsonl, line 1 is nested too deep"),
    "a list nested 100,000 deep": Attack(written("r.json", "[" * 10**5 + "]" * 10**5), r"r\.json is nested too deep"),
    "a line of 4 TB": Attack(zeros("r.jsonl"), r"r\.jsonl, line 1 has 268,435,456 bytes or more"),
    "a list of 4 TB": Attack(list_of_zeros, r"rows\.json is one JSON list of 4,398,046,511,104 bytes"),
    "a table of 4 TB": Attack(zeros("r.csv"), r"r\.csv, line 1 has 268,435,456 bytes or more"),
    "not UTF-8": Attack(written("r.jsonl", b'{"prompt": "\xff"}'), r"r\.jsonl is not UTF-8: byte 0xff"),
    "empty": Attack(written("r.jsonl", b""), r"r\.jsonl is empty"),
    "a pickle named as rows": Attack(written("r.jsonl", bare_pickle()), r"r\.jsonl"),
    "a pickle named as a table": Attack(written("r.parquet", hostile_archive()), r"r\.parquet is not a Parquet file"),
    "a pickle": Attack(written("r.pkl", bare_pickle()), r"files that end in '\.pkl' are not read"),
    "a pipe": Attack(pipe("r.jsonl"), r"r\.jsonl"),
    "a folder named as a file": Attack(lambda f: (f / "r.jsonl").mkdir() or f / "r.jsonl", r"r\.jsonl"),
    "Parquet bomb": Attack(parquet_bomb, r"has 10,000,000 rows in [\d,]+ bytes: it would fill the disk"),
    "a card that names /etc/passwd": Attack(data_folder(card("/etc/passwd")), r"README\.md names .*'/etc/passwd'"),
    "a card that climbs": Attack(data_folder(card("../outside/*.json")), r"README\.md names .*'\.\./outside/\*\.json'"),
    "a card of aliases": Attack(
        data_folder(lambda f: (f / "README.md").write_text("---\na: " + "[" * 5000 + "\n---\n")), r"README\.md"
    ),
    "a card that merges what it repeats": Attack(
        data_folder(bomb(merges)), r"header of .*README\.md .*merges mappings"
    ),
    "a card with a number in base 60": Attack(data_folder(bomb("a: 1" + ":10" * 10**5)), r"plain word of 300,001 char"),
    "rows that become 600 MB": Attack(data_folder(packed("more.jsonl.gz")), r"more\.jsonl\.gz becomes [\d,]+ bytes or"),
    "an archive that becomes 600 MB": Attack(data_folder(packed("more.zip")), r"more\.zip becomes 600,000,000 bytes"),
    "rows that are packed and torn": Attack(
        data_folder(lambda f: (f / "more.gz").write_bytes(gzip.compress(bytes(99))[:-9])), r"gz cannot be unpacked"
    ),
    "a link out among the data": Attack(
        data_folder(lambda f: (f / "more.txt").symlink_to("/etc/passwd")), r"more\.txt' is a link out of its folder"
    ),
    "a folder that is a link out": Attack(
        data_folder(lambda f: (f / "more").symlink_to("/etc")), r"more' is (a folder|a link out)"
    ),
    "a pipe among the data": Attack(data_folder(lambda f: os.mkfifo(f / "more.jsonl")), r"more\.jsonl' is a pipe"),
    "a saved set that names /etc/passwd": Attack(
        saved(state(_data_files=[{"filename": "/etc/passwd"}])), r"state\.json names .*'/etc/passwd'"
    ),
    "a saved set that climbs": Attack(
        saved(state(_data_files=[{"filename": "../../outside/secret.json"}])), r"state\.json names .*outside/secret"
    ),
    "a saved set nested deep": Attack(
        saved(lambda f: (f / "state.json").write_text(deep())), r"state\.json' nests 100,001 deep"
    ),
    "a saved set whose rows are a pickle": Attack(
        saved(lambda f: next(f.glob("*.arrow")).write_bytes(hostile_archive())), r"saved was made by save_to_disk but"
    ),
    "a script alone": Attack(script_alone, r"data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_data_is_refused(name: str, tmp_path: Path, outside: Path):
    attack = REFUSED[name]
    path = attack.spoil(tmp_path)
    text = refuse(lambda: load_preferences(str(path)))
    assert re.search(str(attack.message), text), text


def test_good_folders_load(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert attempt(lambda: load_preferences(str(data_folder(card("train.jsonl"))(tmp_path / "a")))) is None
    assert attempt(lambda: load_preferences(str(saved(lambda folder: None)(tmp_path / "b")))) is None


@pytest.mark.parametrize("header", [merges, "a: 1" + ":10" * 10**5], ids=["merges", "base 60"])
def test_cards_of_models_do_not_hang_either(header: str, tmp_path: Path):
    bomb(header)(tmp_path)
    card, place = tmp_path / "README.md", {"hub_id": None, "revision": None}
    assert attempt(lambda: _card_facts(str(tmp_path), place)) is None
    assert "cannot be read" in refuse(lambda: read_card(card))


def test_set_in_the_hubs_cache_loads_through_its_links(tmp_path: Path):
    cache = tmp_path / "datasets--some--rows"
    snapshot = cache / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "b").write_text("\n".join(json.dumps(row) for row in text_rows(4)))
    (snapshot / "train.jsonl").symlink_to("../../blobs/b")
    assert len(load_preferences(str(snapshot))) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_that_rows_name_are_not_opened(streaming: bool, tmp_path: Path):
    rows = text_rows(4)
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    texts = Dataset.from_dict(columns).features
    columns["images"] = [{"path": "/etc/passwd", "bytes": None}] * 4
    Dataset.from_dict(columns, features=Features({**texts, "images": Image()})).to_parquet(tmp_path / "rows.parquet")
    loaded = load_preferences(str(tmp_path / "rows.parquet"), streaming=streaming)
    assert next(iter(loaded)) == rows[0]


def test_a_column_of_one_value_is_no_bomb(tmp_path: Path):
    table = pyarrow.table({name: ["same"] * 20_000 for name in ("prompt", "chosen", "rejected")})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert len(load_preferences(str(tmp_path / "rows.parquet"))) == 20_000
