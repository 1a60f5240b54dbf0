"""A rollout made by hand: two prompts, two completions each, the third one dropped."""

from __future__ import annotations

from typing import Any

import torch

from alignkit.rollout.collect import Prompts, Rollout, TokenTable
from alignkit.rollout.engine import Completion
from alignkit.rollout.mix import RewardResult
from alignkit.rollout.reward import ComponentScores

LOGPS = torch.tensor([[-1.0, -1.0, -1.0], [-0.5, -0.5, -9.0], [-7.0, 0.0, 0.0], [-2.0, -2.0, -2.0]])
LOG_RATIOS = torch.tensor([[0.3, 0.0, -0.1], [0.2, 0.2, 9.0], [5.0, 0.0, 0.0], [0.1, 0.1, 0.1]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
VALUES = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 9.0], [9.0, 9.0, 9.0], [0.0, 2.0, 4.0]])
RETURNS = torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, -9.0], [-9.0, -9.0, -9.0], [0.0, 3.0, 5.0]])


def rewards() -> RewardResult:
    """`polite` speaks of all but the last completion, `short` of all."""
    return RewardResult(
        totals=torch.tensor([1.0, 2.0, 0.0, 4.5]),
        components={
            "polite": ComponentScores(torch.tensor([0.5, 1.5, 2.5, 0.0]), torch.tensor([True, True, True, False])),
            "short": ComponentScores(torch.tensor([0.5, 0.5, 0.0, 4.5]), torch.ones(4, dtype=torch.bool)),
        },
        kept=torch.tensor([True, True, False, True]),
        dropped={"short: raised": 1},
    )


def rollout(*, texts: list[str] | None = None, sources: list[Any] | None = None) -> Rollout:
    """Scores 1, 2, 4.5; tokens 3, 2, 1, 3; all but the second completion ended."""
    return Rollout(
        prompts=Prompts(
            ids=[[1, 2], [3]],
            sources=sources or ["Hello", [{"role": "user", "content": "Bye"}]],
            columns={},
            seeds=[[1, 2], [3, 4]],
            rows=[0, 1],
        ),
        completions=[
            Completion([5, 6, 0], True),
            Completion([5, 6], False),
            Completion([0], True),
            Completion([7, 8, 0], True),
        ],
        texts=texts or ["one", "two", "", "four"],
        rewards=rewards(),
        is_clipped=torch.tensor([False, True, False, False]),
        scores=torch.tensor([1.0, 2.0, 0.0, 4.5]),
        mask=MASK,
        tokens=TokenTable(LOGPS, LOGPS - LOG_RATIOS, VALUES, torch.ones(4, 3)),
        advantages=torch.zeros(4, 3),
        returns=RETURNS,
        kl_coef=0.1,
        seconds={"generate": 0.5},
    )
