"""What answers look like: how often words repeat, and how long they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkit.errors import DataError
from alignkit.evaluation.estimates import Estimate, accuracy_interval, mean_interval


@dataclass(frozen=True, slots=True)
class TextSummary:
    """Answers as text.

    Attributes:
        answers: how many.
        empty: answers without a word.
        distinct_1, distinct_2: different words and pairs of words, as a share of all of them. Longer texts repeat
            more: compare figures of answers of about the same length.
        words: per answer.
        tokens: per answer, EOS included; None where they are not known.
        median_words: of an answer.
        finished: share of the answers that ended by themselves; None where it is not known.
    """

    answers: int
    empty: int
    distinct_1: float
    distinct_2: float
    words: Estimate
    tokens: Estimate | None
    median_words: float
    finished: Estimate | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "answers": self.answers,
            "empty": self.empty,
            "distinct_1": self.distinct_1,
            "distinct_2": self.distinct_2,
            "words": self.words._asdict(),
            "tokens": None if self.tokens is None else self.tokens._asdict(),
            "median_words": self.median_words,
            "finished": None if self.finished is None else self.finished._asdict(),
        }


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams (Li et al. 2016, arXiv 1510.03055); 0 where there is none.

    Words are what white space separates, as they are written. No n-gram reaches from one text into the next.

    Raises:
        DataError: n below 1.
    """
    if n < 1:
        raise DataError(f"n={n}: an n-gram has at least one word")
    grams = [tuple(words[start : start + n]) for words in map(str.split, texts) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def summarize_texts(
    texts: Sequence[str], *, tokens: Sequence[int] | None = None, finished: Sequence[bool] | None = None
) -> TextSummary:
    """Summarize answers.

    Args:
        texts: the answers.
        tokens: their lengths.
        finished: whether each ended by itself.

    Raises:
        DataError: no answers.
    """
    if not texts:
        raise DataError("there are no answers to describe")
    words = [len(text.split()) for text in texts]
    return TextSummary(
        answers=len(texts),
        empty=words.count(0),
        distinct_1=distinct_n(texts, 1),
        distinct_2=distinct_n(texts, 2),
        words=mean_interval(words),
        tokens=None if tokens is None else mean_interval(list(tokens)),
        median_words=float(np.median(words)),
        finished=None if finished is None else accuracy_interval(sum(finished), len(finished)),
    )
