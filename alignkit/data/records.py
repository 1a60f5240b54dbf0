"""Rows of any known format to records: a prompt and two completions, or a prompt, one completion and a label.

`FORMATS` lists what is understood. A record's texts are strings (standard) or lists of messages (conversational), and
its prompt never overlaps its completions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from alignkit.data.messages import (
    Messages,
    as_messages,
    as_text,
    check_roles,
    is_empty,
    is_messages,
    is_transcript,
    split_transcript,
    transcript_to_messages,
)
from alignkit.data.reasons import BadRow, DropReason, shown
from alignkit.data.template_arguments import template_arguments
from alignkit.errors import DataError, nearest

Text = str | Messages

FORMATS = """\
  prompt, chosen, rejected          text or lists of messages (`tools` and `chat_template_kwargs` optional)
  chosen, rejected                  the same with the prompt inside both; Anthropic HH transcripts
  conversations, chosen, rejected   ShareGPT / LLaMA-Factory: messages with from/value or role/content
  prompt, completion, label         unpaired (loss_type="kto"); also messages (or conversations), label
  prompt_ids, chosen_ids, rejected_ids   token ids"""

# Columns of numbers that travel with a row, unchanged.
NUMBERS = ("weight", "margin", "ref_chosen_logps", "ref_rejected_logps")

_TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
CONVERSATION_COLUMNS = ("conversations", "messages")
_NO_PROMPT = "chosen and rejected share no prompt"
_LABELS = {"true": True, "1": True, "false": False, "0": False}
_VISION_COLUMNS = ("image", "images", "pixel_values", "video", "videos", "audio", "audios")
_KNOWN_COLUMNS = (*_TOKEN_COLUMNS, *CONVERSATION_COLUMNS, "prompt", "chosen", "rejected", "completion", "label")


class Kind(Enum):
    """What a dataset holds, judged by its columns."""

    PAIRED = "paired"
    UNPAIRED = "unpaired"
    TOKENS = "token ids"


class Transcripts(Enum):
    """What becomes of raw "Human: … Assistant: …" transcripts: messages for a chat template, or text as it is."""

    TO_MESSAGES = "messages"
    AS_TEXT = "text"


@dataclass(frozen=True, slots=True)
class Preference:
    """One prompt with a preferred and a dispreferred completion; all three are text, or all three are messages."""

    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def completions(self) -> tuple[Text, ...]:
        return (self.chosen, self.rejected)


@dataclass(frozen=True, slots=True)
class Unpaired:
    """One prompt with one completion that is desirable (`label` True) or not."""

    prompt: Text
    completion: Text
    label: bool
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def completions(self) -> tuple[Text, ...]:
        return (self.completion,)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt by itself, for a model to answer."""

    prompt: Text
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def completions(self) -> tuple[Text, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row that was tokenised elsewhere."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    label: bool | None = None  # unpaired rows have one


Record = Preference | Unpaired | TokenRow


def kind_of(columns: Iterable[str]) -> Kind:
    """Tell from a dataset's column names what its rows are.

    Raises:
        DataError: for vision columns, and for columns that make no known format.
    """
    found = list(columns)
    present = set(found)
    check_text_only(found)
    if present.issuperset(_TOKEN_COLUMNS):
        return Kind.TOKENS
    if present.issuperset(("chosen", "rejected")):
        return Kind.PAIRED
    conversation = present.intersection(CONVERSATION_COLUMNS)
    if "label" in present and (conversation or present.issuperset(("prompt", "completion"))):
        return Kind.UNPAIRED
    hints = "".join(dict.fromkeys(filter(None, (_misspelling(column) for column in found))))
    raise DataError(f"The columns {found} make no format that alignkit understands.{hints} Understood are:\n{FORMATS}")


def check_text_only(columns: Iterable[str]) -> None:
    """Raise `DataError` for vision and audio columns."""
    other = [column for column in columns if column in _VISION_COLUMNS]
    if other:
        raise DataError(f"The dataset has the column {other[0]!r}: alignkit is text only. Remove it and its rows.")


def _misspelling(column: str) -> str:
    return "" if column in _KNOWN_COLUMNS else nearest(column, _KNOWN_COLUMNS)


def to_record(row: Mapping[str, Any], *, transcripts: Transcripts = Transcripts.TO_MESSAGES) -> Record:
    """Recognise one row by its columns and their types.

    Args:
        row: the columns of one row; columns that are not listed in `FORMATS` are ignored.
        transcripts: what to make of raw HH transcripts.

    Raises:
        BadRow: this row cannot be used; its `reason` is one of `DropReason`.
        DataError: the columns make no known format.
    """
    kind = kind_of(row)
    if kind is Kind.TOKENS:
        return _token_row(row)
    tools, template_kwargs = template_arguments(row)
    if kind is Kind.UNPAIRED:
        label = to_label(row["label"])
        prompt, (completion,) = _split(row, ("completion",), transcripts)
        return Unpaired(prompt, completion, label, tools, template_kwargs)
    prompt, (chosen, rejected) = _split(row, ("chosen", "rejected"), transcripts)
    if chosen == rejected:
        raise BadRow(DropReason.IDENTICAL, "chosen and rejected are the same")
    return Preference(prompt, chosen, rejected, tools, template_kwargs)


def to_label(value: Any) -> bool:
    """Read a label: a bool, 0 or 1, or the text "true", "false", "0" or "1" in any case.

    Raises:
        BadRow: `not a label` for anything else.
    """
    if isinstance(value, str) and value.strip().lower() in _LABELS:
        return _LABELS[value.strip().lower()]
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise BadRow(DropReason.NOT_A_LABEL, f"label is {shown(value)}; expected true or false")


def _split(row: Mapping[str, Any], names: tuple[str, ...], transcripts: Transcripts) -> tuple[Text, tuple[Text, ...]]:
    """Return the prompt and the completions without it, all text or all messages."""
    conversation = next((column for column in CONVERSATION_COLUMNS if column in row), None)
    if conversation is not None and names[0] not in row:  # unpaired: the last message is the completion
        messages = with_system(as_messages(row[conversation], conversation), row)
        return _checked_messages(messages[:-1], [messages[-1:]], ("the last message",))
    if conversation is not None and "prompt" not in row:
        return _explicit_messages(with_system(as_messages(row[conversation], conversation), row), row, names)
    values = [row[name] for name in names]
    if "prompt" not in row:
        return _implicit(values, names, transcripts)
    prompt = row["prompt"]
    if isinstance(prompt, str) and not any(is_messages(value) for value in values):
        return _explicit_text(prompt, values, names)
    if isinstance(prompt, str):
        return _prompt_beside_messages(as_text(prompt, "prompt"), row, names)
    return _explicit_messages(as_messages(prompt, "prompt"), row, names)


def with_system(messages: Messages, row: Mapping[str, Any]) -> Messages:
    """Put the row's `system` column, where it has one, before a conversation without a system message."""
    system = row.get("system")
    if isinstance(system, str) and system.strip() and (not messages or messages[0]["role"] != "system"):
        return [{"role": "system", "content": as_text(system, "system")}, *messages]
    return messages


def _explicit_text(prompt: str, values: list[Any], names: tuple[str, ...]) -> tuple[Text, tuple[Text, ...]]:
    as_text(prompt, "prompt")
    texts = [as_text(value, name) for value, name in zip(values, names, strict=True)]
    if any(is_transcript(text) for text in texts):
        for text, name in zip(texts, names, strict=True):
            if not text.startswith(prompt):
                raise BadRow(DropReason.NOT_A_CONTINUATION, f"{name} is a transcript that does not start with prompt")
        texts = [text[len(prompt) :] for text in texts]
    return _checked_text(prompt, texts, names)


def _prompt_beside_messages(
    prompt: str, row: Mapping[str, Any], names: tuple[str, ...]
) -> tuple[Text, tuple[Text, ...]]:
    """UltraFeedback's way: the prompt's text in a column, whole conversations in the others."""
    values = [_completion_messages(row[name], name) for name in names]
    if all(value and value[0]["role"] == "assistant" for value in values):
        return _checked_messages([{"role": "user", "content": prompt}], values, names)
    length = _common_length(values[0], values[1]) if len(values) == 2 else len(values[0]) - 1
    asked = {message["content"].strip() for message in values[0][:length] if message["role"] == "user"}
    if prompt.strip() not in asked:
        raise BadRow(DropReason.NOT_A_CONTINUATION, f"no user message that {' and '.join(names)} share is the prompt")
    return _checked_messages(values[0][:length], [value[length:] for value in values], names)


def _explicit_messages(
    prompt: Messages, row: Mapping[str, Any], names: tuple[str, ...]
) -> tuple[Text, tuple[Text, ...]]:
    values = []
    for name in names:
        messages = _completion_messages(row[name], name)
        if messages and messages[0]["role"] != "assistant":  # then it repeats the conversation
            if messages[: len(prompt)] != prompt:
                raise BadRow(DropReason.NOT_A_CONTINUATION, f"{name} is a conversation that does not start with prompt")
            messages = messages[len(prompt) :]
        values.append(messages)
    return _checked_messages(prompt, values, names)


def _completion_messages(value: Any, name: str) -> Messages:
    return (
        [{"role": "assistant", "content": as_text(value, name)}] if isinstance(value, str) else as_messages(value, name)
    )


def _implicit(values: list[Any], names: tuple[str, ...], transcripts: Transcripts) -> tuple[Text, tuple[Text, ...]]:
    """The prompt is what both completions start with."""
    first, second = values
    if isinstance(first, str) and isinstance(second, str):
        first, second = as_text(first, names[0]), as_text(second, names[1])
        if not first.strip() or not second.strip():
            raise BadRow(DropReason.EMPTY, f"{names[0] if not first.strip() else names[1]} is empty")
        if first == second:
            raise BadRow(DropReason.IDENTICAL, "chosen and rejected are the same")
        if is_transcript(first) and is_transcript(second):
            return _implicit_transcript(first, second, names, transcripts)
        length = _common_text_length(first, second)
        if not first[:length].strip():
            raise BadRow(DropReason.EMPTY, _NO_PROMPT)
        return _checked_text(first[:length], [first[length:], second[length:]], names)
    if isinstance(first, str) or isinstance(second, str):
        text, other = (0, 1) if isinstance(first, str) else (1, 0)
        raise BadRow(DropReason.NOT_TEXT, f"{names[text]} is text, {names[other]} is {type(values[other]).__name__}")
    conversations = [as_messages(value, name) for value, name in zip(values, names, strict=True)]
    return _implicit_messages(conversations[0], conversations[1], names)


def _implicit_transcript(
    first: str, second: str, names: tuple[str, ...], transcripts: Transcripts
) -> tuple[Text, tuple[Text, ...]]:
    if transcripts is Transcripts.TO_MESSAGES:
        return _implicit_messages(transcript_to_messages(first), transcript_to_messages(second), names)
    (prompt, chosen), (other, rejected) = split_transcript(first), split_transcript(second)
    if prompt != other:
        raise BadRow(DropReason.NOT_A_CONTINUATION, "chosen and rejected differ before their last answer")
    return _checked_text(prompt, [chosen, rejected], names)


def _implicit_messages(first: Messages, second: Messages, names: tuple[str, ...]) -> tuple[Text, tuple[Text, ...]]:
    if first == second and first:
        raise BadRow(DropReason.IDENTICAL, "chosen and rejected are the same")
    length = _common_length(first, second)
    if length == 0 and first and second:
        raise BadRow(DropReason.EMPTY, _NO_PROMPT)
    return _checked_messages(first[:length], [first[length:], second[length:]], names)


def _common_length(first: Messages, second: Messages) -> int:
    """Number of messages that both start with; at least one message is left to each."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), max(shorter - 1, 0))


def _common_text_length(first: str, second: str) -> int:
    """Number of characters that both start with, at least one left to each; a space goes to the completions."""
    shorter = min(len(first), len(second))
    length = next((i for i in range(shorter) if first[i] != second[i]), shorter)
    if length == shorter:  # one is the other's beginning
        return shorter - 1
    return length - 1 if length > 0 and first[length - 1] == " " else length


def _checked_text(prompt: str, completions: list[str], names: tuple[str, ...]) -> tuple[Text, tuple[Text, ...]]:
    if not prompt.strip():
        raise BadRow(DropReason.EMPTY, "prompt is empty")
    for completion, name in zip(completions, names, strict=True):
        if not completion.strip():
            raise BadRow(DropReason.EMPTY, f"{name} is empty")
    return prompt, tuple(completions)


def _checked_messages(
    prompt: Messages, completions: list[Messages], names: tuple[str, ...]
) -> tuple[Text, tuple[Text, ...]]:
    if not prompt or is_empty(prompt[-1]):
        raise BadRow(DropReason.EMPTY, "prompt is empty")
    for completion, name in zip(completions, names, strict=True):
        if not completion:
            raise BadRow(DropReason.EMPTY, f"{name} is empty")
        check_roles(prompt, completion, name)
        if is_empty(completion[-1]):
            raise BadRow(DropReason.EMPTY, f"{name} is empty")
    return prompt, tuple(completions)


def _token_row(row: Mapping[str, Any]) -> TokenRow:
    ids = [_token_ids(row[column], column) for column in _TOKEN_COLUMNS]
    for column, value in zip(_TOKEN_COLUMNS, ids, strict=True):
        if not value:
            raise BadRow(DropReason.EMPTY, f"{column} is empty")
    label = to_label(row["label"]) if "label" in row else None
    if label is None and ids[1] == ids[2]:
        raise BadRow(DropReason.IDENTICAL, "chosen_ids and rejected_ids are the same")
    return TokenRow(ids[0], ids[1], ids[2], label)


def _token_ids(value: Any, column: str) -> list[int]:
    if not isinstance(value, (list, tuple)):
        raise BadRow(DropReason.NOT_TOKEN_IDS, f"{column} is {type(value).__name__}")
    for token in value:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise BadRow(DropReason.NOT_TOKEN_IDS, f"{column} holds {shown(token)}")
    return list(value)
