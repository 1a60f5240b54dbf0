"""Held-out prompts, as token ids for a policy and as text or messages for a judge."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset

from alignkit.data.prompts import prepare_prompts
from alignkit.data.records import Text
from alignkit.data.sources import load_preferences
from alignkit.errors import DataError
from alignkit.evaluation.models import PolicyModel
from alignkit.evaluation.scoring import context_tokens


@dataclass(frozen=True, slots=True)
class HeldOutPrompts:
    """P prompts.

    Attributes:
        row_ids: of each, its row in the data as given.
        ids: token ids of the policy's tokenizer, with the template's start of an answer.
        texts: text, or messages.
        columns: the data's further columns.
    """

    row_ids: list[int]
    ids: list[list[int]]
    texts: list[Text]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.ids)


def held_out_prompts(
    policy: PolicyModel,
    prompts: str | Dataset | IterableDataset | Sequence[Any] | HeldOutPrompts,
    *,
    max_new_tokens: int,
    split: str = "test",
    count: int | None = None,
) -> HeldOutPrompts:
    """Bring prompts of any form to that of the policy. Prompts that leave no room for an answer are dropped.

    Args:
        policy: whose tokenizer encodes them.
        prompts: texts, lists of messages, rows of any format that `prepare_prompts` reads, or a dataset's name.
        max_new_tokens: what an answer may need of the context.
        split: of a dataset given by name.
        count: at most so many, the first ones.

    Raises:
        DataError: no prompt, or too many that cannot be used.
    """
    if isinstance(prompts, HeldOutPrompts):
        return prompts
    rows: Any = load_preferences(prompts, split=split) if isinstance(prompts, str) else prompts
    if isinstance(rows, IterableDataset):
        rows = list(rows if count is None else rows.take(count))
    rows = [row if isinstance(row, Mapping) else {"prompt": row} for row in rows][:count]
    if not rows:
        raise DataError("there is no prompt: give texts, conversations or rows with a prompt")
    context = context_tokens(policy.bundle.base)
    if context is not None and context <= max_new_tokens:
        raise DataError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in {context} positions: lower it")
    room = None if context is None else context - max_new_tokens
    prepared, _ = prepare_prompts(rows, policy.tokenizer, max_prompt_tokens=room, name="held-out prompts")
    columns: dict[str, list[Any]] = {name: list(prepared[name]) for name in prepared.column_names}
    return HeldOutPrompts(columns.pop("row_id"), columns.pop("prompt_ids"), columns.pop("prompt"), columns)


def seeds_for(count: int, each: int, seed: int) -> list[list[int]]:
    """Seeds of `each` completions of `count` prompts, all different, made from one seed."""
    source = random.Random(seed)
    return [[source.getrandbits(62) for _ in range(each)] for _ in range(count)]


def shown_text(text: Text) -> str:
    """A prompt for a reader: text as it is, the turns of a conversation by their roles."""
    if isinstance(text, str):
        return text.strip()
    return "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}".strip() for turn in text)
