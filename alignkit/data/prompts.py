"""Prompts for rollouts: rows of any known format to token ids and to what rewards are told, with every drop counted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from alignkit.data.encode_dataset import columns_of, encode_dataset
from alignkit.data.encode_rows import ENCODING_VERSION, Prepared
from alignkit.data.messages import (
    Messages,
    as_messages,
    as_text,
    check_order,
    is_empty,
    is_messages,
    is_transcript,
    transcript_to_messages,
)
from alignkit.data.prepare import Rows
from alignkit.data.reasons import BadRow, DropReason
from alignkit.data.records import (
    CONVERSATION_COLUMNS,
    Prompt,
    Text,
    TokenRow,
    Transcripts,
    check_text_only,
    to_record,
    with_system,
)
from alignkit.data.report import PreparationReport
from alignkit.data.template_arguments import template_arguments
from alignkit.data.tokenize import EncodedRow, RecordTokenizer
from alignkit.errors import ConfigError, DataError, nearest

_PAIR = ("chosen", "rejected")
_SOURCES = ("prompt", *CONVERSATION_COLUMNS, *_PAIR)
_READ = (*_SOURCES, "system", "tools", "chat_template_kwargs")
# Columns that are used up, or made anew; all others stay for the rewards.
_REPLACED = frozenset({*_SOURCES, "completion", "row_id", "prompt_ids"})
_TOKEN_COLUMNS = ("input_ids", "prompt_ids")


def prepare_prompts(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int | None,
    max_drop_fraction: float = 0.2,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset, PreparationReport]:
    """Turn rows with a prompt into what a rollout needs.

    A prompt is found in
      - `chosen` and `rejected`: what `prepare_preferences` takes for their prompt, whatever else the row has;
      - `messages` or `conversations`: without the assistant's answer at their end. Text in `prompt` beside them is
        taken for a part of the conversation;
      - `prompt`: text, which stays as it is; messages, the last from the user or a tool; or a transcript as
        Anthropic's HH writes them, which becomes messages if the tokenizer has a chat template.

    Messages are encoded with `add_generation_prompt=True` and the row's `tools` and `chat_template_kwargs`. A prompt
    is never cut: it would ask something else. Rows that say the same stay, each of them.

    Args:
        dataset: a `datasets.Dataset`, or a list of dicts.
        tokenizer: the policy's tokenizer, with a chat template if prompts are conversations.
        max_prompt_tokens: longer prompts are dropped. None: no limit.
        max_drop_fraction: the share of rows that may be dropped; more is an error.
        num_proc: processes for a `Dataset`.
        name: what to call the dataset in messages.

    Returns:
        A dataset with `row_id` (the row's index in the input), `prompt_ids`, `prompt` (text, or messages with `role`
        and `content`: what rewards are told) and every column of the input that was not used up, unchanged. Used up
        are `chosen`, `rejected`, `messages`, `conversations` and `completion`. And the report of what was dropped.

    Raises:
        ConfigError: a stream: a rollout's place in an epoch needs the number of prompts.
        DataError: no column with prompts, token ids in place of text, vision columns, too many drops, no row kept, no
            row at all, or a missing chat template.
    """
    if max_prompt_tokens is not None and max_prompt_tokens < 1:
        raise DataError(f"max_prompt_tokens={max_prompt_tokens} leaves no room for a prompt; give at least 1.")
    if isinstance(dataset, IterableDataset):
        raise ConfigError(
            f"{name}: PPO needs a dataset of known length, and this is a stream: load it without streaming=True, or "
            "keep some rows with Dataset.from_list(list(stream.take(10_000)))."
        )
    columns = columns_of(dataset, name)
    _check_columns(columns, name)
    encoder = PromptEncoder(RecordTokenizer(tokenizer), max_prompt_tokens)
    report = PreparationReport(name)
    encoded, kept = encode_dataset(dataset, [c for c in columns if c in _READ], encoder, report, num_proc)
    report.finish(max_drop_fraction)
    others = [column for column in columns if column not in _REPLACED]
    return concatenate_datasets([encoded, *_as_they_are(dataset, others, name)], axis=1).select(kept), report


def _check_columns(columns: Sequence[str], name: str) -> None:
    check_text_only(columns)
    if not {"prompt", *CONVERSATION_COLUMNS}.isdisjoint(columns) or set(_PAIR).issubset(columns):
        return
    ids = [column for column in columns if column in _TOKEN_COLUMNS]
    if ids:
        raise DataError(
            f"{name}: {ids[0]!r} holds token ids, and PPO's rewards need text: give the prompts as text or messages in "
            "a `prompt` column, and they are tokenised here."
        )
    hints = dict.fromkeys(nearest(column, _SOURCES) for column in columns if column not in _SOURCES)
    raise DataError(
        f"{name}: none of the columns {list(columns)} holds prompts.{''.join(hints)} Give `prompt` (text or messages), "
        "`messages`, or `chosen` and `rejected`; rename_column('…', 'prompt') renames one."
    )


def _as_they_are(dataset: Dataset | Sequence[Mapping[str, Any]], columns: list[str], name: str) -> list[Dataset]:
    """These columns as datasets that stand beside each other."""
    if isinstance(dataset, Dataset):
        return [dataset.with_format(None).select_columns(columns)] if columns else []
    found = []
    for column in columns:
        try:
            found.append(_column(column, [row.get(column) for row in dataset]))
        except (TypeError, ValueError, OverflowError, NotImplementedError, RecursionError) as error:
            raise DataError(
                f"{name}: the column {column!r} cannot be kept for the rewards ({error}): make its values numbers, "
                "text, lists or dicts, or remove it."
            ) from error
    return found


def _column(name: str, values: list[Any]) -> Dataset:
    """One column with values that read as they are here.

    Dicts, lists and mixed types are written as JSON: Arrow would give every dict the keys of all, and `datasets` by
    itself would take the text "5" beside numbers for the number 5.
    """
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) <= 1 and kinds.isdisjoint((dict, list, tuple)):
        return Dataset.from_dict({name: values})
    dumped = [None if value is None else json.dumps(value, allow_nan=False) for value in values]
    return Dataset.from_dict({name: dumped}, features=Features({name: Json()}))


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes batches of rows with a prompt. Frozen and picklable, as `datasets` needs it for its cache.

    Attributes:
        tokenizer: wraps the user's tokenizer.
        max_prompt_tokens: longer prompts are dropped; None for no limit.
    """

    tokenizer: RecordTokenizer
    max_prompt_tokens: int | None
    version: int = ENCODING_VERSION

    @property
    def features(self) -> dict[str, Any]:
        """The columns of the result. Prompts are JSON: Arrow would give every message the keys of all messages."""
        return {"row_id": Value("int64"), "prompt_ids": List(Value("int32")), "prompt": Json()}

    @property
    def parts(self) -> dict[str, str]:
        """What the report calls the columns whose lengths it counts."""
        return {"prompt": "prompt_ids"}

    @property
    def examples_per_row(self) -> int:
        """Examples that one input row gives."""
        return 1

    def encode(self, rows: Sequence[Mapping[str, Any]], row_ids: Sequence[int]) -> list[Prepared]:
        """Encode one batch; every row gives one `Prepared`, in order."""
        prompts = [_prompt_or_error(row, self.tokenizer.transcripts) for row in rows]
        encoded = iter(self.tokenizer.encode([prompt for prompt in prompts if isinstance(prompt, Prompt)]))
        prepared = []
        for row_id, prompt in zip(row_ids, prompts, strict=True):
            try:
                if isinstance(prompt, BadRow):
                    raise prompt
                prepared.append(Prepared(row_id, [self._example(prompt, next(encoded))]))
            except BadRow as error:
                prepared.append(Prepared(row_id, reason=error.reason.value, detail=error.detail))
        return prepared

    def _example(self, prompt: Prompt, encoded: EncodedRow | BadRow) -> dict[str, Any]:
        if isinstance(encoded, BadRow):
            raise encoded
        tokens, most = len(encoded.prompt_ids), self.max_prompt_tokens
        if most is not None and tokens > most:
            raise BadRow(DropReason.PROMPT_TOO_LONG, f"{tokens} tokens, max_prompt_tokens={most}")
        return {"prompt_ids": encoded.prompt_ids, "prompt": _dumped(prompt.prompt)}


def to_prompt(row: Mapping[str, Any], *, transcripts: Transcripts = Transcripts.TO_MESSAGES) -> Prompt:
    """Find the prompt of one row, as `prepare_prompts` says.

    Args:
        row: the columns that may hold a prompt, and `system`, `tools`, `chat_template_kwargs`.
        transcripts: what to make of raw HH transcripts.

    Raises:
        BadRow: this row has no prompt that can be answered.
    """
    if all(name in row for name in _PAIR):
        record = to_record(row, transcripts=transcripts)
        assert not isinstance(record, TokenRow)  # its columns are not among those that are read
        return Prompt(record.prompt, record.tools, record.chat_template_kwargs)
    conversation = next((column for column in CONVERSATION_COLUMNS if column in row), None)
    if conversation is not None and not is_messages(row.get("prompt")):
        prompt = _without_answer(with_system(as_messages(row[conversation], conversation), row))
    else:
        prompt = _as_prompt(row["prompt"], transcripts)
    return Prompt(_checked(prompt), *template_arguments(row))


def _as_prompt(value: Any, transcripts: Transcripts) -> Text:
    if isinstance(value, list | tuple) and value and all(isinstance(item, int) for item in value):
        raise BadRow(DropReason.NOT_TEXT, "prompt is a list of token ids; rewards need text or messages")
    if isinstance(value, Mapping | list | tuple):
        return as_messages(value, "prompt")
    text = as_text(value, "prompt")
    if transcripts is Transcripts.AS_TEXT or not (is_transcript(text) or text.startswith("\n\nHuman:")):
        return text
    messages = transcript_to_messages(text)
    is_open = messages[-1] == {"role": "assistant", "content": ""}  # "Assistant:" at the end
    return messages[:-1] if is_open else messages


def _without_answer(messages: Messages) -> Messages:
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def _checked(prompt: Text) -> Text:
    """Return `prompt` if it can be answered."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BadRow(DropReason.EMPTY, "prompt is empty")
        return prompt
    if not prompt:
        raise BadRow(DropReason.EMPTY, "prompt has no messages")
    check_order(prompt, "prompt")
    last = prompt[-1]
    if last["role"] not in ("user", "tool"):
        raise BadRow(DropReason.WRONG_ROLES, f"prompt ends with {last['role']}, not with user or tool")
    if is_empty(last):
        raise BadRow(DropReason.EMPTY, "the prompt's last message is empty")
    return prompt


def _prompt_or_error(row: Mapping[str, Any], transcripts: Transcripts) -> Prompt | BadRow:
    try:
        return to_prompt(row, transcripts=transcripts)
    except BadRow as error:
        return error


def _dumped(prompt: Text) -> str:
    """Write JSON; text too, because `datasets` would take a text that happens to be JSON for what it says."""
    try:
        dumped = json.dumps(prompt, ensure_ascii=False, allow_nan=False)
        dumped.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise BadRow(DropReason.NOT_TEXT, f"prompt holds what is neither text nor JSON: {error}") from None
    return dumped
