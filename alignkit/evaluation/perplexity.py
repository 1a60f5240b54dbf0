"""Perplexity on held-out text: whether a model that was aligned still reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignkit.errors import DataError
from alignkit.evaluation.estimates import Estimate, Floats, as_floats, bootstrap_interval, ratio_interval
from alignkit.evaluation.models import PolicyModel
from alignkit.evaluation.scoring import BATCH_TOKENS, completion_logps, context_tokens


@dataclass(frozen=True, slots=True)
class PerplexitySummary:
    """`exp(nats / tokens)` over all documents together, with intervals that draw documents.

    Attributes:
        documents: that were scored.
        tokens: that were scored: all of a document but its first, which nothing predicts.
        cut: documents longer than what is read at once, of which the beginning was scored.
        skipped: documents of fewer than two tokens.
        policy: its perplexity.
        reference: the reference's on the same tokens; None where there is none.
        ratio: policy over reference, document by document: above 1 the policy reads worse.
    """

    documents: int
    tokens: int
    cut: int
    skipped: int
    policy: Estimate
    reference: Estimate | None
    ratio: Estimate | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        figures = {"policy": self.policy, "reference": self.reference, "ratio": self.ratio}
        plain = {name: None if estimate is None else estimate._asdict() for name, estimate in figures.items()}
        counts = {"documents": self.documents, "tokens": self.tokens, "cut": self.cut, "skipped": self.skipped}
        return {**counts, **plain}


def perplexity(
    policy: PolicyModel,
    documents: Sequence[str | Mapping[str, Any]],
    *,
    max_tokens: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    quiet: bool = False,
) -> PerplexitySummary:
    """Measure a policy's and its reference's perplexity on plain text.

    Args:
        policy: from `load_policy`.
        documents: texts, or rows with a column `text`.
        max_tokens: longest beginning of a document that is read; by default the model's context. It is never more than
            `batch_tokens`.
        batch_tokens: most tokens in one forward pass.
        quiet: show no progress.

    Raises:
        DataError: no document of two tokens or more, rows without text, or `max_tokens` below 2.
        TrainingError: log-probabilities that are not finite.
    """
    context = context_tokens(policy.bundle.base)
    most = min(limit for limit in (max_tokens, context, batch_tokens) if limit is not None)
    if most < 2:
        raise DataError(f"max_tokens={most} leaves nothing to predict: give at least 2")
    tokenizer: Any = policy.tokenizer
    encoded = [
        list(tokenizer(_text(document, row), verbose=False)["input_ids"]) for row, document in enumerate(documents)
    ]
    read = [ids[:most] for ids in encoded if len(ids) > 1]
    if not read:
        raise DataError(f"none of {len(encoded)} documents has two tokens, so there is nothing to predict: give text")
    has_reference = policy.bundle.can_reference
    found = completion_logps(
        policy,
        [(ids[:1], ids[1:]) for ids in read],
        with_reference=has_reference,
        batch_tokens=batch_tokens,
        what="Perplexity",
        quiet=quiet,
    )
    tokens = as_floats([len(one.policy) for one in found])
    ours = as_floats(torch.stack([-one.policy.sum() for one in found]).numpy())
    theirs = as_floats(torch.stack([-one.reference.sum() for one in found]).numpy())
    return PerplexitySummary(
        documents=len(read),
        tokens=int(tokens.sum()),
        cut=sum(len(ids) > most for ids in encoded),
        skipped=len(encoded) - len(read),
        policy=_exponential(ratio_interval(ours, tokens, range(len(read)))),
        reference=_exponential(ratio_interval(theirs, tokens, range(len(read)))) if has_reference else None,
        ratio=_exponential(bootstrap_interval(_difference, ours, theirs, tokens, paired=True))
        if has_reference
        else None,
    )


def _text(document: Any, row: int) -> str:
    text = document.get("text") if isinstance(document, Mapping) else document
    if not isinstance(text, str):
        raise DataError(f"document {row} is no text: give strings, or rows with a column `text`")
    return text


def _difference(ours: Floats, theirs: Floats, tokens: Floats, axis: int) -> Floats:
    return (ours - theirs).sum(axis=axis) / tokens.sum(axis=axis)


def _exponential(nats: Estimate) -> Estimate:
    """Perplexity of nats per token; what no number can hold is infinite."""
    return Estimate(*(math.exp(number) if number < 700 else math.inf for number in nats))
