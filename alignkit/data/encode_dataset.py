"""Whole datasets through an encoder of rows, with what became of every row counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

from datasets import Dataset, Features, Value

from alignkit.data.encode_rows import Prepared
from alignkit.data.reasons import DropReason
from alignkit.data.report import PreparationReport
from alignkit.errors import DataError

BATCH_ROWS = 1000
_REPORT_FEATURES = {
    "_reason": Value("string"),
    "_detail": Value("string"),
    "_truncated": Value("int32"),
    "_eos_lost": Value("bool"),
    "_not_prefix": Value("bool"),
}


class Encoder(Protocol):
    """Encodes batches of rows. It must pickle: datasets hashes it for its cache and sends it to processes."""

    @property
    def features(self) -> dict[str, Any]:
        """The columns of the result, `row_id` and those of the examples, with their types."""
        ...

    @property
    def parts(self) -> dict[str, str]:
        """What the report calls the columns whose lengths it counts."""
        ...

    @property
    def examples_per_row(self) -> int:
        """Examples that one input row gives."""
        ...

    def encode(self, rows: Sequence[Mapping[str, Any]], row_ids: Sequence[int]) -> list[Prepared]:
        """Encode one batch; every row gives one `Prepared`, in order."""
        ...


def columns_of(dataset: Dataset | Sequence[Mapping[str, Any]] | Mapping[Any, Any], name: str) -> list[str]:
    """Return the column names of a dataset or a list of dicts.

    Raises:
        DataError: no dataset, a dict of datasets or of columns, no rows, or a row that is not a dict.
    """
    if isinstance(dataset, Mapping):
        names = sorted(map(str, dataset))
        if any(isinstance(part, list | tuple) for part in dataset.values()):
            raise DataError(f"{name}: a dict of columns {names}; make a dataset of it with Dataset.from_dict.")
        raise DataError(f"{name}: a dict of datasets {names}; give one of them.")
    if isinstance(dataset, str | bytes) or not isinstance(dataset, Dataset | Sequence):
        raise DataError(
            f"{name}: a dataset is a datasets.Dataset or a list of dicts, and this is a {type(dataset).__name__}. Read "
            "a file with datasets.load_dataset."
        )
    if len(dataset) == 0:
        raise DataError(f"{name}: the dataset has no rows.")
    if isinstance(dataset, Dataset):
        return dataset.column_names
    for index, row in enumerate(dataset):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}: row {index} is a {type(row).__name__}, not a dict of columns.")
    return list(dict.fromkeys(chain.from_iterable(dataset)))


def encode_dataset(
    dataset: Dataset | Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    encoder: Encoder,
    report: PreparationReport,
    num_proc: int | None,
) -> tuple[Dataset, list[int]]:
    """Encode these columns of all rows and fill the report.

    Returns:
        The columns of `encoder.features` with `examples_per_row` rows for each input row, dropped rows included, and
        the indices of those to keep.
    """
    features = Features({**encoder.features, **_REPORT_FEATURES, **dict.fromkeys(_lengths(encoder), Value("int32"))})
    if isinstance(dataset, Dataset):
        encoded = (
            dataset.with_format(None)
            .select_columns(list(columns))
            .map(
                _map_batch,
                fn_kwargs={"encoder": encoder},
                batched=True,
                batch_size=BATCH_ROWS,
                with_indices=True,
                remove_columns=list(columns),
                features=features,
                num_proc=num_proc,
                desc=f"Tokenizing {report.name}",
            )
        )
    else:
        # Not through Arrow, which refuses columns of mixed types.
        rows = [{column: row.get(column) for column in columns} for row in dataset]
        starts = range(0, len(rows), BATCH_ROWS)
        parts = [encoder.encode(rows[i : i + BATCH_ROWS], range(len(rows))[i : i + BATCH_ROWS]) for i in starts]
        encoded = Dataset.from_dict(_as_columns(list(chain.from_iterable(parts)), encoder), features=features)
    return encoded.select_columns(list(encoder.features)), _count(encoded, report, encoder)


def as_row(row: Prepared, example: Mapping[str, Any], encoder: Encoder) -> dict[str, Any]:
    """Return the columns of the result for one example."""
    return {**{column: example.get(column) for column in encoder.features}, "row_id": row.row_id}


def _map_batch(batch: Mapping[str, list[Any]], indices: list[int], encoder: Encoder) -> dict[str, list[Any]]:
    columns = {column: batch[column] for column in batch}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return _as_columns(encoder.encode(rows, indices), encoder)


def _as_columns(prepared: Sequence[Prepared], encoder: Encoder) -> dict[str, list[Any]]:
    """Columns with `examples_per_row` rows for each input row; a dropped row keeps its place, with a reason."""
    lengths = _lengths(encoder)
    columns: dict[str, list[Any]] = {column: [] for column in (*encoder.features, *_REPORT_FEATURES, *lengths)}
    for row in prepared:
        for example in row.examples or [{}] * encoder.examples_per_row:
            values = {
                **as_row(row, example, encoder),
                "_reason": row.reason,
                "_detail": row.detail,
                "_truncated": row.truncated,
                "_eos_lost": row.eos_lost,
                "_not_prefix": row.not_prefix,
                **{length: len(example.get(column, [])) for length, column in lengths.items()},
            }
            for column, value in values.items():
                columns[column].append(value)
    return columns


def _lengths(encoder: Encoder) -> dict[str, str]:
    """Columns for the report's lengths, and the columns whose lengths they hold."""
    return {f"_{part}": column for part, column in encoder.parts.items()}


def _count(encoded: Dataset, report: PreparationReport, encoder: Encoder) -> list[int]:
    """Fill the report from the columns that the encoder left, cached or not; return the indices to keep."""
    table = encoded.select_columns(["row_id", *_REPORT_FEATURES, *_lengths(encoder)])[:]
    step, kept = encoder.examples_per_row, []
    for i in range(0, len(encoded), step):
        row_id, reason = table["row_id"][i], table["_reason"][i]
        if reason:
            report.drop(row_id, DropReason(reason), table["_detail"][i])
            continue
        kept.extend(range(i, i + step))
        report.keep(
            row_id,
            {part: table[f"_{part}"][i : i + step] for part in encoder.parts},
            truncated=table["_truncated"][i],
            eos_lost=table["_eos_lost"][i],
            not_prefix=table["_not_prefix"][i],
        )
    return kept
