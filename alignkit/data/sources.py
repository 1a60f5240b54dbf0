"""Preference data by name: the embedded demo set, a local file or folder, or a dataset of the Hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset, ReadInstruction

from alignkit.data import files
from alignkit.data.data_folders import check_data_folder, check_parquet
from alignkit.errors import DataError, nearest

DEMO_FILE = Path(__file__).parent / "demo" / "preferences.jsonl"
DEMO_SET = "alignkit's embedded preferences"
EXTENSIONS = (".json", ".jsonl", ".csv", ".parquet")

_FILES = re.compile(r"\b(Image|Audio|Video|Pdf|Nifti|Mesh)\(")  # kinds of columns, at any depth, that name files
_SLICED = re.compile(r"^(?P<base>[^\[\]]+)(?P<slice>\[[^\[\]]*\])?$")


def load_preferences(
    name_or_path: str, *, split: str = "train", streaming: bool = False, config_name: str | None = None
) -> Dataset | IterableDataset:
    """Load rows by name or path.

    Args:
        name_or_path: "demo" for the embedded set, a .json, .jsonl, .csv or .parquet file, a folder made by
            `save_to_disk`, a folder of data files, or a dataset id of the Hub.
        split: a split, also with a slice ("train[:1600]", "train[-300:]", "test[:10%]"). A single file has no splits:
            only the slice counts.
        streaming: read rows when they are needed; slices then may not count from the end.
        config_name: the configuration of a Hub dataset.

    Raises:
        DataError: nothing there, nothing in it, or nothing that can be read; the message says where and what to do.
    """
    base, cut = _parse_split(split)
    path = Path(name_or_path).expanduser()
    if name_or_path == "demo":
        return _named(_sliced_rows(_demo_rows(base), cut, streaming, "demo"), f"{DEMO_SET}, {split}")
    if path.is_file():
        return _named(_load_file(path, cut, streaming), " ".join(filter(None, (path.name, cut))))
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            return _named(_load_saved(path, base, cut, streaming), f"{path.name}, {split}")
        check_data_folder(path)
    elif _looks_like_path(name_or_path):
        raise DataError(_no_such_file(path))
    return _without_files(_load_hub(name_or_path, base, cut, streaming, config_name))


def _named(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """Let the rows say where they come from, without the folder: a run's record tells it."""
    dataset.info.dataset_name = name
    return _without_files(dataset)


def _without_files(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    # Pictures and sounds are files that a row names, anywhere on this machine, and reading the row would open them.
    features = dataset.features or {}
    opened = [column for column, kind in features.items() if _FILES.search(repr(kind))]
    if opened and isinstance(dataset, IterableDataset):  # which decodes rows before it drops columns
        dataset = dataset.decode(False)
    return dataset.remove_columns(opened) if opened else dataset


def _parse_split(split: str) -> tuple[str, str]:
    match = _SLICED.match(split.strip())
    if match is None:
        raise DataError(f"split {split!r} cannot be read; write for example 'train', 'train[:1600]' or 'train[-300:]'.")
    return match["base"], match["slice"] or ""


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") > 1
        or Path(name).suffix.lower() in (*EXTENSIONS, ".txt", ".gz", ".zip", ".tsv", ".yaml", ".xlsx")
    )


def _no_such_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"No such file or folder: {path} (the folder {path.parent} does not exist either)."
    hint = nearest(path.name, (entry.name for entry in path.parent.iterdir()))
    return f"No such file or folder: {path}.{hint}"


def _demo_rows(split: str) -> list[dict[str, Any]]:
    if not DEMO_FILE.is_file():
        raise DataError(f"The embedded preference set is missing ({DEMO_FILE}): install alignkit again.")
    rows = [row for _, row in files.json_rows(DEMO_FILE)]
    splits = sorted({row["split"] for row in rows})
    if split not in splits:
        raise DataError(f"demo has no split {split!r}, only {splits}.{nearest(split, splits)}")
    return [_demo_row(row) for row in rows if row["split"] == split]


def _demo_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a conversation: the set is for chat models, which as plain text would be continued, not answered."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    messages = {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}
    return {"id": row["id"], "category": row["category"], **messages}


def _load_file(path: Path, cut: str, streaming: bool) -> Dataset | IterableDataset:
    extension = path.suffix.lower()
    if extension not in EXTENSIONS:
        raise DataError(f"{path}: files that end in {extension or 'nothing'!r} are not read; use one of {EXTENSIONS}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty.")
    if streaming and extension in (".json", ".jsonl"):
        return _sliced_stream(_json_stream(path), cut, str(path))
    if extension in (".json", ".jsonl"):
        dataset = _rows_to_dataset([row for _, row in files.json_rows(path)], str(path))
    elif extension == ".csv":
        dataset = _rows_to_dataset(list(files.csv_rows(path)), str(path))
    else:
        dataset = _read_parquet(path)
    if len(dataset) == 0:
        raise DataError(f"{path} has no rows.")
    dataset = _sliced(dataset, cut, str(path))
    return dataset.to_iterable_dataset() if streaming else dataset


def _json_stream(path: Path) -> IterableDataset:
    next(files.json_rows(path), None)  # an unreadable file is an error now, not at the first step
    return IterableDataset.from_generator(_stream_json, gen_kwargs={"path": str(path)})


def _stream_json(path: str) -> Iterator[dict[str, Any]]:
    for _, row in files.json_rows(Path(path)):
        yield row


def _rows_to_dataset(rows: list[dict[str, Any]], origin: str) -> Dataset:
    """A dataset of all columns that occur. Values of mixed types stay as they are; texts that are not Unicode are None.

    It lies in the datasets cache under its content, because only datasets on disk have their `map` results cached.
    """
    if not rows:
        raise DataError(f"{origin} has no rows.")
    columns = dict.fromkeys(column for row in rows for column in row)
    full = [{column: files.without_surrogates(row.get(column)) for column in columns} for row in rows]
    try:
        in_memory = Dataset.from_list(full, on_mixed_types="use_json")
        content = hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest()[:32]
        return Dataset.from_generator(partial(iter, full), features=in_memory.features, fingerprint=content)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{origin}: the rows do not fit into one table: {error}") from error


def _read_parquet(path: Path) -> Dataset:
    check_parquet(path)
    try:
        return Dataset.from_parquet(str(path))
    except Exception as error:  # datasets wraps whatever the reader raised in errors of its own
        raise DataError(f"{path} is not a Parquet file that can be read: {_reason(error)}") from error


def _load_saved(path: Path, base: str, cut: str, streaming: bool) -> Dataset | IterableDataset:
    check_data_folder(path)
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} was made by save_to_disk but cannot be read: {_reason(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if base not in loaded:
            raise DataError(f"{path} has no split {base!r}, only {sorted(loaded)}.{nearest(base, map(str, loaded))}")
        loaded = loaded[base]
    loaded = _sliced(loaded, cut, str(path))
    return loaded.to_iterable_dataset() if streaming else loaded


def _load_hub(name: str, base: str, cut: str, streaming: bool, config_name: str | None) -> Dataset | IterableDataset:
    try:
        loaded = datasets.load_dataset(name, config_name, split=base, streaming=streaming)
    except Exception as error:  # the Hub's client raises errors of many libraries; the original stays chained
        raise DataError(
            f"{name!r} is neither a local file or folder nor a dataset that could be loaded from the Hub "
            f"(split {base!r}): {_reason(error)}"
        ) from error
    if isinstance(loaded, IterableDataset):
        return _sliced_stream(loaded, cut, name)
    return _sliced(loaded, cut, name)


def _sliced_rows(rows: list[dict[str, Any]], cut: str, streaming: bool, origin: str) -> Dataset | IterableDataset:
    dataset = _sliced(_rows_to_dataset(rows, origin), cut, origin)
    return dataset.to_iterable_dataset() if streaming else dataset


def _sliced(dataset: Dataset, cut: str, origin: str) -> Dataset:
    if not cut:
        return dataset
    try:
        (part,) = ReadInstruction.from_spec(f"rows{cut}").to_absolute({"rows": len(dataset)})
    except (ValueError, AssertionError) as error:
        raise DataError(f"{origin}: the slice {cut} cannot be taken of {len(dataset)} rows: {error}") from error
    start, stop = part.from_ or 0, len(dataset) if part.to is None else part.to
    if start >= stop:
        raise DataError(f"{origin}: the slice {cut} of {len(dataset)} rows is empty.")
    return dataset.select(range(start, stop))


def _sliced_stream(stream: IterableDataset, cut: str, origin: str) -> IterableDataset:
    if not cut:
        return stream
    match = re.fullmatch(r"\[(\d*):(\d*)\]", cut.replace(" ", ""))
    if match is None:
        raise DataError(f"{origin}: a stream's length is not known, so the slice {cut} cannot be taken; use [a:b].")
    start, stop = int(match[1] or 0), int(match[2]) if match[2] else None
    if stop is not None and stop <= start:
        raise DataError(f"{origin}: the slice {cut} is empty.")
    stream = stream.skip(start) if start else stream
    return stream if stop is None else stream.take(stop - start)


def _reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no further message'}"
