"""One prepared row, decoded, with the tokens that are trained on marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from alignkit.errors import printable

OPEN, CLOSE = "⟦", "⟧"
_GOOD, _BAD, _HEADING = "bold green", "bold red", "dim"


def show_example(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Text:
    """Decode a prepared row; what is trained on stands between ⟦ and ⟧ and, on a terminal, in colour.

    Special tokens such as EOS are shown, and what a terminal would act on is escaped. For unpaired rows (those with a
    `label`) the mismatched completion, which only serves the KL estimate, is shown without brackets. A row of
    `prepare_prompts` has only a prompt.

    Args:
        row: a row of `prepare_preferences`, with `prompt_ids`, `chosen_ids`, `rejected_ids`, or of `prepare_prompts`.
        tokenizer: the tokenizer that made the ids.

    Returns:
        A `rich` text: `console.print(text)` gives colours, `print(text)` plain text.
    """
    prompt, label = list(row["prompt_ids"]), row.get("label")
    identity = f" (row {row['row_id']})" if "row_id" in row else ""
    text = Text()
    _part(text, f"prompt{identity}, {len(prompt)} tokens, not trained on", _decode(tokenizer, [], prompt), None)
    if "chosen_ids" not in row:
        return text
    chosen = _decode(tokenizer, prompt, row["chosen_ids"])
    rejected = _decode(tokenizer, prompt, row["rejected_ids"])
    chosen_tokens, rejected_tokens = len(row["chosen_ids"]), len(row["rejected_ids"])
    if label is None:
        _part(text, f"chosen, {chosen_tokens} tokens", chosen, _GOOD)
        _part(text, f"rejected, {rejected_tokens} tokens", rejected, _BAD)
    else:
        heading = f"completion, {chosen_tokens} tokens, {'desirable' if label else 'undesirable'}"
        _part(text, heading, chosen, _GOOD if label else _BAD)
        _part(text, f"mismatched completion for the KL, {rejected_tokens} tokens, not trained on", rejected, None)
    return text


def _part(text: Text, heading: str, content: str, style: str | None) -> None:
    text.append(f"── {heading} ──\n", style=_HEADING)
    content = printable(content)
    text.append(content if style is None else f"{OPEN}{content}{CLOSE}", style=style)
    text.append("\n")


def _decode(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """Decode `ids` as they read after `before`: by themselves, SentencePiece would lose a leading space."""
    start = _plain(tokenizer, before)
    whole = _plain(tokenizer, [*before, *ids])
    return whole[len(start) :] if whole.startswith(start) else _plain(tokenizer, ids)


def _plain(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    if not ids:
        return ""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
