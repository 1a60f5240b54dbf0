"""What reward costs: the mean reward and the divergence from the reference of a set of checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.errors import DataError, TrainingError
from alignkit.evaluation.divergence import Samples, sample_policy
from alignkit.evaluation.estimates import Estimate, cluster_mean_interval
from alignkit.evaluation.judges import make_reward_source, source_rewards
from alignkit.evaluation.models import PolicyModel, load_policy
from alignkit.hub.record import plain
from alignkit.rollout.reward import RewardSource

_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


class FrontierPoint(NamedTuple):
    """One checkpoint.

    Attributes:
        name: what it is called.
        step: of training; None where its name does not say.
        kl: k1 from the reference in nats per completion.
        reward: mean over the same completions.
        completions: that have a reward.
    """

    name: str
    step: int | None
    kl: Estimate
    reward: Estimate
    completions: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**self._asdict(), "kl": self.kl._asdict(), "reward": self.reward._asdict()}


def find_checkpoints(folder: str | Path) -> dict[str, Path]:
    """List a run's checkpoints, and its final adapter or model last, by name.

    Raises:
        DataError: no such folder, or nothing in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"no such folder: {root}")
    found = [path for path in root.glob("checkpoint-*") if _CHECKPOINT.search(path.name) and path.is_dir()]
    checkpoints = {path.name: path for path in sorted(found, key=lambda path: _step(path.name) or 0)}
    if any((root / name).is_file() for name in ("adapter_config.json", "config.json")):
        checkpoints["final"] = root
    if not checkpoints:
        raise DataError(f"{root} holds neither checkpoints (checkpoint-*) nor an adapter: was save_strategy='no'?")
    return checkpoints


def reward_kl_frontier(
    checkpoints: Mapping[str, Any] | Sequence[Any] | str | Path,
    prompts: Any,
    reward: Any,
    *,
    each: int = 1,
    max_new_tokens: int = 96,
    seed: int = 0,
    count: int | None = None,
    split: str = "test",
    quiet: bool = False,
    **loading: Any,
) -> list[FrontierPoint]:
    """Sample from every checkpoint with the same random numbers; measure reward and divergence on the same samples.

    The frontier is that of Gao et al. 2023 (arXiv 2210.10760): a reward that rises while the divergence does is what
    training bought; one that the divergence alone would explain, or that falls as it grows, is over-optimisation.

    Args:
        checkpoints: paths, ids or models, by name or in a list; or the output folder of a run.
        prompts: as `held_out_prompts` takes them.
        reward: a reward source, a function, a classifier, or a reward adapter's folder.
        each: completions of a prompt.
        max_new_tokens: length at which they are cut.
        seed: of the samples.
        count: at most so many prompts.
        split: of a dataset given by name.
        quiet: show no progress.
        **loading: further arguments of `load_policy`.

    Raises:
        DataError: no checkpoints, no prompts, or no such folder.
        ModelError: a checkpoint that cannot be loaded, or has no reference.
        TrainingError: a completion that cannot be rewarded, or none that is.
    """
    if isinstance(checkpoints, str | Path):
        checkpoints = find_checkpoints(checkpoints)
    named = checkpoints if isinstance(checkpoints, Mapping) else {str(each): each for each in checkpoints}
    if not named:
        raise DataError("there are no checkpoints to compare")
    source = make_reward_source(reward)
    asked = {"each": each, "max_new_tokens": max_new_tokens, "seed": seed, "count": count, "split": split}
    points = []
    for name, checkpoint in named.items():
        policy = load_policy(checkpoint, **loading)
        points.append(_point(name, policy, sample_policy(policy, prompts, quiet=quiet, **asked), source))
    return points


def frontier_entry(points: Sequence[FrontierPoint]) -> dict[str, Any]:
    """Return the points as an entry for a run's record: reward and KL of each checkpoint, by its name."""
    metrics = {}
    for point in points:
        metrics |= {f"{point.name}/reward": point.reward, f"{point.name}/kl": point.kl}
    details = {"points": [point.as_dict() for point in points]}
    rows = sum(point.completions for point in points)
    return plain({"name": "frontier", "rows": rows, "metrics": metrics, "baseline": None, "details": details})


def _point(name: str, policy: PolicyModel, samples: Samples, source: RewardSource) -> FrontierPoint:
    tokenizer: Any = policy.tokenizer
    texts = [tokenizer.decode(one.ids, skip_special_tokens=True) for one in samples.completions]
    rewards = source_rewards(source, [samples.prompts.texts[number] for number in samples.clusters], texts)
    kept = [(reward, prompt) for reward, prompt in zip(rewards, samples.clusters, strict=True) if reward is not None]
    if not kept:
        raise TrainingError(f"none of the completions of '{name}' has a reward")
    mean = cluster_mean_interval([reward for reward, _ in kept], [prompt for _, prompt in kept])
    return FrontierPoint(name, _step(name), samples.kl().k1, mean, len(kept))


def _step(name: str) -> int | None:
    found = _CHECKPOINT.search(name.rstrip("/"))
    return None if found is None else int(found.group(1))
