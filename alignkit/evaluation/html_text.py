"""Text that models and data wrote, fit for a page: nothing invisible, nothing that reorders, differences marked."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from typing import NamedTuple

# Joiners of scripts and emoji, which text needs; and signs that a font shows although Unicode counts them as format.
_HARMLESS = frozenset("\n\t\u200c\u200d") | frozenset(map(chr, (*range(0x600, 0x606), 0x6DD, 0x70F, 0x8E2)))
_WRITTEN_OUT = frozenset(("Cc", "Cf", "Cs", "Co", "Zl", "Zp"))  # categories of Unicode
_NO_CHARACTERS = frozenset(range(0xFDD0, 0xFDF0)) | {
    plane + end for plane in range(0, 0x110000, 0x10000) for end in (0xFFFE, 0xFFFF)
}
_MARKS = re.compile(r"[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]{5,}")
_TOKENS = re.compile(r"\s+|\w+|[^\w\s]", re.UNICODE)

MOST_CHARACTERS = 20_000  # of one text on the page
FOLDED_CHARACTERS = 900
_MOST_WORDS = 4_000  # of two texts together whose differences are looked for
_MOST_MATCHES = 400_000  # pairs of equal words, which is what the comparison's time goes by
_SHORT_RUN = 12  # characters; a shorter equal run between two changes is shown as changed too


class Piece(NamedTuple):
    """A stretch of text; `is_changed` where the other text does not have it."""

    text: str
    is_changed: bool


class Compared(NamedTuple):
    """Two texts in pieces, and why their differences are not marked, where they are not."""

    before: list[Piece]
    after: list[Piece]
    note: str


def visible(text: str) -> str:
    """Return `text` with everything invisible, reordering or unencodable written out, such as `⟨U+202E⟩`.

    Line ends and tabs stay, and stacks of combining marks are cut.
    """
    text = _MARKS.sub(lambda found: found.group()[:4], text.replace("\r\n", "\n"))
    return text.translate(_VISIBLE)


class _Visible(dict[int, str]):
    """What stands for a code point, looked up once."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        is_hidden = unicodedata.category(character) in _WRITTEN_OUT and character not in _HARMLESS
        self[code] = f"⟨U+{code:04X}⟩" if is_hidden or code in _NO_CHARACTERS else character
        return self[code]


_VISIBLE = _Visible()


def shortened(text: str) -> tuple[str, int]:
    """Return at most `MOST_CHARACTERS` of `text`, and how many were left out."""
    return text[:MOST_CHARACTERS], max(0, len(text) - MOST_CHARACTERS)


def compare(before: str, after: str) -> Compared:
    """Mark the words that only one of two texts has.

    Very long texts, and texts that repeat a word so often that a comparison would take minutes, are not marked.
    """
    if before == after:
        return Compared([Piece(before, False)], [Piece(after, False)], "The answers are the same.")
    old, new = _TOKENS.findall(before), _TOKENS.findall(after)
    counts = Counter(new)
    matches = sum(times * counts[word] for word, times in Counter(old).items())
    if len(old) + len(new) > _MOST_WORDS or matches > _MOST_MATCHES:
        note = "Differences are not marked: the texts are too long to be compared."
        return Compared([Piece(before, False)], [Piece(after, False)], note)
    left: list[Piece] = []
    right: list[Piece] = []
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    for index, (kind, i1, i2, j1, j2) in enumerate(blocks):
        first, second = "".join(old[i1:i2]), "".join(new[j1:j2])
        inner = 0 < index < len(blocks) - 1
        changed = kind != "equal" or (inner and len(first.strip()) < _SHORT_RUN)
        _add(left, first, changed)
        _add(right, second, changed)
    return Compared(left, right, "")


def _add(pieces: list[Piece], text: str, changed: bool) -> None:
    if not text:
        return
    if pieces and pieces[-1].is_changed is changed:
        text = pieces.pop().text + text
    pieces.append(Piece(text, changed))
