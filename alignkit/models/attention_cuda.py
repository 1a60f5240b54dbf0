"""Attention over packed blocks on CUDA: flash attention for variable lengths, flex attention, and SDPA per call.

Every function takes q `(Hq, T, D)`, k and v `(Hk, T, D)` and returns `(T, Hq, D)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from alignkit.data.layout import Block
from alignkit.models.attention_products import Call

# torch 2.11 groups heads without being asked, and does not know the argument.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


class VarlenPlan(NamedTuple):
    """Where the calls' keys lie on the row, and the calls' boundaries, in tokens."""

    key_index: Tensor  # (K,) positions on the row: keys of shared prefixes occur once per call that reads them
    query_offsets: Tensor  # (calls + 1,) int32
    key_offsets: Tensor  # (calls + 1,) int32
    max_queries: int
    max_keys: int


def varlen_plan(calls: tuple[Call, ...], device: torch.device) -> VarlenPlan:
    """Lay the calls' keys end to end; their queries already are, because calls cover the row in order."""
    queries = [end - begin for (begin, end), _ in calls]
    keys = [sum(end - begin for begin, end in call.keys) for call in calls]
    index = torch.cat([torch.arange(begin, end) for call in calls for begin, end in call.keys])
    offsets = [torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32) for counts in (queries, keys)]
    return VarlenPlan(index.to(device), offsets[0], offsets[1], max(queries), max(keys))


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, scale: float, window: int | None
) -> Tensor:
    """One flash-attention call for the whole row; causal masks align at the last query and the last key."""
    key, value = (t.transpose(0, 1).index_select(0, plan.key_index) for t in (key, value))
    out = varlen_attn(
        query.transpose(0, 1).contiguous(),
        key,
        value,
        plan.query_offsets,
        plan.key_offsets,
        plan.max_queries,
        plan.max_keys,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **GROUPED,
    )
    assert isinstance(out, Tensor)  # a tuple only where the log-sum-exp is asked for
    return out


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, calls: tuple[Call, ...], scale: float) -> Tensor:
    """One SDPA call per attention call: GPUs without flash attention (Turing), and fp32."""
    group = query.shape[0] // key.shape[0]
    key, value = (t.repeat_interleave(group, dim=0) if group > 1 else t for t in (key, value))
    sizes = [end - begin for (begin, end), _ in calls]
    outputs = []
    # `split` has one backward for all parts; slices would each fill and add a whole row.
    for call, part in zip(calls, query.split(sizes, dim=1), strict=True):
        q = part.unsqueeze(0)
        k, v = (torch.cat([t[:, a:b] for a, b in call.keys], dim=1).unsqueeze(0) for t in (key, value))
        bias = causal_lower_right(q.shape[2], k.shape[2])
        outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)[0])
    return torch.cat(outputs, dim=1).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class RowIndex:
    """Per position of a packed row, `(T,)` each: its block, its tail (0 = prefix), its place in its sequence, and how
    many of the row's first tokens its sequence begins with.
    """

    block: Tensor
    tail: Tensor
    position: Tensor
    root: Tensor

    def visible(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Flex attention's `mask_mod`: root, prefix and one's own tail, at or before one's own position."""

        def mask(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = (self.block[q] == self.block[k]) & ((self.tail[k] == 0) | (self.tail[k] == self.tail[q]))
            distance = self.position[q] - self.position[k]
            seen = (same | (k < self.root[q])) & (distance >= 0)
            return seen if window is None else seen & (distance < window)

        return mask


def row_index(blocks: tuple[Block, ...], device: torch.device) -> RowIndex:
    """Describe every position of a packed row for flex attention."""
    block, tail, position, roots = [], [], [], []
    for number, (_, prefix, tails, root) in enumerate(blocks):
        block.append(torch.full((prefix + sum(tails),), number))
        roots.append(torch.full((prefix + sum(tails),), root))
        tail.append(torch.zeros(prefix, dtype=torch.long))
        position.append(torch.arange(root, root + prefix))
        for which, length in enumerate(tails, start=1):
            tail.append(torch.full((length,), which))
            position.append(torch.arange(root + prefix, root + prefix + length))
    return RowIndex(*(torch.cat(parts).to(device) for parts in (block, tail, position, roots)))


def flex_mask(blocks: tuple[Block, ...], device: torch.device, window: int | None) -> BlockMask:
    """Flex attention's block mask of a packed row."""
    index = row_index(blocks, device)
    tokens = index.block.numel()
    return create_block_mask(index.visible(window), None, None, tokens, tokens, device=str(device))


def flex_rows(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, softcap: float | None
) -> Tensor:
    """Flex attention with Gemma 2's soft-cap on the scores."""

    def cap(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    out = _flex_kernel(query.device.type)(
        query[None], key[None], value[None], score_mod=cap, block_mask=mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


@cache
def _flex_kernel(device_type: str) -> Callable[..., Tensor]:
    # Uncompiled flex attention materialises all scores; a CPU has no compiled backward anyway.
    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention
