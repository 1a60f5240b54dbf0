"""One rollout: prompts in, episodes with advantages out.

A trainer generates and rewards, scores tokens, shapes, and takes advantages, in this order; what it does with the
episodes afterwards is nothing but optimizer steps. Everything random comes from the seeds that are given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignkit.functional.advantages import gae, leave_one_out
from alignkit.functional.kl import k1
from alignkit.functional.masked import Moments, masked_moments, masked_scale, masked_whiten
from alignkit.functional.ppo import shaped_rewards
from alignkit.functional.statistics import RunningMoments
from alignkit.rollout.engine import Completion, RolloutEngine, Sampling
from alignkit.rollout.mix import RewardMix, RewardResult
from alignkit.rollout.reward import RewardInputs
from alignkit.rollout.shaping import RewardShaping, shape_rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """P prompts.

    Attributes:
        ids: token ids.
        sources: as the dataset has them, text or lists of messages: what rewards are told.
        columns: further columns of the dataset.
        seeds: G integers for each prompt, one per completion.
        rows: of the data as given.
    """

    ids: list[list[int]]
    sources: list[Any]
    columns: dict[str, list[Any]]
    seeds: list[list[int]]
    rows: list[int]


class TokenTable(NamedTuple):
    """What the training engine says of every completion token, `(B, T)` each, zeros where there is no token."""

    logps: Tensor
    ref_logps: Tensor
    values: Tensor
    entropies: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageRule:
    """How scores become advantages.

    Attributes:
        estimator: "gae" or "rloo".
        kl_coef: of the KL penalty in the reward; 0 where it is a term of the loss.
        gamma, lam: GAE's.
        whiten_rewards: divide shaped rewards by their deviation.
        whiten_advantages: bring advantages to mean 0 and deviation 1.
        pool: brings the moments of all processes together.
    """

    estimator: str
    kl_coef: float
    gamma: float
    lam: float
    whiten_rewards: bool
    whiten_advantages: bool
    pool: Callable[[Moments], Moments]


@dataclass(slots=True, kw_only=True)
class Rollout:
    """B = P · G episodes of one process; those of a prompt lie side by side.

    Attributes:
        prompts: what was asked.
        completions: what came, EOS included.
        texts: the completions as text, without special tokens.
        rewards: what the sources said.
        is_clipped: whether clipping changed the reward, boolean `(B,)`.
        scores: shaped rewards `(B,)`, without the KL penalty; 0 for dropped samples.
        mask: boolean `(B, T)`, True for the tokens that are trained on; a dropped sample has none.
        tokens: log-probs, reference log-probs, values, entropies.
        advantages, returns: `(B, T)`.
        kl_coef: weight of the KL penalty of these episodes, wherever it is charged.
        seconds: what each stage took.
    """

    prompts: Prompts
    completions: list[Completion]
    texts: list[str]
    rewards: RewardResult
    is_clipped: Tensor
    scores: Tensor
    mask: Tensor
    tokens: TokenTable
    advantages: Tensor
    returns: Tensor
    kl_coef: float
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def generations(self) -> int:
        """G: completions of each prompt."""
        return len(self.completions) // len(self.prompts.ids)


class Completed(NamedTuple):
    """B completions of P prompts.

    Attributes:
        completions: token ids, EOS included.
        texts: the same as text, without special tokens.
        rewards: what the sources said.
        seconds: what generation and rewards took.
    """

    completions: list[Completion]
    texts: list[str]
    rewards: RewardResult
    seconds: dict[str, float]


@torch.no_grad()
def generate_and_reward(
    prompts: Prompts,
    engine: RolloutEngine,
    sampling: Sampling,
    tokenizer: Any,
    mix: RewardMix,
    trainer_state: Any = None,
) -> Completed:
    """Complete every prompt and have every completion rewarded."""
    started = time.perf_counter()
    completions = engine.generate(prompts.ids, prompts.seeds, sampling)
    generated = time.perf_counter()
    texts = tokenizer.batch_decode([completion.ids for completion in completions], skip_special_tokens=True)
    each = [number for number, seeds in enumerate(prompts.seeds) for _ in seeds]  # the prompt of every completion
    inputs = RewardInputs(
        prompts=[prompts.sources[number] for number in each],
        completions=[_as_asked(prompts.sources[number], text) for number, text in zip(each, texts, strict=True)],
        prompt_ids=[prompts.ids[number] for number in each],
        completion_ids=[completion.ids for completion in completions],
        columns={name: [values[number] for number in each] for name, values in prompts.columns.items()},
        trainer_state=trainer_state,
    )
    rewards = mix(inputs)
    seconds = {"generate": generated - started, "reward": time.perf_counter() - generated}
    return Completed(completions, texts, rewards, seconds)


def _as_asked(source: Any, text: str) -> Any:
    """A conversation is answered with a message, text with text."""
    return text if isinstance(source, str) else [{"role": "assistant", "content": text}]


def token_mask(completions: Sequence[Completion], kept: Tensor) -> Tensor:
    """Tokens that count, boolean `(B, T)`: every token of a kept completion, EOS included."""
    lengths = torch.tensor([len(completion.ids) for completion in completions])
    return (torch.arange(int(lengths.max())) < lengths[:, None]) & kept[:, None]


def scored(
    rewards: RewardResult,
    completions: Sequence[Completion],
    shaping: RewardShaping,
    moments: RunningMoments | None,
) -> tuple[Tensor, Tensor]:
    """Return shaped rewards `(B,)`, 0 for dropped samples, and where clipping changed them."""
    lengths = torch.tensor([len(completion.ids) for completion in completions])
    finished = torch.tensor([completion.finished for completion in completions])
    shaped = shape_rewards(rewards.totals, lengths, finished, shaping, moments)
    return torch.where(rewards.kept, shaped.scores, 0.0), shaped.is_clipped & rewards.kept


def advantages_of(
    scores: Tensor, kept: Tensor, mask: Tensor, tokens: TokenTable, generations: int, rule: AdvantageRule
) -> tuple[Tensor, Tensor]:
    """Advantages and returns `(B, T)` of shaped rewards `(B,)`.

    With "rloo" every token of a completion has the advantage of the whole, its KL penalty included, and returns are
    zeros, because no critic learns from them.
    """
    penalty = k1(tokens.logps, tokens.ref_logps)  # (B, T)
    if rule.estimator == "rloo":
        totals = scores - rule.kl_coef * torch.where(mask, penalty, 0).sum(1)
        grouped = leave_one_out(totals.view(-1, generations), kept.view(-1, generations))
        advantages, returns = torch.where(mask, grouped.view(-1, 1), 0), torch.zeros_like(tokens.logps)
    else:
        rewards = shaped_rewards(scores, penalty, mask, kl_coef=rule.kl_coef)
        if rule.whiten_rewards:
            rewards = masked_scale(rewards, mask, rule.pool(masked_moments(rewards, mask)))
        advantages, returns = gae(rewards, tokens.values, mask, gamma=rule.gamma, lam=rule.lam)
    if rule.whiten_advantages:
        advantages = masked_whiten(advantages, mask, rule.pool(masked_moments(advantages, mask)))
    return advantages, returns
