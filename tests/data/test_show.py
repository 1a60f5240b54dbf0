"""A decoded example, with what is trained on marked."""

from __future__ import annotations

import io

from rich.console import Console

from alignkit.data.prepare import prepare_preferences
from alignkit.data.show import show_example

PAIR = [{"prompt": "say", "chosen": " hello", "rejected": " foo"}]


def test_plain_text_marks_completions_and_shows_eos(byte_bpe_tokenizer) -> None:
    prepared, _ = prepare_preferences(PAIR, byte_bpe_tokenizer, max_length=None)
    sizes = [len(prepared[0][column]) for column in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert str(show_example(prepared[0], byte_bpe_tokenizer)) == (
        f"── prompt (row 0), {sizes[0]} tokens, not trained on ──\nsay\n"
        f"── chosen, {sizes[1]} tokens ──\n⟦ hello</s>⟧\n"
        f"── rejected, {sizes[2]} tokens ──\n⟦ foo</s>⟧\n"
    )


def test_leading_spaces_of_sentencepiece_stay(llama_like_tokenizer) -> None:
    prepared, _ = prepare_preferences(PAIR, llama_like_tokenizer, max_length=None)
    assert "⟦ hello</s>⟧" in str(show_example(prepared[0], llama_like_tokenizer))


def test_only_the_completion_of_unpaired_rows_is_marked(word_tokenizer) -> None:
    rows = [
        {"prompt": "hi ", "completion": "yes ", "label": True},
        {"prompt": "hi ", "completion": "no ", "label": False},
    ]
    prepared, _ = prepare_preferences(rows, word_tokenizer, max_length=None, unpaired=True)
    good, bad = (str(show_example(row, word_tokenizer)) for row in prepared)
    assert good.count("⟦") == good.count("⟧") == 1
    assert "completion, 2 tokens, desirable ──\n⟦" in good
    assert "completion, 2 tokens, undesirable ──\n⟦" in bad
    assert "mismatched completion for the KL, 2 tokens, not trained on ──\n" in good


def test_a_terminal_shows_colours(word_tokenizer) -> None:
    row = {"prompt_ids": [4], "chosen_ids": [5, 1], "rejected_ids": [6, 1]}
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="standard", width=80).print(show_example(row, word_tokenizer))
    assert "\x1b[1;32m⟦" in out.getvalue()  # chosen: bold green
    assert "\x1b[1;31m⟦" in out.getvalue()  # rejected: bold red


def test_markup_in_texts_is_shown_as_it_is(byte_bpe_tokenizer) -> None:
    prepared, _ = prepare_preferences(
        [{"prompt": "[bold]a", "chosen": "[/red]", "rejected": "b"}], byte_bpe_tokenizer, max_length=None
    )
    out = io.StringIO()
    Console(file=out, width=80).print(show_example(prepared[0], byte_bpe_tokenizer))
    assert "[bold]a" in out.getvalue()
    assert "⟦[/red]</s>⟧" in out.getvalue()
