"""Attention over packed blocks as plain batched products: the CPU's kernel, and the fallback of every device.

PyTorch's fused CPU attention is slow for short segments, its backward four times more so than these products, and
slicing q, k and v per segment makes autograd add up whole tensors. One `autograd.Function` over the whole row avoids
both: gradients are written in place, and softmax rows are recomputed in the backward pass instead of being kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One lower-right-causal attention call: its queries are the last positions of the concatenated key ranges."""

    query: tuple[int, int]  # [begin, end) on the row
    keys: tuple[tuple[int, int], ...]  # ranges on the row, in order

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return self.query[1] - self.query[0], sum(end - begin for begin, end in self.keys)


class _Rule(NamedTuple):
    scale: float
    softcap: float | None


def call_biases(
    calls: tuple[Call, ...], group: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """What is added to each call's scores: 0 where a query sees a key, else −∞, `(1, group · n, m)`.

    Layers with the same window share them, so a row makes them once.

    Args:
        calls: the row's calls.
        group: query heads per key head.
        window: keys at a distance of `window` positions or more are hidden; `None` for full attention.
        dtype, device: of the scores.
    """
    biases = []
    for call in calls:
        n, m = call.shape
        distance = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)[None]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        bias = torch.zeros(n, m, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        biases.append(bias.repeat(group, 1).unsqueeze(0))
    return biases


def causal_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    calls: tuple[Call, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    biases: list[Tensor] | None = None,
) -> Tensor:
    """`softmax(mask(cap(scale · q kᵀ))) v` for every call, grouped-query heads included.

    Args:
        query: `(Hq, T, D)`.
        key, value: `(Hk, T, D)`, `Hq` a multiple of `Hk`.
        calls: their query ranges cover the row.
        scale: factor on the scores.
        window: sliding window in positions, `None` for full attention.
        softcap: `cap · tanh(score / cap)` before the mask (Gemma 2), `None` for none.
        biases: `call_biases` of these calls and this window, if they were made before.

    Returns:
        `(T, Hq, D)`, contiguous.
    """
    if biases is None:
        biases = call_biases(calls, query.shape[0] // key.shape[0], window, query.dtype, query.device)
    return _CausalProducts.apply(query, key, value, calls, biases, _Rule(scale, softcap))


class _CausalProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, calls, biases, rule):
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        by_head = out.transpose(0, 1)
        normalizers = []
        for call, bias in zip(calls, biases, strict=True):
            q, k, v = _operands(query, key, value, call)
            scores = _scores(q, k, bias, rule)[0]
            # PyTorch's bf16 maximum on a CPU is several times slower than a cast and the fp32 one.
            largest = scores.to(_wide(scores)).amax(dim=-1, keepdim=True).to(scores.dtype)
            weights = scores.sub_(largest).exp_()
            total = weights.sum(dim=-1, keepdim=True, dtype=_wide(weights))
            _write(by_head, call.query, torch.bmm(weights, v).div_(total))
            normalizers.append((largest, total))
        ctx.save_for_backward(query, key, value, *(tensor for pair in normalizers for tensor in pair))
        ctx.calls, ctx.biases, ctx.rule = calls, biases, rule
        return out

    @staticmethod
    def backward(ctx, grad):  # (T, Hq, D)
        query, key, value, *normalizers = ctx.saved_tensors
        # Laid out as the projections made them, (T, heads, D), so that no copy follows.
        grad_query, grad_key, grad_value = (
            torch.zeros_like(t.transpose(0, 1), memory_format=torch.contiguous_format).transpose(0, 1)
            for t in (query, key, value)
        )
        for number, call in enumerate(ctx.calls):
            largest, total = normalizers[2 * number : 2 * number + 2]
            q, k, v = _operands(query, key, value, call)
            # Dividing the few columns of the incoming gradient by the row sums stands for dividing all weights.
            g = grad.transpose(0, 1)[:, slice(*call.query)].reshape(q.shape[0], q.shape[1], v.shape[-1]) / total
            g = g.to(v.dtype)
            scores, slope = _scores(q, k, ctx.biases[number], ctx.rule)
            weights = scores.sub_(largest).exp_()
            mixed = torch.bmm(weights, v)  # the output before normalisation: Σ_j p_j dp_j = g · out
            inner = (mixed * g).sum(dim=-1, keepdim=True, dtype=_wide(g)).div_(total).to(g.dtype)
            _add(grad_value, call.keys, torch.bmm(weights.transpose(1, 2), g))
            grad_scores = torch.baddbmm(inner, g, v.transpose(1, 2), beta=-1).mul_(weights)
            if slope is not None:
                grad_scores.mul_(slope)
            _write(grad_query, call.query, torch.bmm(grad_scores, k).mul_(ctx.rule.scale))
            _add(grad_key, call.keys, torch.bmm(grad_scores.transpose(1, 2), q).mul_(ctx.rule.scale))
        return grad_query, grad_key, grad_value, None, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype that sums over a row are taken in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _operands(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Iterator[Tensor]:
    """Yield q `(Hk, group · n, D)`, k and v `(Hk, m, D)` of one call: a key head meets its group in one product."""
    yield query[:, slice(*call.query)].reshape(key.shape[0], -1, query.shape[-1])
    for tensor in (key, value):
        parts = [tensor[:, begin:end] for begin, end in call.keys]
        yield parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _scores(q: Tensor, k: Tensor, bias: Tensor, rule: _Rule) -> tuple[Tensor, Tensor | None]:
    """Masked scores `(Hk, group · n, m)` in the dtype of q, and the soft-cap's slope where there is a cap."""
    if rule.softcap is None:
        return torch.baddbmm(bias, q, k.transpose(1, 2), alpha=rule.scale), None
    capped = torch.bmm(q, k.transpose(1, 2)).mul_(rule.scale / rule.softcap).tanh_()
    return (capped * rule.softcap).add_(bias), 1 - capped**2


def _write(target: Tensor, span: tuple[int, int], source: Tensor) -> None:
    view = target[:, span[0] : span[1]]
    view.copy_(source.view(view.shape))


def _add(target: Tensor, spans: tuple[tuple[int, int], ...], source: Tensor) -> None:
    for (begin, end), part in zip(spans, source.split([b - a for a, b in spans], dim=1), strict=True):
        target[:, begin:end] += part
