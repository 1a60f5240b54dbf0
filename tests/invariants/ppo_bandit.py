"""Tiny worlds whose optimal policy is known, and PPO on them, out of the functions that the trainer uses.

A world is the list of everything that can be said in it: sequences of tokens with a reward each. Its optimum under
`E[r] − β KL(π ‖ π_ref)` is `π*(y) = π_ref(y) exp(r(y) / β) / Z` over whole sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from alignkit.functional.advantages import gae, leave_one_out
from alignkit.functional.kl import k1
from alignkit.functional.logprobs import frozen_head_logps
from alignkit.functional.masked import masked_mean, masked_scale, masked_whiten
from alignkit.functional.ppo import clipped_policy_loss, clipped_value_loss, shaped_rewards

BETA = 0.5
JUNK = 1e3  # stands in every padded place
GROUP = 8  # completions per prompt for RLOO
Estimator = Callable[[Tensor, Tensor], Tensor]
LossTerm = Callable[[Tensor, Tensor, Tensor], Tensor]  # (logps, ref_logps, mask), all (B, T) -> (B, T)


class World(NamedTuple):
    """All sequences of a world, padded to a common length."""

    tokens: Tensor  # (S, T)
    states: Tensor  # (S, T) in which state each token is chosen
    mask: Tensor  # (S, T)
    rewards: Tensor  # (S,)
    ref_logps: Tensor  # (states, V)

    @property
    def optimum(self) -> Tensor:
        """Log-probabilities of π* over sequences, `(S,)`."""
        return (self.sequence_logps(self.ref_logps) + self.rewards / BETA).log_softmax(0)

    def token_logps(self, table: Tensor) -> Tensor:
        return torch.where(self.mask, table[self.states, self.tokens], 0)

    def sequence_logps(self, table: Tensor) -> Tensor:
        return self.token_logps(table).sum(1)


def bandit() -> World:
    """One token out of 8, and one column of padding."""
    tokens = torch.stack([torch.arange(8), torch.zeros(8, dtype=torch.long)], dim=1)
    mask = torch.tensor([True, False]).expand(8, 2)
    rewards = torch.tensor([0.9, -0.6, 0.3, 1.2, -1.0, 0.1, 0.6, -0.2], dtype=torch.float64)
    ref = torch.tensor([[0.5, 1.0, -0.7, -0.3, 0.2, 0.8, -1.1, 0.0]], dtype=torch.float64)
    return World(tokens, torch.zeros_like(tokens), mask, rewards, ref.log_softmax(-1))


def two_steps() -> World:
    """Token 0 ends an episode; after any other a second token is chosen, in the state named by the first."""
    said = [(0, 0), *itertools.product((1, 2, 3), range(4))]
    tokens = torch.tensor(said)
    mask = torch.stack([torch.ones(13, dtype=torch.bool), tokens[:, 0] > 0], dim=1)
    states = torch.stack([torch.zeros(13, dtype=torch.long), tokens[:, 0]], dim=1)
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(13, generator=generator, dtype=torch.float64)
    return World(tokens, states, mask, rewards, torch.randn(4, 4, generator=generator).double().log_softmax(-1))


def per_token(estimator: Estimator) -> LossTerm:
    """An estimator of each token's log-ratio."""
    return lambda logps, ref_logps, mask: estimator(logps, ref_logps)


def per_completion(estimator: Estimator) -> LossTerm:
    """An estimator of the whole completion's log-ratio, put where its first token is."""

    def term(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
        sums = [torch.where(mask, values, 0).sum(1) for values in (logps, ref_logps)]
        is_first = torch.arange(mask.shape[1]) == 0
        return torch.where(is_first, estimator(*sums).unsqueeze(1), 0)

    return term


class Actor:
    """A table of hidden states under a frozen head, which starts as the reference, and a value for each state.

    With a shared trunk the value is a second, trained head on the same hidden states.
    """

    def __init__(self, world: World, *, shared: bool) -> None:
        count, vocabulary = world.ref_logps.shape
        generator = torch.Generator().manual_seed(1)
        self.head = torch.eye(vocabulary, dtype=torch.float64)
        self.hidden = world.ref_logps.clone()
        self.shared = shared
        if shared:
            noise = torch.randn(vocabulary, vocabulary + count, generator=generator, dtype=torch.float64)
            self.head = torch.linalg.qr(noise.T).Q.T  # (V, H), orthonormal rows
            self.hidden = self.hidden @ self.head
        self.hidden.requires_grad_()
        size = self.hidden.shape[1] if shared else count
        self.value = torch.zeros(size, dtype=torch.float64, requires_grad=True)

    def table(self) -> Tensor:
        """Log-probabilities, `(states, V)`."""
        return (self.hidden @ self.head.T).log_softmax(-1).detach()

    def values(self) -> Tensor:
        """`(states,)`."""
        return self.hidden @ self.value if self.shared else self.value

    def logps(self, world: World) -> Tensor:
        """Log-probabilities of the tokens, `(B, T)`, junk in the padding."""
        found = frozen_head_logps(self.hidden[world.states[world.mask]], self.head, None, world.tokens[world.mask])
        return torch.full(world.mask.shape, -JUNK, dtype=torch.float64).masked_scatter(world.mask, found)


class Rollout(NamedTuple):
    """Some episodes, `(B, T)` each but weights and rewards."""

    world: World  # of these episodes alone
    weights: Tensor  # (B,) that average to 1
    old_logps: Tensor
    old_values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What is varied. The defaults are PPO with k1 in the reward."""

    kl_reward: Estimator | None = k1
    kl_loss: LossTerm | None = None
    epochs: int = 1
    minibatches: int = 1
    episodes: int = 0  # 0: every sequence, weighed by its chance, which is an exact expectation
    shared_value: bool = False
    critic: bool = True  # False: RLOO
    whiten: bool = False
    scale_rewards: bool = False
    kl_coef: float = BETA
    rollouts: int = 250
    learning_rate: float = 0.1


def scored_tokens(said: World) -> Tensor:
    """Which tokens are trained on: all that were produced, the one that ends an episode among them."""
    return said.mask


def collect(actor: Actor, world: World, algorithm: Algorithm, generator: torch.Generator) -> Rollout:
    """Generate, score, shape, and compute advantages."""
    chances = world.sequence_logps(actor.table()).exp()
    if algorithm.episodes:
        drawn = torch.multinomial(chances, algorithm.episodes, replacement=True, generator=generator)
        weights = torch.ones(algorithm.episodes, dtype=torch.float64)
    else:
        drawn, weights = torch.arange(len(chances)), chances * len(chances)
    said = World(*(field[drawn] for field in world[:4]), world.ref_logps)
    said = said._replace(mask=scored_tokens(said))
    mask = said.mask
    with torch.no_grad():
        old_logps = actor.logps(said)
        old_values = torch.where(mask, actor.values()[said.states], JUNK)
    kl = torch.zeros_like(old_logps)
    if algorithm.kl_reward is not None:
        kl = torch.where(mask, algorithm.kl_reward(old_logps, said.token_logps(world.ref_logps)), JUNK)
    rewards = shaped_rewards(said.rewards, kl, mask, kl_coef=algorithm.kl_coef)
    if algorithm.scale_rewards:
        rewards = masked_scale(rewards, mask)
    if algorithm.critic:
        advantages, returns = gae(rewards, old_values, mask, gamma=1.0, lam=1.0)
    else:
        totals = leave_one_out(rewards.sum(1).view(-1, GROUP)).view(-1, 1)
        advantages, returns = totals.expand_as(mask), torch.zeros_like(rewards)
    advantages = torch.where(mask, advantages, JUNK)
    if algorithm.whiten:
        advantages = masked_whiten(advantages, mask)
    return Rollout(said, weights, old_logps, old_values, rewards, advantages, returns)


def loss_of(actor: Actor, rollout: Rollout, rows: Tensor, algorithm: Algorithm) -> Tensor:
    """PPO's loss of some rows of a rollout."""
    said = World(*(field[rows] for field in rollout.world[:4]), rollout.world.ref_logps)
    logps, mask = actor.logps(said), said.mask
    losses = clipped_policy_loss(logps, rollout.old_logps[rows], rollout.advantages[rows], cliprange=0.2).losses
    if algorithm.critic:
        values = torch.where(mask, actor.values()[said.states], -JUNK)
        old_values, returns = rollout.old_values[rows], rollout.returns[rows]
        losses = losses + clipped_value_loss(values, old_values, returns, cliprange_value=0.2).losses
    if algorithm.kl_loss is not None:
        terms = algorithm.kl_loss(logps, said.token_logps(said.ref_logps), mask)
        losses = losses + algorithm.kl_coef * terms
    return masked_mean(rollout.weights[rows, None] * losses, mask)


def train(world: World, algorithm: Algorithm) -> Actor:
    """Run PPO, with a learning rate that falls to zero as Trainer's does."""
    actor, generator = Actor(world, shared=algorithm.shared_value), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([actor.hidden, actor.value], lr=algorithm.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=algorithm.rollouts)
    for _ in range(algorithm.rollouts):
        rollout = collect(actor, world, algorithm, generator)
        count = len(rollout.weights)
        for _ in range(algorithm.epochs):
            for rows in torch.randperm(count, generator=generator).chunk(algorithm.minibatches):
                optimizer.zero_grad()
                loss_of(actor, rollout, rows, algorithm).backward()
                optimizer.step()
        schedule.step()
    return actor


def distance(world: World, actor: Actor, target: Tensor | None = None) -> float:
    """KL(π ‖ target) over sequences in nats; the target is π* unless given."""
    logps = world.sequence_logps(actor.table())
    return (logps.exp() * (logps - (world.optimum if target is None else target))).sum().item()
