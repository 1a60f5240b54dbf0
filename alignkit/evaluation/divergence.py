"""How far a policy has moved: the KL divergence from its reference, on samples of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignkit.errors import DataError
from alignkit.evaluation.estimates import Estimate, cluster_mean_interval, ratio_interval
from alignkit.evaluation.generation import generate_in_role
from alignkit.evaluation.models import PolicyModel
from alignkit.evaluation.prompts import HeldOutPrompts, held_out_prompts, seeds_for
from alignkit.evaluation.scoring import BATCH_TOKENS, TokenLogps, completion_logps
from alignkit.functional.kl import k1, k3
from alignkit.rollout.engine import Completion, Sampling


@dataclass(frozen=True, slots=True)
class KLSummary:
    """KL(policy ‖ reference) in nats, with intervals that draw prompts.

    k1, the mean log-ratio, is unbiased and may come out negative. k3 is unbiased too and never negative; its variance
    is small while the two are close, and large where they are far apart. Summed over tokens, both estimate the
    divergence of whole completions, up to the length at which they are cut.

    Attributes:
        completions: samples.
        k1, k3: per completion.
        k1_per_token, k3_per_token: per token: all nats over all tokens.
        tokens: per completion.
        finished: share of the completions that ended by themselves.
    """

    completions: int
    k1: Estimate
    k3: Estimate
    k1_per_token: Estimate
    k3_per_token: Estimate
    tokens: Estimate
    finished: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        figures = {
            "k1": self.k1,
            "k3": self.k3,
            "k1_per_token": self.k1_per_token,
            "k3_per_token": self.k3_per_token,
            "tokens": self.tokens,
        }
        plain = {name: estimate._asdict() for name, estimate in figures.items()}
        return {"completions": self.completions, **plain, "finished": self.finished}


@dataclass(frozen=True, slots=True)
class Samples:
    """Completions drawn from a policy, and both models' log-probabilities of their tokens."""

    prompts: HeldOutPrompts
    each: int
    completions: list[Completion]
    logps: list[TokenLogps]

    @property
    def clusters(self) -> list[int]:
        """The prompt of each completion."""
        return [number // self.each for number in range(len(self.completions))]

    def kl(self) -> KLSummary:
        """Summarize the divergence."""
        return summarize_kl(self.logps, self.clusters, [one.finished for one in self.completions])


def sample_policy(
    policy: PolicyModel,
    prompts: Any,
    *,
    each: int = 1,
    max_new_tokens: int = 96,
    seed: int = 0,
    count: int | None = None,
    split: str = "test",
    batch_tokens: int = BATCH_TOKENS,
    quiet: bool = False,
) -> Samples:
    """Draw completions from the policy, at temperature 1 from all of its distribution, and score their tokens.

    Args:
        policy: with a reference.
        prompts: as `held_out_prompts` takes them.
        each: completions of a prompt.
        max_new_tokens: length at which they are cut.
        seed: the same seed draws the same completions.
        count: at most so many prompts.
        split: of a dataset given by name.
        batch_tokens: most tokens in one forward pass of scoring.
        quiet: show no progress.

    Raises:
        DataError: no prompt, or too many that cannot be used.
        ModelError: a policy without a reference.
        TrainingError: numbers that are not finite.
    """
    asked = held_out_prompts(policy, prompts, max_new_tokens=max_new_tokens, split=split, count=count)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    completions = generate_in_role(
        policy.bundle, policy.tokenizer, asked.ids, seeds_for(len(asked), each, seed), sampling, quiet=quiet
    )
    groups = [
        (ids, *(one.ids for one in completions[number * each : (number + 1) * each]))
        for number, ids in enumerate(asked.ids)
    ]
    logps = completion_logps(policy, groups, batch_tokens=batch_tokens, what="KL", quiet=quiet)
    return Samples(asked, each, completions, logps)


def kl_from_reference(policy: PolicyModel, prompts: Any, **options: Any) -> KLSummary:
    """Estimate KL(policy ‖ reference) on the policy's own samples; see `sample_policy` for the arguments."""
    return sample_policy(policy, prompts, **options).kl()


def summarize_kl(logps: Sequence[TokenLogps], clusters: Sequence[int], finished: Sequence[bool]) -> KLSummary:
    """Summarize the divergence of completions that were drawn from the policy.

    Args:
        logps: of each completion's tokens.
        clusters: the prompt of each.
        finished: whether each ended by itself.

    Raises:
        DataError: no completion.
    """
    if not logps:
        raise DataError("there is no completion to measure a divergence on")
    tokens = [len(one.policy) for one in logps]
    of_k1, of_k3 = (
        torch.stack([estimator(one.policy, one.reference).sum() for one in logps]).numpy() for estimator in (k1, k3)
    )
    return KLSummary(
        completions=len(logps),
        k1=cluster_mean_interval(of_k1, clusters),
        k3=cluster_mean_interval(of_k3, clusters),
        k1_per_token=ratio_interval(of_k1, tokens, clusters),
        k3_per_token=ratio_interval(of_k3, tokens, clusters),
        tokens=cluster_mean_interval(tokens, clusters),
        finished=sum(finished) / len(finished),
    )
