"""Records to token ids.

The ids equal TRL 1.16's wherever the prompt's ids are a prefix of the ids of prompt + completion. Elsewhere (tokens
that merge across the boundary, templates that render the prompt differently alone) TRL shortens the prompt; here the
prompt is kept as it is at inference, the completion is encoded by itself, and the row is marked `not_prefix`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignkit.data.messages import Messages
from alignkit.data.reasons import BadRow, DropReason
from alignkit.data.records import Preference, Prompt, Text, Transcripts, Unpaired
from alignkit.errors import DataError, printable

# What becomes token ids: a prompt with two completions, one or none.
Asked = Preference | Unpaired | Prompt

# A completion that no template writes by itself: it shows where a template puts what the assistant says.
_MARKER = "\u241fmarker\u241f"

# Whatever the expressions of a template can raise, division by zero and endless macros included.
_TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)


class EncodedRow(NamedTuple):
    """Token ids of one record, not truncated."""

    prompt_ids: list[int]
    completion_ids: tuple[list[int], ...]  # one per completion of the record, EOS or the turn's end included
    not_prefix: bool


class Truncated(NamedTuple):
    """A completion cut to the room that the prompt leaves."""

    ids: list[int]
    cut: bool
    eos_lost: bool


class _Rendered(NamedTuple):
    """The strings that are tokenised for one record."""

    prompt: str
    wholes: tuple[str, ...]  # prompt and completion, one per completion
    tails: tuple[str, ...]  # the completions alone, for rows whose prompt is not a prefix


def truncate(prompt_ids: Sequence[int], ids: list[int], max_length: int | None, eos_id: int | None) -> Truncated:
    """Cut prompt + completion to `max_length` tokens from the start, as TRL's `keep_start` does.

    `eos_lost` says that the cut removed the completion's last EOS, or, where the template ends turns with another
    token, that it removed anything.
    """
    room = None if max_length is None else max_length - len(prompt_ids)
    if room is None or len(ids) <= room:
        return Truncated(ids, cut=False, eos_lost=False)
    kept = ids[: max(room, 0)]
    return Truncated(kept, cut=True, eos_lost=eos_id not in ids or eos_id in ids[len(kept) :])


def starts_with(ids: Sequence[int], prefix: Sequence[int]) -> bool:
    """Whether `ids` begins with `prefix`."""
    return list(ids[: len(prefix)]) == list(prefix)


class RecordTokenizer:
    """Turns records into token ids with one call of the tokenizer per batch.

    Args:
        tokenizer: any transformers tokenizer; conversational records need its chat template, completions
            that are text its EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._ending: list[int] | None = None
        self._alone: Callable[[str], list[int]] | None = None
        self._vocabulary: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What was derived from the tokenizer is left out, so that two pickles (and dataset fingerprints) are equal.
        return {"tokenizer": self.tokenizer, "_ending": None, "_alone": None, "_vocabulary": None}

    @property
    def vocabulary(self) -> int:
        """One more than the largest token id; ids may have gaps, so this can exceed the number of tokens."""
        if self._vocabulary is None:
            self._vocabulary = 1 + max(self.tokenizer.get_vocab().values())
        return self._vocabulary

    @property
    def transcripts(self) -> Transcripts:
        """What becomes of raw transcripts: messages if there is a chat template to write them with."""
        return Transcripts.AS_TEXT if self.tokenizer.chat_template is None else Transcripts.TO_MESSAGES

    def encode(self, records: Sequence[Asked]) -> list[EncodedRow | BadRow]:
        """Encode a batch; a record that the template or the tokenizer refuses gives the error in its place.

        Raises:
            DataError: conversational records without a chat template, or completions that are text without an EOS
                token.
        """
        rendered = [self._render(record) for record in records]
        chat = [isinstance(record.prompt, list) for record in records]
        ids: list[list[list[int]]] = [[] for _ in records]
        for is_chat in (False, True):
            rows = [i for i, row in enumerate(rendered) if isinstance(row, _Rendered) and chat[i] is is_chat]
            texts = [text for i in rows for text in _texts(rendered[i])]
            encoded = iter(self._encode_texts(texts, special=not is_chat))
            for i in rows:
                ids[i] = [next(encoded) for _ in _texts(rendered[i])]
        return [
            row if isinstance(row, BadRow) else self._assemble(row, row_ids)
            for row, row_ids in zip(rendered, ids, strict=True)
        ]

    def _encode_texts(self, texts: list[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        ids = self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        ending = self._special_ending() if special else []
        return [row[: -len(ending)] if ending and row[-len(ending) :] == ending else row for row in ids]

    def _special_ending(self) -> list[int]:
        """The tokens that the tokenizer appends to every text; between prompt and completion they have no place."""
        if self._ending is None:
            with_special = self.tokenizer("a")["input_ids"]
            bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
            starts = [i for i in range(len(with_special)) if with_special[i : i + len(bare)] == bare]
            self._ending = list(with_special[starts[0] + len(bare) :]) if starts else []
        return self._ending

    def _assemble(self, row: _Rendered, ids: list[list[int]]) -> EncodedRow | BadRow:
        prompt_ids, wholes = ids[0], ids[1:]
        completions, not_prefix = [], False
        for whole, tail in zip(wholes, row.tails, strict=True):
            if starts_with(whole, prompt_ids):
                completions.append(whole[len(prompt_ids) :])
            else:
                not_prefix = True
                completions.append(self._encode_alone(tail))
        if not prompt_ids or not all(completions):
            return BadRow(DropReason.EMPTY, "the tokenizer makes no token of it")
        return EncodedRow(prompt_ids, tuple(completions), not_prefix)

    def _encode_alone(self, text: str) -> list[int]:
        if self._alone is None:
            self._alone = encoder_without_dummy_prefix(self.tokenizer)
        return self._alone(text)

    def _render(self, record: Asked) -> _Rendered | BadRow:
        try:
            if isinstance(record.prompt, str):
                rendered = self._render_text(record.prompt, record.completions)
            else:
                rendered = self._render_chat(record)
            "".join(_texts(rendered)).encode("utf-8")
        except UnicodeEncodeError:
            return BadRow(DropReason.NOT_TEXT, "a lone surrogate in its tools or template arguments")
        except _TEMPLATE_ERRORS as error:
            if isinstance(error, DataError):
                raise
            return BadRow(DropReason.TEMPLATE_REFUSED, printable(f"{type(error).__name__}: {error}"))
        return rendered

    def _render_text(self, prompt: str, completions: tuple[Text, ...]) -> _Rendered:
        if not completions:
            return _Rendered(prompt, (), ())
        eos = self.tokenizer.eos_token
        if not isinstance(eos, str):
            raise DataError(
                "The tokenizer has no EOS token, so completions could not be taught to end: set tokenizer.eos_token "
                "to the token that ends a text for this model."
            )
        texts = [str(completion) for completion in completions]
        tails = tuple(text if text.endswith(eos) else text + eos for text in texts)
        return _Rendered(prompt, tuple(prompt + tail for tail in tails), tails)

    def _render_chat(self, record: Asked) -> _Rendered:
        if self.tokenizer.chat_template is None:
            raise DataError(
                "The rows are conversations, but the tokenizer has no chat template: take the tokenizer of an instruct "
                "model, set tokenizer.chat_template, or give prompt and completions as plain text."
            )
        prompt = _as_list(record.prompt)
        start = self._apply(record, prompt, add_generation_prompt=True)
        wholes, tails = [], []
        for completion in record.completions:
            messages = _as_list(completion)
            whole = self._apply(record, prompt + messages, add_generation_prompt=False)
            wholes.append(whole)
            if whole.startswith(start):
                tails.append(whole[len(start) :])
            else:
                tails.append(whole[self._completion_start(record, prompt, messages, start, whole) :])
        return _Rendered(start, tuple(wholes), tuple(tails))

    def _completion_start(self, record: Asked, prompt: Messages, messages: Messages, start: str, whole: str) -> int:
        """Where the assistant's words begin in `whole`, for templates whose generation prompt is not part of it."""
        marked = self._apply(record, [*prompt, {**messages[0], "content": _MARKER}, *messages[1:]], False)
        at = marked.find(_MARKER)
        if at >= 0 and whole.startswith(marked[:at]):
            return at
        return next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(start))

    def _apply(self, record: Asked, messages: Messages, add_generation_prompt: bool) -> str:
        rendered = self.tokenizer.apply_chat_template(
            messages,
            tools=record.tools,  # type: ignore[arg-type]
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **record.chat_template_kwargs,
        )
        return str(rendered)


def encoder_without_dummy_prefix(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Return a function that encodes text as it stands in the middle of a sequence.

    Tokenizers of the SentencePiece family (and byte-level ones with `add_prefix_space`) put a space before every
    text. For a fast tokenizer the returned function uses a copy of its backend without that rule. For a slow one it
    encodes the text behind a line break and takes the line break's tokens off again, where they can be told apart.
    """
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        original = tokenizer.backend_tokenizer
        state = json.loads(original.to_str())
        state["normalizer"] = _without_prefix_rule(state.get("normalizer"))
        state["pre_tokenizer"] = _without_prefix_rule(state.get("pre_tokenizer"))
        backend = type(original).from_str(json.dumps(state))
        backend.no_truncation()
        backend.no_padding()
        return lambda text: backend.encode(text, add_special_tokens=False).ids

    neutral = tokenizer.encode("\n", add_special_tokens=False)

    def encode_slow(text: str) -> list[int]:
        behind = tokenizer.encode("\n" + text, add_special_tokens=False)
        if neutral and starts_with(behind, neutral):
            return behind[len(neutral) :]
        return tokenizer.encode(text, add_special_tokens=False)

    return encode_slow


def _without_prefix_rule(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Rewrite one part of a `tokenizers` file so that nothing is put before the text; None if nothing is left."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        kept = [item for item in map(_without_prefix_rule, part[key]) if item is not None]
        return {**part, key: kept} if kept else None
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return {**part, "add_prefix_space": False}
    return part


def _texts(rendered: _Rendered | BadRow) -> tuple[str, ...]:
    return () if isinstance(rendered, BadRow) else (rendered.prompt, *rendered.wholes)


def _as_list(value: Text) -> Messages:
    if isinstance(value, str):
        raise DataError("A record mixes text and messages: give prompt and completions in the same form.")
    return value
