"""The collection of one rollout: generate, reward, score, shape, take advantages, and tell callbacks on the way."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from datasets import Dataset

from alignkit.errors import TrainingError
from alignkit.functional.kl import k1
from alignkit.rollout.collect import AdvantageRule, Rollout, advantages_of, scored, token_mask
from alignkit.rollout.mix import why_all_dropped
from alignkit.trainers.guards import ROW_ID
from alignkit.trainers.pooled import Pooled
from alignkit.trainers.ppo_callbacks import steps_per_rollout
from alignkit.trainers.ppo_data import take_prompts
from alignkit.trainers.ppo_metrics import ensemble_metrics, rollout_metrics
from alignkit.trainers.ppo_setup import reward_shaping, spreads
from alignkit.trainers.ppo_state import gathered, pooled_moments

if TYPE_CHECKING:
    from alignkit.trainers.ppo import PPOTrainer


@torch.no_grad()
def collect_rollout(trainer: PPOTrainer, rows: list[int]) -> Rollout:
    """Collect the episodes of these rows of the training data, with the policy as it is.

    The KL coefficient moves afterwards; the rollout itself keeps the one that it began with.

    Raises:
        TrainingError: every sample of every process was dropped.
    """
    args, state = trainer.args, trainer.ppo_state
    key = f"{args.seed}/{trainer.state.global_step // steps_per_rollout(args)}"
    metrics: dict[str, Pooled] = {}
    moments_before = state.moments.state_dict()
    trainer.event("on_rollout_begin")
    prompts = take_prompts(cast(Dataset, trainer.train_dataset), rows, args.num_generations, key)
    completions, texts, rewards, seconds = trainer.complete(prompts, temperature=args.temperature)
    if not gathered(rewards.kept).any():  # of all processes; one of them may have lost all of its own
        raise TrainingError(f"{why_all_dropped(rewards)} There is nothing to learn from.")
    trainer.event("on_rewards", rewards=rewards, metrics=metrics)
    moments = state.moments if args.normalize_rewards else None
    if moments is not None:
        moments.update(gathered(rewards.totals[rewards.kept]))
    scores, is_clipped = scored(rewards, completions, reward_shaping(args), moments)
    mask = token_mask(completions, rewards.kept)
    started = time.perf_counter()
    tokens = trainer.score(prompts.ids, [completion.ids for completion in completions])
    seconds["score"] = time.perf_counter() - started
    rule = _advantage_rule(trainer)
    advantages, returns = advantages_of(scores, rewards.kept, mask, tokens, args.num_generations, rule)
    rollout = Rollout(
        prompts=prompts,
        completions=completions,
        texts=texts,
        rewards=rewards,
        is_clipped=is_clipped,
        scores=scores,
        mask=mask,
        tokens=tokens,
        advantages=advantages,
        returns=returns,
        kl_coef=state.kl_coef,
        seconds=seconds,
    )
    if _is_bad(trainer, rollout):
        state.moments.load_state_dict(moments_before)
        return rollout
    trainer.event("on_values", tokens=tokens, returns=returns, mask=mask, metrics=metrics)
    metrics |= rollout_metrics(rollout, kl_coef=rule.kl_coef) | ensemble_metrics(spreads(trainer.rewards))
    trainer.event("on_rollout_end", rollout=rollout, metrics=metrics, kl_coef=rollout.kl_coef, moments=moments)
    state.window.add(metrics)
    if args.kl_target is not None:
        kl = torch.where(mask, k1(tokens.logps, tokens.ref_logps), 0).sum(1)  # (B,)
        state.adapt_kl(gathered(kl[rewards.kept]), args.kl_target, args.kl_horizon)
    return rollout


def _is_bad(trainer: PPOTrainer, rollout: Rollout) -> bool:
    """Whether any process's rollout holds a number that is not finite; none of its steps will move a weight then."""
    guard, kept, mask = trainer.guard, rollout.rewards.kept, rollout.mask
    guard.begin_step()
    guard.look(
        {ROW_ID: torch.tensor(rollout.prompts.rows).repeat_interleave(rollout.generations)},
        {
            "reward": torch.where(kept, rollout.rewards.totals, 0),
            "log-probability": torch.where(mask, rollout.tokens.logps + rollout.tokens.ref_logps, 0),
            "value": torch.where(mask, rollout.tokens.values, 0),
            # Scores and advantages are brought to one mean: those of one row spoil them all.
            "advantage": rollout.scores.sum() + torch.where(mask, rollout.advantages + rollout.returns, 0).sum(),
        },
    )
    bad = guard.bad_quantities()
    guard.is_resting = bool(bad)
    if bad:
        trainer.count_bad_step(bad, guard.bad_rows(), steps_per_rollout(trainer.args))
    return guard.is_resting


def _advantage_rule(trainer: PPOTrainer) -> AdvantageRule:
    args = trainer.args
    return AdvantageRule(
        estimator=args.advantage_estimator,
        kl_coef=trainer.ppo_state.kl_coef if args.kl_place == "reward" else 0.0,
        gamma=args.gamma,
        lam=args.lam,
        whiten_rewards=args.whiten_rewards,
        whiten_advantages=args.whiten_advantages,
        pool=partial(pooled_moments, accelerator=trainer.accelerator),
    )
