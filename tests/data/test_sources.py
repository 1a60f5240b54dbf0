"""What can be loaded, and by which name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from alignkit.data import sources
from alignkit.data.prepare import prepare_preferences
from alignkit.data.sources import load_preferences
from alignkit.errors import DataError

ROWS = [{"prompt": f"p{i}", "chosen": "yes 🙂", "rejected": "no"} for i in range(10)]


def write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8-sig")
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet", "saved"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_file(name: str, streaming: bool, tmp_path: Path) -> None:
    loaded = load_preferences(write(tmp_path / name, ROWS), streaming=streaming)
    assert isinstance(loaded, IterableDataset if streaming else Dataset)
    assert list(loaded) == ROWS
    assert list(load_preferences(str(tmp_path / name), split="train[2:4]", streaming=streaming)) == ROWS[2:4]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ROWS),
        ("test", ROWS),  # a file has no splits
        ("train[:4]", ROWS[:4]),
        ("train[-3:]", ROWS[-3:]),
        ("train[4:6]", ROWS[4:6]),
        ("train[:20%]", ROWS[:2]),
    ],
)
def test_slices_of_a_file(split: str, expected: list[dict], tmp_path: Path) -> None:
    assert list(load_preferences(write(tmp_path / "rows.jsonl", ROWS), split=split)) == expected


def test_splits_of_a_saved_dict(tmp_path: Path) -> None:
    both = DatasetDict({"train": Dataset.from_list(ROWS[:6]), "test": Dataset.from_list(ROWS[6:])})
    both.save_to_disk(tmp_path / "both")
    assert list(load_preferences(str(tmp_path / "both"), split="test[:2]")) == ROWS[6:8]


def test_the_demo_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"id": f"r{i}", "category": "help", **row, "split": "test" if i > 6 else "train"} for i, row in enumerate(ROWS)
    ]
    write(tmp_path / "demo.jsonl", rows)
    monkeypatch.setattr(sources, "DEMO_FILE", tmp_path / "demo.jsonl")
    assert [row["id"] for row in load_preferences("demo")] == [f"r{i}" for i in range(7)]
    prompts = [row["prompt"] for row in load_preferences("demo", split="test[-2:]")]
    assert prompts == [[{"role": "user", "content": name}] for name in ("p8", "p9")]
    assert [row["id"] for row in load_preferences("demo", split="test", streaming=True)] == ["r7", "r8", "r9"]
    with pytest.raises(DataError, match=r"demo has no split 'tran', only \['test', 'train'\]\. Did you mean 'train'\?"):
        load_preferences("demo", split="tran")


def test_rows_of_mixed_types_and_columns_can_be_loaded_and_are_dropped(tmp_path: Path, word_tokenizer) -> None:
    good = {"prompt": "hi ", "chosen": "yes ", "rejected": "no "}
    rows = [
        good,
        {**good, "chosen": 7},
        {**good, "chosen": "\ud83d"},
        {"prompt": "hi ", "chosen": "yes "},
        {**good, "id": 3},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loaded = load_preferences(str(path))
    _, report = prepare_preferences(loaded, word_tokenizer, max_length=8, max_drop_fraction=0.6)
    assert {reason.value: count.row_ids for reason, count in report.drops.items()} == {"not text": [1, 2, 3]}
    stream = load_preferences(str(path), streaming=True)
    prepared, streamed = prepare_preferences(stream, word_tokenizer, max_length=8, max_drop_fraction=0.6)
    assert [row["row_id"] for row in prepared] == [0, 4]
    assert streamed.drops.keys() == report.drops.keys()


def test_tools_of_different_shapes_stay_apart(tmp_path: Path) -> None:
    rows = [{"tools": [{"name": "f", "x": {"a": 1}}]}, {"tools": [{"name": "g", "x": "text"}]}]
    assert list(load_preferences(write(tmp_path / "rows.json", rows))) == rows


def test_answers_that_look_like_values_stay_text_in_csv(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected,weight\n1,None,NA,0.5\n2,4,,1\n", encoding="utf-8")
    assert list(load_preferences(str(tmp_path / "rows.csv"))) == [
        {"prompt": "1", "chosen": "None", "rejected": "NA", "weight": 0.5},
        {"prompt": "2", "chosen": "4", "rejected": "", "weight": 1.0},
    ]


def test_long_fields_in_csv(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"prompt,chosen,rejected\na,{'x' * 200_000},b\n", encoding="utf-8")
    assert len(load_preferences(str(tmp_path / "rows.csv"))[0]["chosen"]) == 200_000


def test_a_file_loaded_twice_has_one_fingerprint(tmp_path: Path, word_tokenizer, monkeypatch) -> None:
    rows = [{"prompt": "hi ", "chosen": "yes ", "rejected": "no "}]
    path = write(tmp_path / "rows.jsonl", rows)
    prepare_preferences(load_preferences(path), word_tokenizer, max_length=8)
    monkeypatch.setattr("alignkit.data.tokenize.RecordTokenizer.encode", None)  # a second run must not need it
    prepared, _ = prepare_preferences(load_preferences(path), word_tokenizer, max_length=8)
    assert len(prepared) == 1


def test_real_files(shared_data: Path, smol_tokenizer) -> None:
    hh = load_preferences(str(shared_data / "hh_harmless_train.jsonl"), split="train[-300:]")
    prepared, report = prepare_preferences(hh, smol_tokenizer, max_length=1024)
    assert (len(hh), report.rows_in) == (300, 300)
    assert report.rows_kept == len(prepared) >= 295
    kto = load_preferences(str(shared_data / "kto_en_demo.json"))
    prepared, report = prepare_preferences(kto, smol_tokenizer, max_length=8192, unpaired=True)
    assert report.rows_kept == len(prepared) == 300
    assert sum(prepared["label"]) == sum(row["label"] for row in kto)
