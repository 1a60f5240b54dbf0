"""From token scores to the loss of each row: the arithmetic between a forward pass and `combine`.

The loss of a batch is a function of a few numbers per row, its *features*: the policy's log-probabilities of both
completions, and under LD-DPO their plain sums besides. That is what lets a micro-batch run in chunks: the derivative by
the features is exact for the whole batch, and each chunk's backward pass multiplies it in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.data.layout import Layout
from alignkit.functional.divergence import get_divergence
from alignkit.functional.preference import (
    LOSSES,
    LossOptions,
    LossSpec,
    PairLogps,
    PairTokens,
    PreferenceLoss,
    combine,
)
from alignkit.functional.sequence import ld_dpo_logps, sequence_logps, split_pairs, wpo_weights
from alignkit.models.scoring import TokenScores
from alignkit.trainers.config import DPOConfig


def _own_process(kl: Tensor) -> Tensor:
    return kl


@dataclass(frozen=True)
class Objective:
    """The loss that a configuration asks for.

    Attributes:
        losses: the mix, as `(spec, weight)`.
        options: the scalars that the losses read.
        ld_alpha: LD-DPO's weight of the tokens beyond the shorter completion; `None` for plain sums.
        use_weighting: whether WPO's weights multiply the rows.
        average_kl: mean over processes of KTO's KL estimate.
    """

    losses: tuple[tuple[LossSpec, float], ...]
    options: LossOptions
    ld_alpha: float | None = None
    use_weighting: bool = False
    average_kl: Callable[[Tensor], Tensor] = _own_process

    @classmethod
    def from_config(cls, args: DPOConfig, average_kl: Callable[[Tensor], Tensor] = _own_process) -> Objective:
        """Read the objective out of a validated configuration."""
        weights = args.loss_weights or [1.0] * len(args.loss_type)
        options = LossOptions(
            beta=args.beta,
            label_smoothing=args.label_smoothing,
            discopop_tau=args.discopop_tau,
            simpo_gamma=args.simpo_gamma,
            cpo_alpha=args.cpo_alpha,
            dpop_lambda=args.dpop_lambda,
            desirable_weight=args.desirable_weight,
            undesirable_weight=args.undesirable_weight,
            divergence=get_divergence(args.f_divergence_type, alpha_coef=args.f_alpha_divergence_coef),
        )
        losses = tuple((LOSSES[name], weight) for name, weight in zip(args.loss_type, weights, strict=True))
        return cls(losses, options, args.ld_alpha, args.use_weighting, average_kl)

    @property
    def needs_reference(self) -> bool:
        """Whether any loss of the mix compares with a reference."""
        return any(spec.needs_reference for spec, _ in self.losses)

    @property
    def couples_rows(self) -> bool:
        """Whether a row's gradient depends on the other rows of its micro-batch."""
        return any(spec.couples_rows for spec, _ in self.losses)

    @property
    def is_unpaired(self) -> bool:
        """Whether rows are single completions with labels (KTO)."""
        return any(spec.unpaired for spec, _ in self.losses)

    def features(self, scores: TokenScores, layout: Layout) -> Tensor:
        """Sum token log-probabilities by completion: `(B, 2)`, or `(B, 4)` with the plain sums under LD-DPO."""
        plain = split_pairs(sequence_logps(scores.logps, layout.sequence_index, layout.num_sequences))
        if self.ld_alpha is None:
            return torch.stack(plain, dim=1)
        index, position = layout.sequence_index, layout.completion_position
        weighted = split_pairs(ld_dpo_logps(scores.logps, index, position, layout.pair_tokens, alpha=self.ld_alpha))
        return torch.stack([*weighted, *plain], dim=1)

    def weights(self, scores: TokenScores, layout: Layout) -> Tensor | None:
        """WPO's weights `(B,)`, or `None`."""
        if scores.square_sums is None:
            return None
        return wpo_weights(scores.logps, scores.square_sums, layout.sequence_index, layout.pair_tokens)

    def __call__(
        self,
        features: Tensor,
        reference: PairLogps | None,
        tokens: PairTokens,
        columns: Mapping[str, Tensor],
        pair_weights: Tensor | None = None,
    ) -> PreferenceLoss:
        """Return each row's loss, multiplied by its `weight` column, and its rewards.

        Args:
            features: of the policy.
            reference: log-probabilities under the reference; `None` where no loss needs them.
            tokens: completion lengths.
            columns: further columns of the batch: `margin`, `label`, `weight`, each `(B,)`.
            pair_weights: from `weights`.
        """
        policy = PairLogps(features[:, 0], features[:, 1])
        result = combine(
            self.losses,
            policy,
            reference,
            options=self.options,
            tokens=tokens,
            margin=columns.get("margin"),
            label=columns.get("label"),
            kl=self._kl(policy, reference),
            unweighted=None if self.ld_alpha is None else PairLogps(features[:, 2], features[:, 3]),
            pair_weights=pair_weights,
        )
        return result._replace(losses=result.losses * columns["weight"]) if "weight" in columns else result

    def slopes(
        self,
        features: Tensor,
        reference: PairLogps | None,
        tokens: PairTokens,
        columns: Mapping[str, Tensor],
        pair_weights: Tensor | None = None,
    ) -> tuple[Tensor, PreferenceLoss]:
        """Return the summed loss's derivative by each feature, `(B, F)`, and the rows' result; arguments as above."""
        leaf = features.detach().requires_grad_()
        with torch.enable_grad():
            result = self(leaf, reference, tokens, columns, pair_weights)
            (slopes,) = torch.autograd.grad(result.losses.sum(), leaf)
        return slopes, result

    def _kl(self, policy: PairLogps, reference: PairLogps | None) -> Tensor | None:
        """KTO's estimate of KL(policy || reference) from the mismatched completions, over all processes."""
        if not self.is_unpaired or reference is None:
            return None
        return self.average_kl((policy.rejected - reference.rejected).mean().detach()).clamp(min=0)
