"""Files that cannot be read: each error names the file, the place in it and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.data.sources import load_preferences
from alignkit.errors import DataError

ROW = b'{"prompt": "hi", "chosen": "yes", "rejected": "no"}\n'

# name: (file name, content, what the message says after the path)
FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("rows.jsonl", b"", " is empty."),
    "empty json": ("rows.json", b"", " is empty."),
    "empty csv": ("rows.csv", b"", " is empty."),
    "blank lines": ("rows.jsonl", b"\n\n  \n", " has no rows."),
    "empty list": ("rows.json", b"[]", " has no rows."),
    "header only": ("rows.csv", b"prompt,chosen,rejected\n", " has no rows."),
    "bad line": (
        "rows.jsonl",
        ROW + ROW + b'{"prompt": "hi", "chosen"\n' + ROW,
        ", line 3 is not valid JSON: Expecting ':'",
    ),
    "bad line shown": ("rows.jsonl", ROW + b"prompt: hi\n", "the line starts 'prompt: hi\\n'"),
    "two objects": ("rows.jsonl", ROW + ROW.strip() + ROW, ", line 2 is not valid JSON: Extra data"),
    "bad list": (
        "rows.json",
        b"[" + ROW + b"," + ROW + b',\n{"a" 1}]',
        " is not valid JSON: Expecting ':' delimiter: line 4",
    ),
    "unfinished list": ("rows.json", b"[" + ROW, " is not valid JSON: Expecting ',' delimiter: line 2"),
    "one spread object": ("rows.json", b'{\n"train": [\n' + ROW + b"]}", ", line 1 is not valid JSON"),
    "hint for an object": ("rows.json", b'{\n"train": []}', "is the file one JSON object? A list of rows is expected"),
    "list nested deep": ("rows.json", b"[" * 100_000, " is nested too deep to be read"),
    "line nested deep": ("rows.jsonl", ROW + b'{"a":' * 100_000, ", line 2 is nested too deep to be read"),
    "row a list": ("rows.jsonl", ROW + b'["hi", "yes"]\n', ", line 2: a list where an object with columns is expected"),
    "row a number": ("rows.json", b'[{"prompt": "hi"}, 7]', ", item 2: a int where an object with columns is expected"),
    "latin-1": (
        "rows.jsonl",
        ROW + b'{"prompt": "caf\xe9"}\n',
        f" is not UTF-8: byte 0xe9 at offset {len(ROW) + 15} (line 2)",
    ),
    "latin-1 in a list": ("rows.json", b'[\n{"prompt": "caf\xe9"}]', " is not UTF-8: byte 0xe9 at offset 17 (line 2)"),
    "latin-1 csv": (
        "rows.csv",
        b"prompt,chosen,rejected\ncaf\xe9,b,c\n",
        " is not UTF-8: byte 0xe9 at offset 26 (line 2)",
    ),
    "utf-16": (
        "rows.jsonl",
        ROW.decode().encode("utf-16"),
        "offset 0 (line 1). It looks like UTF-16. Save the file as UTF-8",
    ),
    "csv quotes": (
        "rows.csv",
        b'prompt,chosen,rejected\n"hi,yes,no\n',
        ", line 2 is not valid CSV: unexpected end of data",
    ),
    "csv fields": ("rows.csv", b"prompt,chosen,rejected\nhi,yes,no,more\n", ", line 2: more fields than the header's"),
    "not parquet": ("rows.parquet", b"PAR0 nothing", " is not a Parquet file that can be read"),
    "unsupported": ("rows.txt", ROW, ": files that end in '.txt' are not read; use one of ('.json', '.jsonl'"),
    "no extension": ("rows", ROW, ": files that end in 'nothing' are not read"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_an_error_that_says_where(name: str, tmp_path: Path) -> None:
    file_name, content, message = FILES[name]
    path = tmp_path / file_name
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_preferences(str(path))
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["empty", "blank lines", "latin-1", "bad line", "row a list"])
def test_a_bad_file_is_an_error_for_streams_too(name: str, tmp_path: Path) -> None:
    file_name, content, message = FILES[name]
    path = tmp_path / file_name
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)):
        list(load_preferences(str(path), streaming=True))


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "preferences.jsonl").write_bytes(ROW)
    with pytest.raises(
        DataError, match=r"No such file or folder: .*preference\.jsonl\. Did you mean 'preferences\.jsonl'\?"
    ):
        load_preferences(str(tmp_path / "preference.jsonl"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the folder .*nowhere does not exist either"):
        load_preferences(str(tmp_path / "nowhere" / "rows.jsonl"))


def save_dict(folder: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"prompt": "hi", "chosen": "yes", "rejected": "no"}])
    DatasetDict({"train": rows, "test": rows}).save_to_disk(folder)


def break_saved(folder: Path) -> None:
    save_dict(folder)
    (folder / "train" / "state.json").unlink()


def empty_folder(folder: Path) -> None:
    folder.mkdir()


@pytest.mark.parametrize(
    ("make", "split", "message"),
    [
        (save_dict, "tests", "has no split 'tests', only ['test', 'train']. Did you mean 'test'?"),
        (break_saved, "train", "was made by save_to_disk but cannot be read"),
        (empty_folder, "train", "is neither a local file or folder nor a dataset that could be loaded"),
    ],
)
def test_a_bad_folder(make: Callable[[Path], None], split: str, message: str, tmp_path: Path) -> None:
    make(tmp_path / "folder")
    with pytest.raises(DataError, match=re.escape(message)):
        load_preferences(str(tmp_path / "folder"), split=split)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[", "split 'train[' cannot be read; write for example 'train', 'train[:1600]'"),
        ("", "split '' cannot be read"),
        ("train[:x]", "the slice [:x] cannot be taken of 3 rows"),
        ("train[2:2]", "the slice [2:2] of 3 rows is empty"),
    ],
)
def test_a_bad_slice(split: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(ROW * 3)
    with pytest.raises(DataError, match=re.escape(message)):
        load_preferences(str(tmp_path / "rows.jsonl"), split=split)


@pytest.mark.parametrize("cut", ["[-2:]", "[:50%]", "[x]"])
def test_streams_have_no_end_to_count_from(cut: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(ROW * 3)
    with pytest.raises(DataError, match=re.escape(f"so the slice {cut} cannot be taken; use [a:b]")):
        load_preferences(str(tmp_path / "rows.jsonl"), split=f"train{cut}", streaming=True)


def test_a_hub_that_cannot_be_reached_is_a_short_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        try:
            raise OSError("no route to host\nmany more lines")
        except OSError as error:
            raise ConnectionError("Couldn't reach the Hub") from error

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataError, match="'org/rows' is neither a local file") as caught:
        load_preferences("org/rows")
    assert str(caught.value).endswith("(split 'train'): OSError: no route to host")
    assert isinstance(caught.value.__cause__, ConnectionError)
