"""One batch of rows to prepared rows: what `prepare_preferences` maps over a dataset, a list or a stream."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets import List, Value

from alignkit.data.reasons import BadRow, DropReason, shown
from alignkit.data.records import Kind, Preference, Record, TokenRow, Transcripts, Unpaired, to_record
from alignkit.data.report import PreparationReport
from alignkit.data.tokenize import EncodedRow, RecordTokenizer, truncate

# Part of what is hashed for the cache of prepared datasets: raise it whenever the ids or the drops change.
ENCODING_VERSION = 1


@dataclass(slots=True)
class Prepared:
    """What became of one input row: one example, two (a pair trained on as two unpaired rows), or a reason."""

    row_id: int
    examples: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""
    detail: str = ""
    truncated: int = 0
    eos_lost: bool = False
    not_prefix: bool = False

    def count_in(self, report: PreparationReport, parts: Mapping[str, str]) -> None:
        """Add this row to the report; `parts` maps names of lengths to columns of the examples."""
        if self.reason:
            report.drop(self.row_id, DropReason(self.reason), self.detail)
            return
        lengths = {part: [len(example[column]) for example in self.examples] for part, column in parts.items()}
        report.keep(self.row_id, lengths, truncated=self.truncated, eos_lost=self.eos_lost, not_prefix=self.not_prefix)


class LengthLimit(NamedTuple):
    """Tokens of prompt + completion that are kept, or None for all; longer rows are cut, or dropped."""

    tokens: int | None
    drops_longer: bool = False


@dataclass(frozen=True)
class RowEncoder:
    """Encodes batches of rows. Frozen and picklable: datasets hashes it for its cache and sends it to processes.

    Attributes:
        tokenizer: wraps the user's tokenizer.
        kind: what the dataset's columns say its rows are.
        unpaired: whether examples have one completion and a label.
        numbers: the numeric columns that travel along.
        limit: how long a row may be.
    """

    tokenizer: RecordTokenizer
    kind: Kind
    unpaired: bool
    numbers: tuple[str, ...]
    limit: LengthLimit
    version: int = ENCODING_VERSION

    @property
    def features(self) -> dict[str, Any]:
        """The columns of the result; `label` only where a loss of unpaired rows reads it."""
        ids = dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), List(Value("int32")))
        label = {"label": Value("bool")} if self.unpaired else {}
        return {"row_id": Value("int64"), **ids, **dict.fromkeys(self.numbers, Value("float64")), **label}

    @property
    def examples_per_row(self) -> int:
        """Examples that one input row gives."""
        return 2 if self.unpaired and self.kind is Kind.PAIRED else 1

    @property
    def parts(self) -> dict[str, str]:
        """What the report calls the columns whose lengths it counts."""
        if self.unpaired:
            return {"prompt": "prompt_ids", "completion": "chosen_ids"}
        return {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}

    def encode(self, rows: Sequence[Mapping[str, Any]], row_ids: Sequence[int]) -> list[Prepared]:
        """Encode one batch; every row gives one `Prepared`, in order."""
        if not self.unpaired:  # a pair has no label; some datasets have such a column for other ends
            rows = [{column: row[column] for column in row if column != "label"} for row in rows]
        records = [_record(row, self.tokenizer.transcripts) for row in rows]
        texts = {i: record for i, record in enumerate(records) if isinstance(record, Preference | Unpaired)}
        encoded = dict(zip(texts, self.tokenizer.encode(list(texts.values())), strict=True))
        return [
            self._prepare(row, row_id, record, encoded.get(i))
            for i, (row, row_id, record) in enumerate(zip(rows, row_ids, records, strict=True))
        ]

    def _prepare(
        self, row: Mapping[str, Any], row_id: int, record: Record | BadRow, encoded: EncodedRow | BadRow | None
    ) -> Prepared:
        prepared = Prepared(row_id)
        try:
            if isinstance(record, BadRow):
                raise record
            if isinstance(encoded, BadRow):
                raise encoded
            if isinstance(record, TokenRow):
                encoded = self._token_row(record)
            assert encoded is not None  # every record but token ids was encoded
            prepared.not_prefix = encoded.not_prefix
            completions = self._truncate(encoded, prepared, is_pair=_is_pair(record))
            numbers = {name: _number(row[name], name) for name in self.numbers}
            prepared.examples = self._examples(record, encoded.prompt_ids, completions, numbers)
        except BadRow as error:
            prepared.reason, prepared.detail = error.reason.value, error.detail
        return prepared

    def _token_row(self, record: TokenRow) -> EncodedRow:
        size = self.tokenizer.vocabulary
        named = {"prompt_ids": record.prompt_ids, "chosen_ids": record.chosen_ids, "rejected_ids": record.rejected_ids}
        for column, ids in named.items():
            largest = max(ids)
            if largest >= size:
                raise BadRow(
                    DropReason.NOT_TOKEN_IDS, f"{column} holds {largest}, the tokenizer's ids end at {size - 1}"
                )
        return EncodedRow(record.prompt_ids, (record.chosen_ids, record.rejected_ids), not_prefix=False)

    def _truncate(self, encoded: EncodedRow, prepared: Prepared, *, is_pair: bool) -> list[list[int]]:
        prompt = len(encoded.prompt_ids)
        most = self.limit.tokens
        if most is not None and prompt >= most:
            raise BadRow(DropReason.PROMPT_FILLS_LENGTH, f"{prompt} tokens, max_length={most}")
        longest = prompt + max(map(len, encoded.completion_ids))
        if self.limit.drops_longer and most is not None and longest > most:
            raise BadRow(DropReason.TOO_LONG, f"{longest} tokens, max_length={most}")
        eos = self.tokenizer.tokenizer.eos_token_id
        eos_id = eos if isinstance(eos, int) else None
        if is_pair and encoded.completion_ids[0] == encoded.completion_ids[1]:
            raise BadRow(DropReason.IDENTICAL, "chosen and rejected have the same tokens")
        cut = [truncate(encoded.prompt_ids, ids, most, eos_id) for ids in encoded.completion_ids]
        if is_pair and cut[0].ids == cut[1].ids:
            raise BadRow(
                DropReason.IDENTICAL_AFTER_TRUNCATION,
                f"the first {len(cut[0].ids)} tokens are the same, max_length={most}",
            )
        prepared.truncated = sum(part.cut for part in cut)
        prepared.eos_lost = any(part.eos_lost for part in cut)
        return [part.ids for part in cut]

    def _examples(
        self, record: Record, prompt_ids: list[int], completions: list[list[int]], numbers: dict[str, float]
    ) -> list[dict[str, Any]]:
        if isinstance(record, Unpaired):
            labels = [record.label]
        elif isinstance(record, TokenRow) or not self.unpaired:
            label = {"label": record.label} if isinstance(record, TokenRow) and record.label is not None else {}
            ids = {"prompt_ids": prompt_ids, "chosen_ids": completions[0], "rejected_ids": completions[1]}
            return [{**ids, **numbers, **label}]
        else:
            labels = [True, False]
        return [
            {"prompt_ids": prompt_ids, "chosen_ids": ids, "label": label, **numbers}
            for ids, label in zip(completions, labels, strict=True)
        ]


def with_mismatches(
    unit: list[dict[str, Any]], following: list[dict[str, Any]], max_length: int | None
) -> list[dict[str, Any]]:
    """Give each unpaired example the completion of the following row as `rejected_ids`, cut to the room it has."""
    return [
        {**example, "rejected_ids": fit(example["prompt_ids"], other["chosen_ids"], max_length)}
        for example, other in zip(unit, following, strict=True)
    ]


def fit(prompt_ids: Sequence[int], ids: Sequence[int], max_length: int | None) -> list[int]:
    """Cut a completion to the room that the prompt leaves."""
    return list(ids) if max_length is None else list(ids[: max_length - len(prompt_ids)])


def _record(row: Mapping[str, Any], transcripts: Transcripts) -> Record | BadRow:
    try:
        return to_record(row, transcripts=transcripts)
    except BadRow as error:
        return error


def _is_pair(record: Record | BadRow) -> bool:
    if isinstance(record, TokenRow):
        return record.label is None
    return not isinstance(record, Unpaired)


def _number(value: Any, name: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:  # an integer beyond every float
        number = math.inf
    if not math.isfinite(number):
        raise BadRow(DropReason.NOT_A_NUMBER, f"{name} is {shown(value)}")
    if name == "weight" and number < 0:
        raise BadRow(DropReason.NOT_A_NUMBER, f"weight is {shown(value)}, below 0")
    return number
