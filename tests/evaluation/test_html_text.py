"""Text that others wrote, made visible, and the differences of two texts."""

from __future__ import annotations

import time

import pytest

from alignkit.evaluation.html_text import Piece, compare, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext — with “signs”, 你好, مرحبا, é, 👩‍🔬", "plain\n\ttext — with “signs”, 你好, مرحبا, é, 👩‍🔬"),
        ("a\x00b\x1b[31m\x7f\x85", "a⟨U+0000⟩b⟨U+001B⟩[31m⟨U+007F⟩⟨U+0085⟩"),
        ("abc\u202edcba\u2066x", "abc⟨U+202E⟩dcba⟨U+2066⟩x"),
        ("half \ud83d surrogate", "half ⟨U+D83D⟩ surrogate"),
        ("zero\u200bwidth\ufeff\u2028\U000e0041", "zero⟨U+200B⟩width⟨U+FEFF⟩⟨U+2028⟩⟨U+E0041⟩"),
        ("\ue000\ufffe", "⟨U+E000⟩⟨U+FFFE⟩"),
        ("a\r\nb\rc", "a\nb⟨U+000D⟩c"),
    ],
)
def test_what_is_invisible_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(text).encode("utf-8").decode("utf-8") == shown


def test_stacks_of_marks_are_cut() -> None:
    assert visible("z" + "\u0336" * 500) == "z" + "\u0336" * 4


def joined(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_words_that_differ_are_marked() -> None:
    found = compare("The quick brown fox sleeps.", "The quick brown cat sleeps.")
    assert found.before == [Piece("The quick brown ", False), Piece("fox", True), Piece(" sleeps.", False)]
    assert found.after == [Piece("The quick brown ", False), Piece("cat", True), Piece(" sleeps.", False)]
    assert found.note == ""


def test_a_stray_word_between_changes_is_no_agreement() -> None:
    found = compare("alpha beta of gamma delta", "one two of three four")
    assert found.before == [Piece("alpha beta of gamma delta", True)]
    assert found.after == [Piece("one two of three four", True)]


@pytest.mark.parametrize(("before", "after"), [("", "new text"), ("old text", ""), ("a  b\n", "a b"), ("<b>", "<i>")])
def test_no_text_is_lost(before: str, after: str) -> None:
    found = compare(before, after)
    assert (joined(found.before), joined(found.after)) == (before, after)
    assert any(piece.is_changed for piece in [*found.before, *found.after])


def test_equal_answers_are_said_to_be_equal() -> None:
    assert compare("same", "same").note == "The answers are the same."


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("word " * 50_000, "other " * 50_000),
        ("a b " * 900, "b a " * 900),  # few words, many times: a slow case for a comparison
        (" ".join(map(str, range(1900))), " ".join(map(str, range(1900, 0, -1)))),
    ],
)
def test_a_comparison_takes_no_minutes(before: str, after: str) -> None:
    start = time.process_time()
    found = compare(before, after)
    assert time.process_time() - start < 5
    assert (joined(found.before), joined(found.after)) == (before, after)
