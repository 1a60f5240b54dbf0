"""Where a step's time goes, by kind of work."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

GROUPS = ("matrix products", "LoRA", "attention", "head", "elementwise and copies", "optimizer", "python and other")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul")


class StepProfiler(TrainerCallback):
    """Profile one optimizer step on the CPU; `groups` then holds seconds by kind of work.

    Args:
        step: the step to profile, counted from 1.
        vocabulary: products with a dimension of this size belong to the head.
        rank: products with a dimension of this size belong to LoRA.
    """

    def __init__(self, step: int, vocabulary: int, rank: int) -> None:
        self.step, self.vocabulary, self.rank = step, vocabulary, rank
        self.groups: dict[str, float] = {}
        self._profile: profile | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self._profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True)
            self._profile.start()
            self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profile is None:
            return
        wall_seconds = time.perf_counter() - self._started
        self._profile.stop()
        seconds: Counter[str] = Counter()
        for event in self._profile.events():
            seconds[self._group(event)] += event.self_cpu_time_total / 1e6
        seconds["python and other"] += max(0.0, wall_seconds - sum(seconds.values()))
        self.groups = {name: seconds[name] for name in GROUPS}
        self._profile = None

    def _group(self, event: Any) -> str:
        names = [ancestor.name for ancestor in _with_ancestors(event)]
        sizes = {size for shape in event.input_shapes for size in shape if isinstance(size, int)}
        if any(name.startswith("Optimizer.") for name in names):
            return "optimizer"
        if self.vocabulary in sizes or any("_FrozenHead" in name or "ChunkedLogProb" in name for name in names):
            return "head"
        if any("CausalProducts" in name or "scaled_dot_product" in name for name in names):
            return "attention"
        if event.name in _PRODUCTS or "mkldnn" in event.name:
            return "LoRA" if self.rank in sizes else "matrix products"
        if any("_LoraProduct" in name for name in names):
            return "LoRA"
        return "elementwise and copies" if event.name.startswith("aten::") else "python and other"


def _with_ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent
