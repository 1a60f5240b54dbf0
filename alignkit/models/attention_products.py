"""Attention over packed blocks as plain batched products: the CPU's kernel, and the fallback of every device.

PyTorch's fused CPU attention is slow for short segments, its backward four times more so than these products, and
slicing q, k and v per segment makes autograd add up whole tensors. One `autograd.Function` over the whole row avoids
both: gradients are written in place, and long rows of probabilities are recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Probabilities of calls with at most this many keys are kept for the backward pass. A token then keeps 2 · heads · keys
# bytes a layer, little beside its other activations; a longer row would keep more than it saves time.
KEPT_KEYS = 256
# Queries of one product. Fewer leave out more of what causality hides; many more products would cost more than that.
TILE_QUERIES = 128


class Call(NamedTuple):
    """One lower-right-causal attention call: its queries are the last positions of the concatenated key ranges."""

    query: tuple[int, int]  # [begin, end) on the row
    keys: tuple[tuple[int, int], ...]  # ranges on the row, in order

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return self.query[1] - self.query[0], sum(end - begin for begin, end in self.keys)

    def tiles(self) -> Iterator[Call]:
        """Yield calls of at most `TILE_QUERIES` queries each that together are this one."""
        begin, end = self.query
        count = -(-(end - begin) // TILE_QUERIES)
        for tile in range(count):
            first, last = (begin + (end - begin) * edge // count for edge in (tile, tile + 1))
            *before, (start, _) = self.keys
            yield Call((first, last), (*before, (start, last)))


class _Rule(NamedTuple):
    scale: float
    softcap: float | None


def call_biases(
    calls: tuple[Call, ...], group: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """What is added to each call's scores: 0 where a query sees a key, else −∞, `(1, n · group, m)`.

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
        biases.append(bias.repeat_interleave(group, dim=0).unsqueeze(0))
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
        queries = _grouped(query, key.shape[0])
        out = queries.new_empty(*queries.shape[:3], value.shape[-1])  # (Hk, T, group, D)
        kept = []
        for call, bias in zip(calls, biases, strict=True):
            scores, slope = _scores(_rows(queries, call), _keys(key, call), bias, rule)
            probs = _softmax(scores)
            torch.bmm(probs, _keys(value, call), out=_rows(out, call))
            kept.append(probs if _is_kept(call, slope) else None)
        ctx.save_for_backward(queries, key, value, out, *kept)
        ctx.calls, ctx.biases, ctx.rule = calls, biases, rule
        return out.transpose(0, 1).reshape(query.shape[1], query.shape[0], -1)

    @staticmethod
    def backward(ctx, grad):  # (T, Hq, D)
        queries, key, value, out, *kept = ctx.saved_tensors
        scale = ctx.rule.scale
        grads = _grouped(grad.transpose(0, 1), key.shape[0])
        # Σ_j p_j dp_j of a query is the product of its output and the output's gradient.
        inner = torch.linalg.vecdot(grads, out).unsqueeze(-1)  # (Hk, T, group, 1)
        grad_queries = torch.empty_like(queries)
        # Laid out as the projections made them, (T, Hk, D), so that no copy follows.
        grad_key, grad_value = (
            torch.zeros_like(t.transpose(0, 1), memory_format=torch.contiguous_format).transpose(0, 1)
            for t in (key, value)
        )
        for call, bias, probs in zip(ctx.calls, ctx.biases, kept, strict=True):
            q, g, k, slope = _rows(queries, call), _rows(grads, call), _keys(key, call), None
            if probs is None:
                scores, slope = _scores(q, k, bias, ctx.rule)
                probs = _softmax(scores)
            _add(grad_value, call, torch.bmm(probs.transpose(1, 2), g))
            v = _keys(value, call).transpose(1, 2)
            grad_scores = torch.baddbmm(_rows(inner, call), g, v, beta=-1).mul_(probs)
            if slope is not None:
                grad_scores.mul_(slope)
            target = _rows(grad_queries, call)
            torch.baddbmm(target, grad_scores, k, beta=0, alpha=scale, out=target)
            _add(grad_key, call, torch.bmm(grad_scores.transpose(1, 2), q), scale)
        by_head = grad_queries.transpose(0, 1).reshape(*grad.shape[:2], -1).transpose(0, 1)
        return by_head, grad_key, grad_value, None, None, None


def _grouped(tensor: Tensor, key_heads: int) -> Tensor:
    """`(Hq, T, D)` as `(Hk, T, group, D)`, contiguous: one product takes a key head's whole group, without copies."""
    return tensor.unflatten(0, (key_heads, -1)).transpose(1, 2).contiguous()


def _rows(tensor: Tensor, call: Call) -> Tensor:
    """The call's queries of `(Hk, T, group, D)`, a view `(Hk, n · group, D)`."""
    return tensor[:, slice(*call.query)].flatten(1, 2)


def _keys(tensor: Tensor, call: Call) -> Tensor:
    """The call's keys or values of `(Hk, T, D)`: `(Hk, m, D)`."""
    parts = [tensor[:, begin:end] for begin, end in call.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, fp32 inside: PyTorch's bf16 one is slower on a CPU as well as coarser."""
    return torch.softmax(scores.to(_wide(scores)), dim=-1).to(scores.dtype)


def _is_kept(call: Call, slope: Tensor | None) -> bool:
    return slope is None and call.shape[1] <= KEPT_KEYS


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype that sums over a row are taken in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _scores(q: Tensor, k: Tensor, bias: Tensor, rule: _Rule) -> tuple[Tensor, Tensor | None]:
    """Masked scores `(Hk, n · group, m)` in the dtype of q, and the soft-cap's slope where there is a cap."""
    if rule.softcap is None:
        return torch.baddbmm(bias, q, k.transpose(1, 2), alpha=rule.scale), None
    capped = torch.bmm(q, k.transpose(1, 2)).mul_(rule.scale / rule.softcap).tanh_()
    return (capped * rule.softcap).add_(bias), 1 - capped**2


def _add(target: Tensor, call: Call, source: Tensor, factor: float = 1.0) -> None:
    """Add `factor · source` `(Hk, m, D)` to the call's keys of `target` `(Hk, T, D)`."""
    for (begin, end), part in zip(call.keys, source.split([b - a for a, b in call.keys], dim=1), strict=True):
        target[:, begin:end].add_(part, alpha=factor)
