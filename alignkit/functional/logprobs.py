"""Log-probabilities of chosen tokens without a `(tokens, vocabulary)` tensor that outlives its chunk.

Everything here takes hidden states that were already gathered at the positions that predict a target, so prompts and
padding cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Scored = TypeVar("Scored")

# fp32 logits that one chunk may hold. Small on a CPU: glibc serves blocks past 32 MiB by mmap, and faulting fresh
# pages in costs several times the arithmetic; large enough on a GPU to fill it.
CPU_CHUNK_BYTES = 28 * 2**20
GPU_CHUNK_BYTES = 256 * 2**20


class Logits(NamedTuple):
    """How the product with the head becomes logits: `softcap · tanh(scale · z / softcap) / temperature`.

    `scale` is Cohere's `logit_scale` (or 1 / Granite's `logits_scaling`); `softcap` is Gemma 2's
    `final_logit_softcapping`, `None` where there is none. `temperature`, positive, is not the model's but the
    sampler's: tokens that were drawn at a temperature have their log-probabilities under the distribution that they
    were drawn from.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, product: Tensor) -> Tensor:
        """Map the head's product to logits.

        Scale and cap act in the product's own dtype, as in the models themselves; the temperature in fp32 at least, as
        in a sampler.
        """
        logits = product if self.scale == 1.0 else product * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.temperature == 1.0:
            return logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the logits with respect to the product, from the logits themselves (fp32)."""
        slope = self.scale / self.temperature
        if self.softcap is None:
            return slope
        return slope * (1 - (logits * (self.temperature / self.softcap)) ** 2)


class TokenStatistics(NamedTuple):
    """Diagnostics per token, each `(N,)`: entropy in nats, the mean logit, and whether the target is the arg-max."""

    entropy: Tensor
    mean_logit: Tensor
    is_top1: Tensor


class LogpsEntropy(NamedTuple):
    """Per token, each `(N,)` in nats and with gradient."""

    logps: Tensor  # log-probability of the target
    entropy: Tensor  # of the distribution that the target was drawn from


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Return how many tokens are scored at once, from the memory that their fp32 logits would take."""
    budget_bytes = CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    return max(16, budget_bytes // (4 * vocabulary))


def frozen_head_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logits: Logits = Logits()
) -> Tensor:
    """Log-probabilities of `targets` under a head whose own weights are not trained.

    `log p(target) = z_target − log Σ_v exp z_v`, with `z = logits(hidden · weightᵀ + bias)`. Its gradient with respect
    to `hidden` is `(δ_target − softmax(z)) · z' · weight`, which is formed in the forward pass, chunk by chunk, and
    merely multiplied in the backward pass: two products with the head in all, and none recomputed. The difference is
    formed in fp32 before the cast, because `weight[target] − softmax · weight` cancels in bf16 where p is near 1.

    Args:
        hidden: last hidden states at the predicting positions, `(N, H)`.
        weight: the head, `(V, H)`, in any dtype; products run in the dtype of `hidden`.
        bias: `(V,)` or `None`.
        targets: token ids, `(N,)`.
        logits: scaling and soft-capping of the architecture.

    Returns:
        `(N,)`, fp32 (fp64 for fp64 input), differentiable with respect to `hidden` only.
    """
    weight = weight.to(hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _FrozenHead.apply(hidden, weight, bias, targets, logits)
    out = hidden.new_empty(hidden.shape[0], dtype=_statistics_dtype(hidden))
    for rows, z in _logit_chunks(hidden, lambda h: F.linear(h, weight, bias), logits):
        out[rows] = _target_logps(z, targets[rows])
    return out


def frozen_head_logps_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logits: Logits = Logits()
) -> LogpsEntropy:
    """Log-probabilities of `targets` and entropies, both with gradient, under a head that is not trained itself.

    `H = −Σ_v p_v log p_v`, with `∂H / ∂z_v = −p_v (log p_v + H)`. As in `frozen_head_logps`, both directions are formed
    in the forward pass and merely multiplied in the backward pass: three products with the head in all. Arguments are
    those of `frozen_head_logps`, and the log-probabilities are the same numbers.
    """
    weight = weight.to(hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return LogpsEntropy(*_FrozenHeadWithEntropy.apply(hidden, weight, bias, targets, logits))
    logps, entropy = (hidden.new_empty(hidden.shape[0], dtype=_statistics_dtype(hidden)) for _ in range(2))
    for rows, z in _logit_chunks(hidden, lambda h: F.linear(h, weight, bias), logits):
        logps[rows], entropy[rows] = _target_logps_entropy(z, targets[rows])
    return LogpsEntropy(logps, entropy)


def recomputed_head_logps(
    hidden: Tensor, project: Callable[[Tensor], Tensor], targets: Tensor, logits: Logits = Logits()
) -> Tensor:
    """Log-probabilities of `targets` under a head that is trained, whole or through an adapter.

    Same value as `frozen_head_logps`; gradients reach the head's own parameters too, so each chunk's product is
    computed again in the backward pass instead of being kept.

    Args:
        hidden: `(N, H)`.
        project: the head, `(n, H) -> (n, V)`; called once per chunk, and once more in the backward pass.
        targets: `(N,)`.
        logits: scaling and soft-capping of the architecture.
    """

    def score(h: Tensor, t: Tensor) -> Tensor:
        return _target_logps(logits(project(h)).to(_statistics_dtype(h)), t)

    return torch.cat(_checkpointed(score, hidden, project, targets))


def recomputed_head_logps_entropy(
    hidden: Tensor, project: Callable[[Tensor], Tensor], targets: Tensor, logits: Logits = Logits()
) -> LogpsEntropy:
    """Log-probabilities of `targets` and entropies, both with gradient, under a head that is trained.

    Same values as `frozen_head_logps_entropy`; arguments and memory as in `recomputed_head_logps`.
    """

    def score(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return _target_logps_entropy(logits(project(h)).to(_statistics_dtype(h)), t)

    logps, entropy = zip(*_checkpointed(score, hidden, project, targets), strict=True)
    return LogpsEntropy(torch.cat(logps), torch.cat(entropy))


@torch.no_grad()
def log_sum_square_probs(hidden: Tensor, project: Callable[[Tensor], Tensor], logits: Logits = Logits()) -> Tensor:
    """`log Σ_v p_v²` per token, `(N,)`: the normaliser of WPO's weights (arXiv 2406.11827, Eq. 2). No gradient."""
    out = hidden.new_empty(hidden.shape[0], dtype=_statistics_dtype(hidden))
    for rows, z in _logit_chunks(hidden, project, logits):
        out[rows] = F.softmax(z, dim=-1).square_().sum(-1).log()
    return out


@torch.no_grad()
def token_statistics(
    hidden: Tensor, project: Callable[[Tensor], Tensor], targets: Tensor, logits: Logits = Logits()
) -> TokenStatistics:
    """Entropy, mean logit and arg-max agreement per token, `(N,)` each. No gradient."""
    stats_dtype = _statistics_dtype(hidden)
    entropy, mean_logit = (hidden.new_empty(hidden.shape[0], dtype=stats_dtype) for _ in range(2))
    is_top1 = torch.empty(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    for rows, z in _logit_chunks(hidden, project, logits):
        logps = F.log_softmax(z, dim=-1)
        entropy[rows] = _entropy(logps, logps.exp())
        mean_logit[rows] = z.mean(-1)
        is_top1[rows] = z.argmax(-1) == targets[rows]
    return TokenStatistics(entropy, mean_logit, is_top1)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, logits):  # (N, H), (V, H), (V,) | None, (N,)
        out = hidden.new_empty(hidden.shape[0], dtype=_statistics_dtype(hidden))
        direction = torch.empty_like(hidden)  # (N, H): −d logp / d hidden
        for rows, z in _logit_chunks(hidden, lambda h: F.linear(h, weight, bias), logits):
            logps = F.log_softmax(z, dim=-1)
            out[rows] = _gather(logps, targets[rows])
            difference = _by_product(_minus_logps_slope(logps.exp_(), targets[rows]), logits, z)  # fp32
            torch.mm(difference.to(weight.dtype), weight, out=direction[rows])
        ctx.save_for_backward(direction)
        return out

    @staticmethod
    def backward(ctx, grad):  # (N,)
        (direction,) = ctx.saved_tensors
        return direction * -grad.to(direction.dtype).unsqueeze(-1), None, None, None, None


class _FrozenHeadWithEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, logits):  # (N, H), (V, H), (V,) | None, (N,)
        out, entropy = (hidden.new_empty(hidden.shape[0], dtype=_statistics_dtype(hidden)) for _ in range(2))
        direction, entropy_direction = torch.empty_like(hidden), torch.empty_like(hidden)  # (N, H), both negative
        for rows, z in _logit_chunks(hidden, lambda h: F.linear(h, weight, bias), logits):
            logps = F.log_softmax(z, dim=-1)
            out[rows] = _gather(logps, targets[rows])
            probs = logps.exp()
            entropy[rows] = _entropy(logps, probs)
            entropy_slope = _by_product(logps.add_(entropy[rows, None]).mul_(probs), logits, z)
            torch.mm(entropy_slope.to(weight.dtype), weight, out=entropy_direction[rows])
            difference = _by_product(_minus_logps_slope(probs, targets[rows]), logits, z)
            torch.mm(difference.to(weight.dtype), weight, out=direction[rows])
        ctx.save_for_backward(direction, entropy_direction)
        return out, entropy

    @staticmethod
    def backward(ctx, grad, entropy_grad):  # (N,), (N,)
        direction, entropy_direction = ctx.saved_tensors
        total = direction * grad.to(direction.dtype).unsqueeze(-1)
        total.addcmul_(entropy_direction, entropy_grad.to(direction.dtype).unsqueeze(-1))
        return total.neg_(), None, None, None, None


def _minus_logps_slope(probs: Tensor, targets: Tensor) -> Tensor:
    """`p − δ_target`, `(n, V)`: minus the target's log-probability by the logits. Overwrites `probs`."""
    target = targets[:, None]  # (n, 1)
    return probs.scatter_add_(-1, target, -torch.ones_like(target, dtype=probs.dtype))


def _by_product(slope: Tensor, logits: Logits, z: Tensor) -> Tensor:
    """A derivative by the logits `z`, in place, as one by the product with the head."""
    return slope if logits == Logits() else slope.mul_(logits.slope(z))


def _checkpointed(
    score: Callable[[Tensor, Tensor], Scored], hidden: Tensor, project: Callable[[Tensor], Tensor], targets: Tensor
) -> list[Scored]:
    """What `score(hidden, targets)` returns for each chunk; the backward pass computes a chunk again."""
    if hidden.shape[0] == 0:
        return [score(hidden, targets)]
    step = chunk_tokens(_vocabulary(project, hidden), hidden.device)
    chunks = zip(hidden.split(step), targets.split(step), strict=True)
    return [checkpoint(score, h, t, use_reentrant=False) for h, t in chunks]


def _logit_chunks(
    hidden: Tensor, project: Callable[[Tensor], Tensor], logits: Logits
) -> Iterator[tuple[slice, Tensor]]:
    """Yield `(rows, z)` with `z` the `(n, V)` logits of `hidden[rows]` in the dtype that statistics are taken in."""
    total = hidden.shape[0]
    step = chunk_tokens(_vocabulary(project, hidden), hidden.device) if total else 1
    for start in range(0, total, step):
        rows = slice(start, min(start + step, total))
        yield rows, logits(project(hidden[rows])).to(_statistics_dtype(hidden))


def _vocabulary(project: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    return project(hidden[:0]).shape[-1]


def _target_logps(z: Tensor, targets: Tensor) -> Tensor:
    return _gather(F.log_softmax(z, dim=-1), targets)


def _target_logps_entropy(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logps = F.log_softmax(z, dim=-1)
    return _gather(logps, targets), _entropy(logps, logps.exp())


def _gather(logps: Tensor, targets: Tensor) -> Tensor:
    return logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _entropy(logps: Tensor, probs: Tensor) -> Tensor:
    return -(probs * logps).sum(-1)


def _statistics_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
