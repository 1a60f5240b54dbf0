"""Reading local JSON and CSV, with errors that name the line and the byte."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkit.data.records import NUMBERS
from alignkit.errors import DataError

_BOM = b"\xef\xbb\xbf"
# Of one line, and of a file that is one JSON list and so read as a whole. A sparse file has any size for nothing.
_MAX_LINE_BYTES = 256 * 2**20
_MAX_LIST_BYTES = 4 * 2**30
_MAX_FIELD_CHARACTERS = 2**31 - 1  # csv refuses more than 131,072 by default; transcripts can be longer


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) of a file with one JSON object a line, or of one JSON list of objects.

    Of a list the rows' positions, from 1, stand for line numbers.

    Raises:
        DataError: not UTF-8, not JSON, a row that is not an object, or no row at all.
    """
    with path.open("rb") as file:
        start = file.read(4096)
    text = start.removeprefix(_BOM).lstrip()
    rows = _list_rows(path) if text.startswith(b"[") else _line_rows(path)
    empty = True
    for number, row in rows:
        empty = False
        yield number, row
    if empty:
        raise DataError(f"{path} has no rows.")


def _list_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if (size := path.stat().st_size) > _MAX_LIST_BYTES:
        raise DataError(
            f"{path} is one JSON list of {size:,} bytes, which would be read as a whole. Write one row a line (.jsonl)."
        )
    text = _decode(path.read_bytes().removeprefix(_BOM), path, 0, 1)
    try:
        rows = json.loads(text)
    except RecursionError as error:
        raise DataError(f"{path} is nested too deep to be read. Rows are flat: do not use this file.") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, item {number}: a {type(row).__name__} where an object with columns is expected.")
        yield number, row


def _line_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_decoded_lines(path), start=1):
        if line.strip():
            yield number, _parse_line(line, path, number)


def _parse_line(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise DataError(f"{path}, line {number} is nested too deep to be read. Leave this row out.") from error
    except ValueError as error:
        whole = " (is the file one JSON object? A list of rows is expected, or one row a line)" if number == 1 else ""
        raise DataError(
            f"{path}, line {number} is not valid JSON: {error}; the line starts {line[:40]!a}{whole}"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: a {type(row).__name__} where an object with columns is expected.")
    return row


def csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV table with a header line; all values are text, except in numeric columns.

    Raises:
        DataError: not UTF-8, broken quotes, or more fields than the header has.
    """
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    reader = csv.DictReader(_decoded_lines(path), strict=True)
    try:
        for row in reader:
            if None in row:
                raise DataError(f"{path}, line {reader.line_num}: more fields than the header's {reader.fieldnames}.")
            yield {column: _number(value) if column in NUMBERS else value for column, value in row.items()}
    except csv.Error as error:  # the inner reader counts the lines of a row that it could not finish
        raise DataError(f"{path}, line {reader.reader.line_num} is not valid CSV: {error}") from error


def _decoded_lines(path: Path) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES), b""), start=1):
            if len(raw) == _MAX_LINE_BYTES:
                raise DataError(
                    f"{path}, line {number} has {_MAX_LINE_BYTES:,} bytes or more and is no row. Is the file damaged?"
                )
            yield _decode(raw.removeprefix(_BOM) if number == 1 else raw, path, offset, number)
            offset += len(raw)


def _number(value: str) -> float | str:
    try:
        return float(value)
    except (TypeError, ValueError):  # None where the line is too short
        return value


def _decode(raw: bytes, path: Path, offset: int, line: int) -> str:
    """Decode UTF-8; `offset` and `line` are those of the first byte."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = line + raw[: error.start].count(b"\n")
        utf16 = " It looks like UTF-16." if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start} (line {at})."
            f"{utf16} Save the file as UTF-8."
        ) from error


def without_surrogates(value: Any) -> Any:
    """Replace texts that UTF-8 cannot hold by None, at any depth: preparation then drops the row as `not text`."""
    if isinstance(value, str):
        return value if _is_unicode(value) else None
    if isinstance(value, list):
        return [without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {key: without_surrogates(item) for key, item in value.items()}
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
