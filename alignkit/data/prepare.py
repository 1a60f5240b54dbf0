"""Datasets of any known format to token ids, with every dropped or cut row counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, IterableDataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from alignkit.data.encode_dataset import BATCH_ROWS, as_row, columns_of, encode_dataset
from alignkit.data.encode_rows import LengthLimit, Prepared, RowEncoder, fit, with_mismatches
from alignkit.data.records import NUMBERS, Kind, kind_of
from alignkit.data.report import PreparationReport
from alignkit.data.tokenize import RecordTokenizer
from alignkit.errors import DataError

# A stream's share of drops is checked from this many rows on. As it is also the stream's batch, and only the last
# batch of a stream is shorter, a shorter batch is where a stream of fewer rows is checked.
_STREAM_BATCH_ROWS = 100
_PACKED = "_row"

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
    columns = columns_of(dataset, name)
    encoder = _encoder(columns, tokenizer, limit, unpaired, name)
    encoded, kept = encode_dataset(dataset, columns, encoder, report, num_proc)
    report.finish(max_drop_fraction)
    prepared = encoded.select(kept)
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
            f"{name}: the rows are unpaired (columns {list(columns)}): train on them with DPOTrainer and "
            "loss_type='kto', or give rows with chosen and rejected."
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
        batch_size=BATCH_ROWS,
        features=Features(encoder.features),
        desc=f"Mismatching {name}",
    ).select_columns(list(encoder.features))


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
    features = Features(encoder.features)
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
        columns: dict[str, list[Any]] = {column: [] for column in self.encoder.features}
        for row in self.encode(rows, row_ids):
            for column, value in as_row(row, row.examples[0], self.encoder).items():
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
        yield as_row(row, example, encoder)


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
