"""PPO and RLOO reach the optimum that theory promises, and the wrong ways of penalising KL do not.

The worlds are small enough for exact expectations, so most runs have no sampling noise at all; the sampled ones add
minibatches, whitening and padding that holds junk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.functional.advantages import Advantages, gae
from alignkit.functional.kl import KL_PLACES, k1, k2, k3
from alignkit.functional.masked import masked_whiten
from alignkit.functional.ppo import shaped_rewards
from tests.invariants import ppo_bandit
from tests.invariants.ppo_bandit import (
    BETA,
    Algorithm,
    World,
    bandit,
    distance,
    per_completion,
    per_token,
    train,
    two_steps,
)

WORLDS = {"one token": bandit(), "two tokens": two_steps()}
K2_LOSS: dict[str, Any] = {"kl_reward": None, "kl_loss": per_completion(k2)}
SAMPLED: dict[str, Any] = {"episodes": 256, "minibatches": 2}
FOUR_EPOCHS: dict[str, Any] = {"epochs": 4, "rollouts": 40}
ONE_EPOCH: dict[str, Any] = {"epochs": 1, "rollouts": 120}
EXACT_RUNS = {
    f"{kl_name}, {value} value, {epochs['epochs']} epochs": Algorithm(**kl, **epochs, shared_value=value == "shared")
    for kl_name, kl in (("k1 in the reward", {}), ("k2 as a loss", K2_LOSS))
    for value in ("separate", "shared")
    for epochs in (ONE_EPOCH, FOUR_EPOCHS)
}
SAMPLED_RUNS = {
    "k1 in the reward, whitened": Algorithm(**SAMPLED, **FOUR_EPOCHS, shared_value=True, whiten=True),
    "k1 in the reward, rewards scaled": Algorithm(**SAMPLED, **FOUR_EPOCHS, scale_rewards=True),
    "k2 as a loss": Algorithm(**K2_LOSS, **SAMPLED, **FOUR_EPOCHS),
    "RLOO": Algorithm(**SAMPLED, **ONE_EPOCH, critic=False),
    "RLOO, 4 epochs": Algorithm(**SAMPLED, **FOUR_EPOCHS, critic=False),
}


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> World:
    return WORLDS[request.param]


def reference_distance(world: World) -> float:
    logps = world.sequence_logps(world.ref_logps)
    return (logps.exp() * (logps - world.optimum)).sum().item()


def soft_values(world: World) -> Tensor:
    """What a state is worth under π*: `V(s) = β log Σ_y π_ref(y | s) exp(r(y) / β)` over what can follow it."""
    exponents = world.token_logps(world.ref_logps)
    values = [BETA * (exponents.sum(1) + world.rewards / BETA).logsumexp(0)]
    for state in range(1, len(world.ref_logps)):
        rows = world.states[:, 1] == state
        values.append(BETA * (exponents[rows, 1] + world.rewards[rows] / BETA).logsumexp(0))
    return torch.stack(values)


def test_the_optimum_is_far_from_where_training_starts(world) -> None:
    assert reference_distance(world) > 0.5


@pytest.mark.parametrize("run", EXACT_RUNS)
def test_ppo_reaches_the_optimal_policy(run, world) -> None:
    actor = train(world, EXACT_RUNS[run])
    assert distance(world, actor) < 1e-3
    if run.startswith("k1"):
        torch.testing.assert_close(actor.values().detach(), soft_values(world), rtol=0, atol=0.02)


@pytest.mark.parametrize("run", SAMPLED_RUNS)
def test_sampled_runs_reach_the_optimal_policy(run, world) -> None:
    assert distance(world, train(world, SAMPLED_RUNS[run])) < 0.01


# Which gradient an estimator really has. `up` maps a table of logits to a number; every sum is an exact expectation.


def gradient_of(up: Callable[[Tensor], Tensor], world: World) -> Tensor:
    """Gradient by the logits, at a policy that is neither the reference nor the optimum."""
    offset = torch.randn(world.ref_logps.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits = (world.ref_logps + offset).requires_grad_()
    return torch.autograd.grad(up(world.sequence_logps(logits.log_softmax(-1))), logits)[0]


def expected_loss(estimator, ref: Tensor) -> Callable[[Tensor], Tensor]:
    """E[estimator], the gradient flowing through the estimator and not through the chances."""
    return lambda logps: (logps.detach().exp() * estimator(logps, ref)).sum()


def expected_reward(estimator, ref: Tensor) -> Callable[[Tensor], Tensor]:
    """E[estimator · log π], the estimator being a number: the policy gradient of a penalty."""
    return lambda logps: (logps.detach().exp() * estimator(logps, ref).detach() * logps).sum()


def test_gradients_of_the_estimators(world) -> None:
    ref = world.sequence_logps(world.ref_logps)
    towards = gradient_of(lambda logps: (logps.exp() * (logps - ref)).sum(), world)  # ∇KL(π ‖ π_ref)
    away = gradient_of(lambda logps: (ref.exp() * (ref - logps)).sum(), world)  # ∇KL(π_ref ‖ π)
    assert (towards - away).norm() > 0.1 * towards.norm()
    for expected, found in (
        (towards, expected_reward(k1, ref)),
        (towards, expected_loss(k2, ref)),
        (away, expected_loss(k3, ref)),
        (torch.zeros_like(towards), expected_loss(k1, ref)),
        (towards - away, expected_reward(k3, ref)),
    ):
        torch.testing.assert_close(gradient_of(found, world), expected, rtol=1e-9, atol=1e-12)
    k2_in_reward = gradient_of(expected_reward(k2, ref), world)
    assert torch.nn.functional.cosine_similarity(k2_in_reward.flatten(), towards.flatten(), dim=0) < 0.9


def test_k2_in_the_reward_collapses() -> None:
    """Tokens that fall below the reference die out, whatever share the optimum gives them."""
    world = WORLDS["one token"]
    actor = train(world, Algorithm(kl_reward=k2, rollouts=400))
    logps, ref = actor.table()[0], world.ref_logps[0]
    fell = logps < ref
    assert 3 <= fell.sum() <= 6
    assert (logps - world.optimum)[fell].max() < math.log(0.01)
    assert world.optimum[fell].exp().sum() > 0.2
    assert distance(world, actor) > 0.1


def test_k3_in_the_reward_diverges() -> None:
    """The rarest token becomes ever rarer: the longer the run, the further from reference and optimum."""
    world = WORLDS["one token"]
    short, long = (train(world, Algorithm(kl_reward=k3, rollouts=rollouts)) for rollouts in (100, 400))
    lowest_ratios = [(actor.table() - world.ref_logps).min().item() for actor in (short, long)]
    assert lowest_ratios[0] < math.log(1e-2)
    assert lowest_ratios[1] < 2 * lowest_ratios[0]
    assert lowest_ratios[0] < 1.5 * (world.optimum - world.ref_logps[0]).min()
    assert distance(world, long) > 0.1


def test_k1_as_a_loss_is_no_penalty_at_all() -> None:
    """Its expected gradient is zero: the run is the one without any KL term, and ends at the best token."""
    world = WORLDS["one token"]
    with_term = train(world, Algorithm(kl_reward=None, kl_loss=per_token(k1), rollouts=150))
    without = train(world, Algorithm(kl_reward=None, rollouts=150))
    torch.testing.assert_close(with_term.table(), without.table(), rtol=1e-6, atol=1e-6)
    assert with_term.table()[0, world.rewards.argmax()].exp() > 0.9
    assert distance(world, with_term) > 0.5


def test_k3_as_a_loss_rests_elsewhere() -> None:
    """At `π(y) = β π_ref(y) / (c − r(y))`, the optimum of E[r] − β KL(π_ref ‖ π)."""
    world = WORLDS["one token"]
    low, high = world.rewards.max().item() + 1e-9, world.rewards.max().item() + 10 * BETA
    for _ in range(100):  # the sum falls with c
        middle = (low + high) / 2
        total = (BETA * world.ref_logps[0].exp() / (middle - world.rewards)).sum()
        low, high = (middle, high) if total > 1 else (low, middle)
    target = (BETA * world.ref_logps[0].exp() / (low - world.rewards)).log()
    actor = train(world, Algorithm(kl_reward=None, kl_loss=per_token(k3), rollouts=400))
    assert distance(world, actor, target) < 1e-3
    assert distance(world, actor) > 0.1


def test_k2_of_single_tokens_ignores_the_divergence_to_come() -> None:
    """It rests where the first token is weighed by the mean reward that follows it, not by the soft value."""
    world = WORLDS["two tokens"]
    exponents = world.ref_logps.clone()
    second = world.mask[:, 1]
    exponents[world.tokens[second, 0], world.tokens[second, 1]] += world.rewards[second] / BETA
    table = exponents.log_softmax(-1)  # the second token's optimum, given the first
    worth = torch.where(second, table[world.states[:, 1], world.tokens[:, 1]].exp(), 1) * world.rewards
    table[0] = (world.ref_logps[0].index_add(0, world.tokens[:, 0], worth / BETA)).log_softmax(-1)
    actor = train(world, Algorithm(kl_reward=None, kl_loss=per_token(k2), rollouts=400))
    assert distance(world, actor, world.sequence_logps(table)) < 1e-3
    assert distance(world, actor) > 0.03


@pytest.mark.parametrize("options", [{"whiten": True}, {"scale_rewards": True}])
def test_whitening_beside_a_loss_term_undoes_the_penalty(options) -> None:
    world = WORLDS["one token"]
    algorithm = Algorithm(**{**K2_LOSS, **options}, **SAMPLED, **FOUR_EPOCHS)
    assert distance(world, train(world, algorithm)) > 0.3


def test_the_table_of_places_says_what_was_shown_here() -> None:
    shown = {
        "exact": {("k1", "reward"), ("k2", "loss")},
        "biased": {("k3", "loss")},
        "refused": {("k1", "loss"), ("k2", "reward"), ("k3", "reward")},
    }
    for verdict, pairs in shown.items():
        assert {pair for pair, place in KL_PLACES.items() if place.verdict == verdict} == pairs


# Planted bugs. Each would train without an error.


def penalty_as_bonus(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    return shaped_rewards(scores, kl, mask, kl_coef=-kl_coef)


def score_one_token_early(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    lengths = mask.sum(1, keepdim=True)
    early = torch.arange(mask.shape[1]) == (lengths - 2).clamp(min=0)
    return torch.where(mask, -kl_coef * kl, 0) + torch.where(early, scores[:, None], 0)


def target_of_the_next_step(rewards: Tensor, values: Tensor, mask: Tensor, **options: float) -> Advantages:
    found = gae(rewards, values, mask, **options)
    return found._replace(returns=torch.where(mask, found.returns.roll(-1, dims=1), 0))


def whitened_over_padding(values: Tensor, mask: Tensor) -> Tensor:
    return masked_whiten(values, torch.ones_like(mask))


@pytest.mark.parametrize(
    ("function", "bug", "options"),
    [
        ("shaped_rewards", penalty_as_bonus, ONE_EPOCH),
        ("shaped_rewards", score_one_token_early, ONE_EPOCH),
        ("masked_whiten", whitened_over_padding, {**SAMPLED, **FOUR_EPOCHS, "whiten": True}),
    ],
)
def test_a_planted_bug_misses_the_optimum(function, bug, options, monkeypatch) -> None:
    world = WORLDS["two tokens"]
    monkeypatch.setattr(ppo_bandit, function, bug)
    assert distance(world, train(world, Algorithm(**options))) > 0.05


def test_the_wrong_direction_misses_the_optimum() -> None:
    world = WORLDS["two tokens"]
    wrong = Algorithm(kl_reward=lambda logps, ref_logps: k1(ref_logps, logps), **ONE_EPOCH)
    assert distance(world, train(world, wrong)) > 0.05


def test_a_value_target_of_the_wrong_step_is_seen_in_the_values(monkeypatch) -> None:
    world = WORLDS["two tokens"]
    monkeypatch.setattr(ppo_bandit, "gae", target_of_the_next_step)
    values = train(world, EXACT_RUNS["k1 in the reward, separate value, 1 epochs"]).values().detach()
    assert (values - soft_values(world)).abs().max() > 0.1


def test_an_end_of_sequence_that_is_not_scored_misses_the_optimum(monkeypatch) -> None:
    world = WORLDS["two tokens"]
    monkeypatch.setattr(ppo_bandit, "scored_tokens", lambda said: said.mask & (said.tokens != 0))
    assert distance(world, train(world, Algorithm(**ONE_EPOCH))) > 0.05
