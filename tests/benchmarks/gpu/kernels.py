"""The attention kernels and the output head by themselves: time and memory of a forward and a backward pass."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignkit.data.layout import Block
from alignkit.functional.logprobs import frozen_head_logps
from alignkit.models import attention_cuda
from alignkit.models.attention import RowAttention
from alignkit.models.attention_products import causal_products
from tests.benchmarks.gpu.card import FAILURES, GIB, described
from tests.benchmarks.gpu.memory import FIXED_LENGTHS
from tests.benchmarks.gpu.shapes import Shape
from tests.benchmarks.runs import PAIRS_PER_STEP

REPEATS = 10
SOFTCAP = 50.0
HEAD_TOKENS = 4096  # completion tokens of 8 such pairs


def run(shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """Time everything in the shape of `shape`; a kernel that fails is reported with its reason."""
    shrink = 16 if shape.hidden < 1024 else 1
    found = []
    for name, function, inputs in (*_attention(shape, device, shrink), *_heads(shape, device, shrink)):
        try:
            found.append({"name": name, **_time(function, inputs, device)})
        except FAILURES as error:
            found.append({"name": name, "note": described(error, 300)})
    return found


def table(timings: list[dict[str, Any]]) -> str:
    """Timings as markdown."""
    lines = ["| forward and backward pass of | ms | peak above inputs, GiB |", "|---|---|---|"]
    for each in timings:
        numbers = each.get("note") or f"{each['milliseconds']:.2f} | {each['peak_bytes'] / GIB:.3f}"
        lines.append(f"| {each['name']} | {numbers} |")
    return "\n".join(lines)


Timed = tuple[str, Callable[..., Tensor], list[Tensor]]


def _attention(shape: Shape, device: torch.device, shrink: int) -> list[Timed]:
    prompt, chosen, rejected = (length // shrink for length in FIXED_LENGTHS)
    pair = prompt + chosen + rejected
    blocks = tuple(Block(i * pair, prompt, (chosen, rejected)) for i in range(PAIRS_PER_STEP))
    calls, tokens, size = RowAttention(blocks).calls, PAIRS_PER_STEP * pair, shape.hidden // shape.heads
    scale = size**-0.5

    def heads(count: int, *rows: int) -> Tensor:
        return torch.randn(*rows, count, size, device=device, dtype=torch.bfloat16).transpose(-3, -2).requires_grad_()

    row = [heads(shape.heads, tokens), heads(shape.key_heads, tokens), heads(shape.key_heads, tokens)]
    width = prompt + max(chosen, rejected)
    batch = [heads(count, 2 * PAIRS_PER_STEP, width) for count in (shape.heads, shape.key_heads, shape.key_heads)]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_cuda.sdpa_attention(q, k, v, calls, scale)

    def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_products(q, k, v, calls, scale)

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    timed: list[Timed] = [
        ("attention, shared row: SDPA per call", sdpa, row),
        ("attention, shared row: products", products, row),
        ("attention, padded batch: SDPA", padded, batch),
    ]
    if device.type == "cuda":
        plan = attention_cuda.varlen_plan(calls, device)
        mask = attention_cuda.flex_mask(blocks, device, None)

        def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention_cuda.varlen_attention(q, k, v, plan, scale, None)

        def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention_cuda.flex_rows(q, k, v, mask, scale, SOFTCAP)

        timed.insert(0, ("attention, shared row: flash for variable lengths", varlen, row))
        timed.insert(1, ("attention, shared row: flex with a soft-cap", flex, row))
    return timed


def _heads(shape: Shape, device: torch.device, shrink: int) -> list[Timed]:
    tokens = HEAD_TOKENS // shrink
    hidden = torch.randn(tokens, shape.hidden, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = 0.02 * torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=torch.bfloat16)
    targets = torch.randint(shape.vocabulary, (tokens,), device=device)

    def ours(h: Tensor) -> Tensor:
        return frozen_head_logps(h, weight, None, targets)

    timed: list[Timed] = [(f"head, {tokens} tokens: alignkit", ours, [hidden])]
    if importlib.util.find_spec("trl") is not None:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        outputs = ("log_probs", "entropy", "mean_logits", "is_top1")  # what TRL's DPO asks for

        def theirs(h: Tensor) -> Tensor:
            return ChunkedLogProbFunction.apply(h, weight, None, targets, 1.0, 32768, None, 1.0, outputs)[0]

        timed.append((f"head, {tokens} tokens: TRL", theirs, [hidden]))
    return timed


def _time(function: Callable[..., Tensor], inputs: list[Tensor], device: torch.device) -> dict[str, Any]:
    def once() -> float:
        started = time.perf_counter()
        output = function(*inputs)
        torch.autograd.grad(output, inputs, torch.ones_like(output))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    for _ in range(2):  # compilation, autotuning, the allocator's first blocks
        once()
    held_bytes = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held_bytes = torch.cuda.memory_allocated(device)
    milliseconds = 1e3 * statistics.median(once() for _ in range(REPEATS))
    peak_bytes = torch.cuda.max_memory_allocated(device) - held_bytes if device.type == "cuda" else 0
    return {"milliseconds": milliseconds, "peak_bytes": peak_bytes}
