"""Datasets of any known format to token ids, with every dropped or cut row counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from alignkit.data.encode_rows import LengthLimit, Prepared, RowEncoder, fit, with_mismatches
from alignkit.data.reasons import DropReason
from alignkit.data.records import NUMBERS, Kind, kind_of
from alignkit.data.report import PreparationReport
from alignkit.data.tokenize import RecordTokenizer
from alignkit.errors import DataError

_BATCH_ROWS = 1000
# A stream's share of drops is checked from this many rows on. As it is also the stream's batch, and only the last
# batch of a stream is shorter, a shorter batch is where a stream of fewer rows is checked.
_STREAM_BATCH_ROWS = 100
_REPORT_FEATURES = {
    "_reason": Value("string"),
    "_detail": Value("string"),
    "_truncated": Value("int32"),
    "_eos_lost": Value("bool"),
    "_not_prefix": Value("bool"),
    "_prompt_ids": Value("int32"),
    "_chosen_ids": Value("int32"),
    "_rejected_ids": Value("int32"),
}
_PACKED = "_row"
_ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")

Rows = Dataset | IterableDataset | Sequence[Mapping[str, Any]]


def prepare_preferences(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    drop_longer: bool = False,
    unpaired: bool = False,
    max_drop_fraction: float = 0.2,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset | IterableDataset, PreparationReport]:
    """Turn rows of any known format into token ids.

    The result has `row_id` (the row's index in the input), `prompt_ids`, `chosen_ids`, `rejected_ids`, and where the
    input has them `weight`, `margin`, `ref_chosen_logps`, `ref_rejected_logps`. With `unpaired=True`, `chosen_ids`
    is the row's completion, `label` says whether it is desirable, and `rejected_ids` is the next kept row's
    completion cut to fit (the last row takes the first's), for the KL estimate of KTO. A paired dataset then gives
    two examples a row, which take their mismatched completions from the next row's chosen and rejected.

    Args:
        dataset: a `datasets.Dataset`, an `IterableDataset` (encoded while it is read), or a list of dicts.
        tokenizer: the model's tokenizer, with a chat template if rows are conversations.
        max_length: tokens of prompt + completion; longer completions lose their end. None: no limit.
        drop_longer: drop rows with a longer completion instead, as a reward model must: it reads the end.
        unpaired: whether the loss reads single completions with labels (`loss_type="kto"`).
        max_drop_fraction: the share of rows that may be dropped; more is an error.
        num_proc: processes for a map-style dataset.
        name: what to call the dataset in messages.

    Returns:
        The prepared dataset and its report. A stream's report fills as the stream is read, in the process that
        reads it, and starts anew with every pass.

    Raises:
        DataError: columns that make no known format, vision columns, too many drops, no row kept, no row at all,
            an unpaired dataset without `unpaired=True`, labels that are all the same, or a missing chat template.
    """
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length={max_length} leaves no room for a prompt and a completion; give at least 2.")
    limit = LengthLimit(max_length, drop_longer)
    report = PreparationReport(name)
    if isinstance(dataset, IterableDataset):
        return _prepare_stream(dataset, tokenizer, report, limit, unpaired, max_drop_fraction), report
    if isinstance(dataset, Mapping):
        raise DataError(f"{name}: a dict of datasets {sorted(map(str, dataset))}; give one of them.")
    columns = dataset.column_names if isinstance(dataset, Dataset) else _columns_of(dataset, name)
    if len(dataset) == 0:
        raise DataError(f"{name}: the dataset has no rows.")
    encoder = _encoder(columns, tokenizer, limit, unpaired, name)
    if isinstance(dataset, Dataset):
        encoded = _encode_dataset(dataset, encoder, num_proc, name)
    else:
        encoded = _encode_list(dataset, columns, encoder)
    kept = _count(encoded, report, encoder)
    report.check(max_drop_fraction)
    prepared = encoded.select(kept).select_columns(list(_features(encoder)))
    if unpaired:
        _check_labels(prepared, name)
        if encoder.kind is not Kind.TOKENS:
            prepared = _add_mismatches(prepared, encoder, name)
    return prepared, report


def _encoder(
    columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: LengthLimit, unpaired: bool, name: str
) -> RowEncoder:
    kind = kind_of(columns)
    labelled_tokens = kind is Kind.TOKENS and "label" in columns
    if kind is Kind.UNPAIRED and not unpaired:
        raise DataError(
            f"{name}: the rows are unpaired (columns {list(columns)}): train on them with loss_type='kto', or give "
            "rows with chosen and rejected."
        )
    if unpaired and kind is Kind.TOKENS and not labelled_tokens:
        raise DataError(f"{name}: token ids for loss_type='kto' need a `label` column; found {list(columns)}.")
    numbers = tuple(column for column in NUMBERS if column in columns)
    if unpaired and kind is not Kind.TOKENS:
        of_pairs = [column for column in numbers if column.startswith("ref_")]
        if of_pairs:
            raise DataError(
                f"{name}: {of_pairs[0]} belongs to a pair's completions, and loss_type='kto' takes other ones: "
                "remove the column."
            )
        numbers = tuple(column for column in numbers if column == "weight")
    return RowEncoder(RecordTokenizer(tokenizer), kind, unpaired, numbers, limit)


def _features(encoder: RowEncoder) -> dict[str, Any]:
    """The columns of the result; `label` only where a loss of unpaired rows reads it."""
    ids: dict[str, Any] = {column: List(Value("int32")) for column in _ID_COLUMNS}
    label = {"label": Value("bool")} if encoder.unpaired else {}
    return {"row_id": Value("int64"), **ids, **{column: Value("float64") for column in encoder.numbers}, **label}


def _columns_of(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}: row {index} is a {type(row).__name__}, not a dict of columns.")
    return list(dict.fromkeys(chain.from_iterable(rows)))


def _encode_dataset(dataset: Dataset, encoder: RowEncoder, num_proc: int | None, name: str) -> Dataset:
    return dataset.with_format(None).map(
        _map_batch,
        fn_kwargs={"encoder": encoder},
        batched=True,
        batch_size=_BATCH_ROWS,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features({**_features(encoder), **_REPORT_FEATURES}),
        num_proc=num_proc,
        desc=f"Tokenizing {name}",
    )


def _map_batch(batch: Mapping[str, list[Any]], indices: list[int], encoder: RowEncoder) -> dict[str, list[Any]]:
    columns = {column: batch[column] for column in batch}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return _as_columns(encoder.encode(rows, indices), encoder)


def _as_columns(prepared: list[Prepared], encoder: RowEncoder) -> dict[str, list[Any]]:
    """Columns with `examples_per_row` rows for each input row; a dropped row keeps its place, with a reason."""
    columns: dict[str, list[Any]] = {column: [] for column in (*_features(encoder), *_REPORT_FEATURES)}
    for row in prepared:
        for example in row.examples or [{}] * encoder.examples_per_row:
            values = {
                **_as_row(row, example, encoder),
                "_reason": row.reason,
                "_detail": row.detail,
                "_truncated": row.truncated,
                "_eos_lost": row.eos_lost,
                "_not_prefix": row.not_prefix,
                **{f"_{column}": len(example.get(column, [])) for column in _ID_COLUMNS},
            }
            for column, value in values.items():
                columns[column].append(value)
    return columns


def _as_row(row: Prepared, example: Mapping[str, Any], encoder: RowEncoder) -> dict[str, Any]:
    """The columns of the result for one example."""
    ids = {column: example.get(column, []) for column in _ID_COLUMNS}
    others = {column: example.get(column) for column in _features(encoder) if column not in ("row_id", *_ID_COLUMNS)}
    return {"row_id": row.row_id, **ids, **others}


def _encode_list(rows: Sequence[Mapping[str, Any]], columns: list[str], encoder: RowEncoder) -> Dataset:
    """Encode dicts without passing them through Arrow, which refuses columns of mixed types."""
    parts: list[Prepared] = []
    for start in range(0, len(rows), _BATCH_ROWS):
        batch = [{column: row.get(column) for column in columns} for row in rows[start : start + _BATCH_ROWS]]
        parts += encoder.encode(batch, range(start, start + len(batch)))
    features = Features({**_features(encoder), **_REPORT_FEATURES})
    return Dataset.from_dict(_as_columns(parts, encoder), features=features)


def _count(encoded: Dataset, report: PreparationReport, encoder: RowEncoder) -> list[int]:
    """Fill the report from the columns that the encoder left, cached or not; return the indices to keep."""
    table = encoded.select_columns(["row_id", *_REPORT_FEATURES])[:]
    step, kept = encoder.examples_per_row, []
    for i in range(0, len(encoded), step):
        row_id, reason = table["row_id"][i], table["_reason"][i]
        if reason:
            report.drop(row_id, DropReason(reason), table["_detail"][i])
            continue
        kept.extend(range(i, i + step))
        report.keep(
            row_id,
            {part: table[f"_{column}"][i : i + step] for part, column in encoder.parts.items()},
            truncated=table["_truncated"][i],
            eos_lost=table["_eos_lost"][i],
            not_prefix=table["_not_prefix"][i],
        )
    return kept


def _check_labels(prepared: Dataset, name: str) -> None:
    labels = set(prepared.unique("label"))
    if len(labels) == 1:
        only = "desirable (true)" if labels.pop() else "undesirable (false)"
        raise DataError(f"{name}: every row is labelled {only}; KTO needs rows of both kinds.")


def _add_mismatches(prepared: Dataset, encoder: RowEncoder, name: str) -> Dataset:
    """Give every example the completion of the next row's example as `rejected_ids`, cut to fit."""
    step, length = encoder.examples_per_row, len(prepared)
    following = prepared.select([(i + step) % length for i in range(length)]).select_columns(["chosen_ids"])
    beside = concatenate_datasets(
        [prepared.remove_columns("rejected_ids"), following.rename_column("chosen_ids", "rejected_ids")], axis=1
    )
    return beside.map(
        _fit_batch,
        fn_kwargs={"max_length": encoder.limit.tokens},
        batched=True,
        batch_size=_BATCH_ROWS,
        features=Features(_features(encoder)),
        desc=f"Mismatching {name}",
    ).select_columns(list(_features(encoder)))


def _fit_batch(batch: Mapping[str, list[Any]], max_length: int | None) -> dict[str, list[Any]]:
    pairs = zip(batch["prompt_ids"], batch["rejected_ids"], strict=True)
    return {"rejected_ids": [fit(prompt, ids, max_length) for prompt, ids in pairs]}


def _prepare_stream(
    stream: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    report: PreparationReport,
    limit: LengthLimit,
    unpaired: bool,
    max_drop_fraction: float,
) -> IterableDataset:
    first = next(iter(stream), None)
    if first is None:
        raise DataError(f"{report.name}: the stream has no rows.")
    columns = [*(stream.column_names or []), *(column for column in first if column not in (stream.column_names or []))]
    encoder = _encoder(columns, tokenizer, limit, unpaired, report.name)
    # A tokenizer that cannot serve these rows is an error now, not at the first step.
    encoder.encode([{column: first.get(column) for column in columns}], [0])
    batches = StreamEncoder(encoder, tuple(columns), report, max_drop_fraction)
    features = Features(_features(encoder))
    if unpaired and encoder.kind is not Kind.TOKENS:
        return IterableDataset.from_generator(_unpaired_rows, features, {"stream": stream, "batches": batches})
    if stream.column_names is None:
        # Rows of an untyped stream may have columns that the first has not, which `remove_columns` could not name.
        stream, columns = stream.map(_pack).select_columns([_PACKED]), [_PACKED]
    return stream.map(
        batches,
        with_indices=True,
        batched=True,
        batch_size=_STREAM_BATCH_ROWS,
        remove_columns=columns,
        features=features,
    )


def _pack(row: dict[str, Any]) -> dict[str, Any]:
    return {_PACKED: row}


@dataclass(frozen=True)
class StreamEncoder:
    """Encodes a stream's batches, counts what happens to their rows, and raises when too many are dropped."""

    encoder: RowEncoder
    columns: tuple[str, ...]
    report: PreparationReport
    max_drop_fraction: float

    def encode(self, rows: Sequence[Mapping[str, Any]], row_ids: Sequence[int]) -> list[Prepared]:
        """Encode one batch; the batch that starts with row 0 starts the report anew."""
        if row_ids[0] == 0:
            self.report.clear()
        prepared = self.encoder.encode([{column: row.get(column) for column in self.columns} for row in rows], row_ids)
        for row in prepared:
            row.count_in(self.report, self.encoder.parts)
        if self.report.rows_in >= _STREAM_BATCH_ROWS or len(rows) < _STREAM_BATCH_ROWS:
            self.report.check(self.max_drop_fraction)
        return [row for row in prepared if not row.reason]

    def __call__(self, batch: Mapping[str, list[Any]], row_ids: list[int]) -> dict[str, list[Any]]:
        """Encode a batch of columns, as `IterableDataset.map` gives it, and leave the dropped rows out."""
        if _PACKED in batch:
            rows = batch[_PACKED]
        else:
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        columns: dict[str, list[Any]] = {column: [] for column in _features(self.encoder)}
        for row in self.encode(rows, row_ids):
            for column, value in _as_row(row, row.examples[0], self.encoder).items():
                columns[column].append(value)
        return columns


def _unpaired_rows(stream: IterableDataset, batches: StreamEncoder) -> Iterator[dict[str, Any]]:
    """Yield unpaired examples one row late, when the next row's completions are known; the last take the first's."""
    encoder = batches.encoder
    first: Prepared | None = None
    held: Prepared | None = None
    for row in _encoded_rows(stream, batches):
        first = first or row
        if held is not None:
            yield from _mismatched(held, row, encoder)
        held = row
    if first is not None and held is not None:
        yield from _mismatched(held, first, encoder)


def _mismatched(row: Prepared, following: Prepared, encoder: RowEncoder) -> Iterator[dict[str, Any]]:
    for example in with_mismatches(row.examples, following.examples, encoder.limit.tokens):
        yield _as_row(row, example, encoder)


def _encoded_rows(stream: IterableDataset, batches: StreamEncoder) -> Iterator[Prepared]:
    batch: list[Mapping[str, Any]] = []
    row_id = 0
    for row in stream:
        batch.append(row)
        if len(batch) == _STREAM_BATCH_ROWS:
            yield from batches.encode(batch, range(row_id, row_id + len(batch)))
            row_id, batch = row_id + len(batch), []
    if batch:
        yield from batches.encode(batch, range(row_id, row_id + len(batch)))
