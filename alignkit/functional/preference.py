"""Preference losses: one pure function each, and the registry that everything else reads.

Adding a loss is one function, one row of `LOSSES`, one golden number. Configuration checks, error texts, the table in
the documentation and the tests are made from the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.errors import ConfigError, nearest
from alignkit.functional.divergence import Divergence, reverse_kl
from alignkit.functional.preference_pairwise import (
    discopop,
    dpop,
    exo_pair,
    hinge,
    ipo,
    ipo_sum,
    robust,
    sigmoid,
    sigmoid_norm,
)
from alignkit.functional.preference_pointwise import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    kto,
    nca_pair,
    sppo_hard,
)
from alignkit.functional.preference_reference_free import cpo, orpo, sft, simpo
from alignkit.functional.preference_types import PairLogps, PairTokens, PreferenceLoss

__all__ = [
    "LOSSES",
    "LossOptions",
    "LossSpec",
    "PairLogps",
    "PairTokens",
    "PreferenceLoss",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "combine",
    "cpo",
    "discopop",
    "dpop",
    "exo_pair",
    "get_loss",
    "hinge",
    "ipo",
    "ipo_sum",
    "kto",
    "nca_pair",
    "orpo",
    "robust",
    "sft",
    "sigmoid",
    "sigmoid_norm",
    "simpo",
    "sppo_hard",
]

REQUIRED_TENSORS = frozenset({"tokens", "label"})  # the others that a loss may read have a meaning when absent


@dataclass(frozen=True)
class LossOptions:
    """Every scalar that some loss reads; `LossSpec.options` says which loss reads which."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    dpop_lambda: float = 50.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    divergence: Divergence = reverse_kl


@dataclass(frozen=True)
class LossSpec:
    """One row of `LOSSES`: a loss, and what a caller must know to use it."""

    name: str
    function: Callable[..., PreferenceLoss]
    summary: str  # one line for tables
    paper: str  # arXiv id; empty where there is none
    options: frozenset[str] = frozenset()  # configuration fields read besides beta
    reads: frozenset[str] = frozenset()  # tensors read besides policy and ref: tokens, margin, label, kl, unweighted
    needs_reference: bool = True
    couples_rows: bool = False  # a row's loss depends on the other rows of the batch
    supports_f_divergence: bool = False  # accepted with another divergence than reverse KL
    supports_weighting: bool = True  # may be multiplied by WPO weights, row by row
    unpaired: bool = False  # rows are (completion, label), not pairs

    @property
    def reads_divergence(self) -> bool:
        """Whether the function takes `divergence`; `sft`, which has no log-ratio, is the same under all of them."""
        return self.supports_f_divergence and self.needs_reference


def _set(*names: str) -> frozenset[str]:
    return frozenset(names)


LOSSES: dict[str, LossSpec] = {
    spec.name: spec
    for spec in (
        LossSpec(
            "sigmoid",
            sigmoid,
            "DPO: logistic loss on the reward difference; cDPO with label_smoothing, ODPO with a margin column",
            "2305.18290",
            options=_set("label_smoothing"),
            reads=_set("margin"),
            supports_f_divergence=True,
        ),
        LossSpec("hinge", hinge, "SLiC's hinge on the reward difference", "2305.10425", supports_f_divergence=True),
        LossSpec(
            "ipo",
            ipo,
            "IPO: squared distance of the per-token log-ratio difference to 1/(2 beta)",
            "2310.12036",
            reads=_set("tokens"),
            supports_f_divergence=True,
        ),
        LossSpec("ipo_sum", ipo_sum, "IPO as printed, on summed log-ratios", "2310.12036", supports_f_divergence=True),
        LossSpec(
            "exo_pair",
            exo_pair,
            "EXO: reverse KL to the smoothed label; needs label_smoothing > 0",
            "2402.00856",
            options=_set("label_smoothing"),
            supports_f_divergence=True,
        ),
        LossSpec("nca_pair", nca_pair, "NCA: raises the chosen completion's absolute likelihood", "2402.05369"),
        LossSpec(
            "robust",
            robust,
            "DPO made unbiased under labels flipped with chance label_smoothing",
            "2403.00409",
            options=_set("label_smoothing"),
            supports_f_divergence=True,
        ),
        LossSpec("bco_pair", bco_pair, "BCO: a binary classifier over completions", "2404.04656"),
        LossSpec("sppo_hard", sppo_hard, "SPPO with hard win rates: squared error on each log-ratio", "2405.00675"),
        LossSpec(
            "aot",
            aot,
            "AOT: the policy's margins dominate the reference's, rank by rank",
            "2406.05882",
            options=_set("label_smoothing"),
            couples_rows=True,
            supports_weighting=False,
        ),
        LossSpec(
            "aot_unpaired",
            aot_unpaired,
            "AOT: chosen log-ratios dominate rejected ones, rank by rank",
            "2406.05882",
            options=_set("label_smoothing"),
            couples_rows=True,
            supports_weighting=False,
        ),
        LossSpec("apo_zero", apo_zero, "APO for chosen completions better than the model's own", "2408.06266"),
        LossSpec("apo_down", apo_down, "APO for chosen completions worse than the model's own", "2408.06266"),
        LossSpec(
            "discopop",
            discopop,
            "DiscoPOP: a blend of logistic and exponential loss",
            "2406.08414",
            options=_set("discopop_tau"),
            supports_f_divergence=True,
        ),
        LossSpec(
            "sft",
            sft,
            "negative log-likelihood of the chosen completions, mean over the batch's tokens",
            "",
            reads=_set("tokens", "unweighted"),
            needs_reference=False,
            couples_rows=True,
            supports_f_divergence=True,
        ),
        LossSpec(
            "sigmoid_norm",
            sigmoid_norm,
            "length-normalised DPO",
            "2411.15124",
            reads=_set("tokens"),
            supports_f_divergence=True,
        ),
        LossSpec(
            "simpo",
            simpo,
            "SimPO: per-token log-probabilities with a target margin, no reference",
            "2405.14734",
            options=_set("simpo_gamma"),
            reads=_set("tokens"),
            needs_reference=False,
        ),
        LossSpec(
            "orpo",
            orpo,
            "ORPO: likelihood plus a log odds ratio, no reference",
            "2403.07691",
            reads=_set("tokens", "unweighted"),
            needs_reference=False,
        ),
        LossSpec(
            "cpo",
            cpo,
            "CPO: logistic loss on log-probabilities plus likelihood, no reference",
            "2401.08417",
            options=_set("cpo_alpha"),
            reads=_set("tokens", "unweighted"),
            needs_reference=False,
        ),
        LossSpec(
            "kto",
            kto,
            "KTO: desirable and undesirable completions, not pairs",
            "2402.01306",
            options=_set("desirable_weight", "undesirable_weight"),
            reads=_set("label", "kl"),
            couples_rows=True,
            supports_weighting=False,
            unpaired=True,
        ),
        LossSpec(
            "dpop",
            dpop,
            "DPO-Positive: DPO with a penalty when the chosen completion becomes less likely",
            "2402.13228",
            options=_set("dpop_lambda"),
        ),
    )
}


def get_loss(name: str) -> LossSpec:
    """Return the row of `LOSSES` called `name`.

    Raises:
        ConfigError: `name` is unknown; the message offers the nearest name.
    """
    if name not in LOSSES:
        raise ConfigError(f"unknown loss_type {name!r}; one of {sorted(LOSSES)}.{nearest(name, LOSSES)}")
    return LOSSES[name]


def _check(
    spec: LossSpec,
    ref: PairLogps | None,
    options: LossOptions,
    tensors: dict[str, Tensor | PairTokens | PairLogps | None],
    pair_weights: Tensor | None,
) -> None:
    """Raise ConfigError if `spec` cannot be evaluated with what the caller gave."""
    if spec.needs_reference and ref is None:
        raise ConfigError(f"loss {spec.name!r} compares with a reference: give `ref`")
    for name in spec.reads & REQUIRED_TENSORS:
        if tensors[name] is None:
            raise ConfigError(f"loss {spec.name!r} reads `{name}`: give it")
    if pair_weights is not None and not spec.supports_weighting:
        raise ConfigError(
            f"loss {spec.name!r} cannot be weighted by pair: leave `pair_weights` out (use_weighting=False)"
        )
    if options.divergence is not reverse_kl and not spec.supports_f_divergence:
        supported = sorted(name for name, row in LOSSES.items() if row.supports_f_divergence)
        raise ConfigError(
            f"loss {spec.name!r} has no form for another divergence than reverse_kl; these do: {supported}"
        )


def combine(
    losses: Sequence[tuple[LossSpec, float]],
    policy: PairLogps,
    ref: PairLogps | None,
    *,
    options: LossOptions,
    tokens: PairTokens | None = None,
    margin: Tensor | None = None,
    label: Tensor | None = None,
    kl: Tensor | None = None,
    unweighted: PairLogps | None = None,
    pair_weights: Tensor | None = None,
) -> PreferenceLoss:
    """Evaluate a weighted mix, `losses_i = pair_weight_i * sum_k w_k * loss_k,i`, with the rewards of the first loss.

    Each loss gets the options and tensors that its row of the registry names, and no others.

    Args:
        losses: (spec, weight) of each loss, at least one.
        policy: log-probabilities under the model in training.
        ref: the same under the reference; None if no loss needs it.
        options: scalars, beta among them.
        tokens: completion lengths.
        margin: (B,) ODPO margins; None is no margin.
        label: (B,) boolean, True for desirable rows.
        kl: scalar KL estimate for KTO; None estimates it from the batch.
        unweighted: plain sums of the policy where `policy` is weighted by LD-DPO.
        pair_weights: (B,) detached WPO weights.

    Raises:
        ConfigError: no loss, or one lacks something that it needs, or cannot be used with these options or weights.
    """
    if not losses:
        raise ConfigError("no loss given: name at least one")
    if len({spec.unpaired for spec, _ in losses}) > 1:
        names = [spec.name for spec, _ in losses]
        raise ConfigError(f"losses {names} mix pairs with unpaired rows: train them on separate datasets")
    tensors = {"tokens": tokens, "margin": margin, "label": label, "kl": kl, "unweighted": unweighted}
    results = []
    for spec, _ in losses:
        _check(spec, ref, options, tensors, pair_weights)
        keywords = {name: vars(options)[name] for name in spec.options | {"beta"}}
        keywords |= {name: tensors[name] for name in spec.reads}
        if spec.reads_divergence:
            keywords["divergence"] = options.divergence
        results.append(spec.function(policy, ref, **keywords))
    mix = torch.stack([weight * result.losses for (_, weight), result in zip(losses, results, strict=True)]).sum(0)
    return results[0]._replace(losses=mix if pair_weights is None else mix * pair_weights)
