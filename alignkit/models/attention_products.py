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


class _Rule(NamedTuple):
    scale: float
    window: int | None  # keys at a distance of `window` positions or more are hidden
    softcap: float | None


def causal_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    calls: tuple[Call, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`softmax(mask(cap(scale · q kᵀ))) v` for every call, grouped-query heads included.

    Args:
        query: `(Hq, T, D)`.
        key, value: `(Hk, T, D)`, `Hq` a multiple of `Hk`.
        calls: their query ranges cover the row.
        scale: factor on the scores.
        window: sliding window in positions, `None` for full attention.
        softcap: `cap · tanh(score / cap)` before the mask (Gemma 2), `None` for none.

    Returns:
        `(T, Hq, D)`, contiguous.
    """
    return _CausalProducts.apply(query, key, value, calls, _Rule(scale, window, softcap))


class _CausalProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, calls, rule):
        heads, tokens, _ = query.shape
        out = query.new_empty(tokens, heads, value.shape[-1])
        for call in calls:
            q, k, v = _operands(query, key, value, call)
            probs = _probabilities(q, k, call, rule, heads // key.shape[0])[0]
            _scatter(out.transpose(0, 1), call.query, torch.bmm(probs.to(v.dtype), v))
        ctx.save_for_backward(query, key, value)
        ctx.calls, ctx.rule = calls, rule
        return out

    @staticmethod
    def backward(ctx, grad):  # (T, Hq, D)
        query, key, value = ctx.saved_tensors
        # Laid out as the projections made them, (T, heads, D), so that no copy follows.
        grads = [
            torch.zeros_like(t.transpose(0, 1), memory_format=torch.contiguous_format) for t in (query, key, value)
        ]
        grad_query, grad_key, grad_value = (t.transpose(0, 1) for t in grads)
        group = query.shape[0] // key.shape[0]
        for call in ctx.calls:
            q, k, v = _operands(query, key, value, call)
            probs, slope = _probabilities(q, k, call, ctx.rule, group)
            g = _gather(grad.transpose(0, 1), call.query).reshape(q.shape[0], q.shape[1], v.shape[-1])
            low = probs.to(v.dtype)
            _accumulate(grad_value, call.keys, torch.bmm(low.transpose(1, 2), g))
            grad_scores = torch.bmm(g, v.transpose(1, 2)).to(probs.dtype)
            grad_scores -= (grad_scores * probs).sum(-1, keepdim=True)
            grad_scores.mul_(probs).mul_(ctx.rule.scale if slope is None else slope.mul_(ctx.rule.scale))
            grad_scores = grad_scores.to(q.dtype)
            _scatter(grad_query, call.query, torch.bmm(grad_scores, k))
            _accumulate(grad_key, call.keys, torch.bmm(grad_scores.transpose(1, 2), q))
        return grad_query, grad_key, grad_value, None, None


def _operands(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Iterator[Tensor]:
    """Yield q `(Hk, group · n, D)`, k and v `(Hk, m, D)` of one call: a key head meets its group in one product."""
    q = _gather(query, call.query)
    yield q.reshape(key.shape[0], -1, q.shape[-1])
    for tensor in (key, value):
        yield torch.cat([tensor[:, begin:end] for begin, end in call.keys], dim=1)


def _probabilities(q: Tensor, k: Tensor, call: Call, rule: _Rule, group: int) -> tuple[Tensor, Tensor | None]:
    """Return softmax rows `(Hk, group · n, m)` in fp32 or wider, and the soft-cap's slope where there is a cap."""
    scores = torch.bmm(q, k.transpose(1, 2))
    scores = (scores if scores.dtype == torch.float64 else scores.float()).mul_(rule.scale)
    slope = None
    if rule.softcap is not None:
        scores = scores.div_(rule.softcap).tanh_()
        slope = 1 - scores**2
        scores = scores.mul_(rule.softcap)
    n, m = call.query[1] - call.query[0], k.shape[1]
    scores.view(k.shape[0], group, n, m).masked_fill_(_hidden(n, m, rule.window, q.device), -torch.inf)
    return torch.softmax(scores, dim=-1), slope


def _hidden(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """True where query `i` of `n` must not see key `j` of `m`; the last query stands at the last key."""
    distance = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)[None]
    return distance < 0 if window is None else (distance < 0) | (distance >= window)


def _gather(tensor: Tensor, span: tuple[int, int]) -> Tensor:
    return tensor[:, span[0] : span[1]]


def _scatter(target: Tensor, span: tuple[int, int], source: Tensor) -> None:
    view = target[:, span[0] : span[1]]
    view.copy_(source.view(view.shape))


def _accumulate(target: Tensor, spans: tuple[tuple[int, int], ...], source: Tensor) -> None:
    for (begin, end), part in zip(spans, source.split([b - a for a, b in spans], dim=1), strict=True):
        target[:, begin:end] += part
