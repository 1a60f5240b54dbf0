"""Folders and tables of data from strangers: no file outside, and no billions of rows out of a few bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

from alignkit.data.front_matter import front_matter, safe_values
from alignkit.data.packed_files import check_packed
from alignkit.data.plain_files import check_regular, leaves_folder, read_bytes, read_json_object
from alignkit.errors import DataError

_CARD = "README.md"
_MAX_CARD_BYTES = 4 * 2**20
_STATES = ("state.json", "dataset_info.json", "dataset_dict.json")
# A column of one value repeated takes next to nothing on disk, and all of its length in memory and in the cache.
_MANY_CELLS = 10**7
_CELLS_PER_BYTE = 20


def check_data_folder(folder: Path) -> None:
    """Look over a folder of data files, or one made by `save_to_disk`, before `datasets` reads it.

    Raises:
        DataError: a link out of the folder, a packed file that is a bomb, or a card or state that names files outside.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            check_regular(path, folder=folder)
            check_packed(path)
    for name in (name for state in _STATES for name in folder.rglob(state)):
        _check_names(_strings(read_json_object(name, folder=folder), ("filename", "data_files")), name)
    card = folder / _CARD
    if card.is_file():
        _check_names(_strings(_front_matter(card), ("data_files", "data_dir", "path")), card)


def check_parquet(path: Path) -> None:
    """See that a Parquet file's rows are in proportion to its bytes.

    Raises:
        DataError: not a Parquet file, or a bomb.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows, columns = file.metadata.num_rows, file.metadata.num_columns
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {str(error).splitlines()[0]}") from error
    cells = rows * max(columns, 1)
    if cells > _MANY_CELLS and cells > _CELLS_PER_BYTE * path.stat().st_size:
        raise DataError(
            f"{path} says that it has {rows:,} rows in {path.stat().st_size:,} bytes: it would fill the disk. Do not "
            "use it."
        )


def _front_matter(card: Path) -> Any:
    text = read_bytes(card, max_bytes=_MAX_CARD_BYTES).decode("utf-8", "replace")
    try:
        return safe_values(front_matter(text))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"the header of {card} cannot be read: {str(error).splitlines()[0]}. Remove it.") from error


def _strings(content: Any, keys: tuple[str, ...]) -> Iterator[str]:
    """Texts at any depth under one of `keys`."""
    waiting: list[tuple[Any, bool]] = [(content, False)]
    seen: set[int] = set()
    while waiting:
        found, counts = waiting.pop()
        if isinstance(found, str):
            if counts:
                yield found
        elif isinstance(found, dict | list) and id(found) not in seen:  # YAML may hold a part many times
            seen.add(id(found))
            items = found.items() if isinstance(found, dict) else ((None, each) for each in found)
            waiting += [(value, counts or key in keys) for key, value in items]


def _check_names(names: Iterator[str], where: Path) -> None:
    for name in names:
        if leaves_folder(name):
            raise DataError(
                f"{where} names data outside its folder: {name!r}. Remove the entry, or copy what you want into the "
                "folder."
            )
