"""From log-probabilities of tokens to log-probabilities of sequences.

Token tensors are flat, (N,): the completion tokens of all sequences of a batch in any order, with `sequence_index` (N,)
naming each token's sequence. The sequences of pair i are numbered `2 i` (chosen) and `2 i + 1` (rejected).
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit.functional.preference_types import PairLogps, PairTokens


def sequence_logps(token_logps: Tensor, sequence_index: Tensor, num_sequences: int) -> Tensor:
    """Sum token log-probabilities by sequence: `log pi(y|x) = sum_t log pi(y_t | x, y_<t)`.

    Half-precision inputs are summed in float32. A sequence without tokens gets 0.

    Args:
        token_logps: (N,) in nats.
        sequence_index: (N,) int64, each in [0, num_sequences).
        num_sequences: S.

    Returns:
        (S,) in nats, float32 (float64 for float64 input).
    """
    dtype = torch.promote_types(token_logps.dtype, torch.float32)
    sums = torch.zeros(num_sequences, dtype=dtype, device=token_logps.device)
    return sums.index_add(0, sequence_index, token_logps.to(dtype))


def split_pairs(logps: Tensor) -> PairLogps:
    """Split per-sequence log-probabilities (2B,), ordered chosen, rejected, chosen, ..., into pairs."""
    return PairLogps(chosen=logps[0::2], rejected=logps[1::2])


def ld_dpo_logps(
    token_logps: Tensor,
    sequence_index: Tensor,
    position_in_completion: Tensor,
    tokens: PairTokens,
    *,
    alpha: float,
) -> Tensor:
    """Length-desensitised log-probabilities, LD-DPO (arXiv 2409.06411).

    Tokens within the length of the pair's shorter completion count fully, those beyond it count `alpha` times. With
    `alpha = 1` these are the plain sums, with `alpha = 0` both completions are cut to the shared length.

    Args:
        token_logps: (N,) in nats.
        sequence_index: (N,) int64.
        position_in_completion: (N,) int64, 0 at a completion's first token.
        tokens: completion lengths of the B pairs.
        alpha: weight in [0, 1] of the tail.

    Returns:
        (2B,) in nats; `split_pairs` makes pairs of them.
    """
    shared_tokens = torch.minimum(tokens.chosen, tokens.rejected)  # (B,)
    in_shared = position_in_completion < shared_tokens[sequence_index // 2]  # (N,)
    return sequence_logps(
        torch.where(in_shared, token_logps, alpha * token_logps), sequence_index, 2 * len(shared_tokens)
    )


def wpo_weights(token_logps: Tensor, log_sum_sq_probs: Tensor, sequence_index: Tensor, tokens: PairTokens) -> Tensor:
    """Weights of WPO, Eq. 2 of arXiv 2406.11827 with the aligned normalisation, as in TRL.

    `w(x, y) = exp(mean_t(log pi(y_t) - log sum_v pi(v)^2))`; a pair's weight is the product of its completions'. A pair
    that the policy would hardly write itself weighs little.

    Args:
        token_logps: (N,) in nats.
        log_sum_sq_probs: (N,) log of the sum of squared probabilities over the vocabulary at each token's position.
        sequence_index: (N,) int64.
        tokens: completion lengths of the B pairs.

    Returns:
        (B,) positive, detached.
    """
    aligned = (token_logps - log_sum_sq_probs).detach()
    means = tokens.mean_logps(split_pairs(sequence_logps(aligned, sequence_index, 2 * len(tokens.chosen))))
    return torch.exp(means.chosen + means.rejected)
