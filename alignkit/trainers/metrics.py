"""Metrics of a logging window, under TRL's names.

Sums and counts stay on the device until somebody asks; then one collective call per window brings the processes
together. A metric is the mean over all its items in the window, whatever batches or processes they came from.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from alignkit.functional.preference import PairLogps, PreferenceLoss
from alignkit.models.scoring import TokenScores


class Window(Protocol):
    """Whatever was recorded since the last `means()`."""

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics over all processes, and start anew."""
        ...


class MetricWindow:
    """Running sums since the last `means()`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add the items of `values`, of any shape and possibly none, to metric `name`."""
        values = values.detach().double()
        count = torch.tensor(float(values.numel()), dtype=torch.float64, device=values.device)
        if name in self._sums:
            self._sums[name] = self._sums[name].to(values.device) + values.sum()
            self._counts[name] = self._counts[name].to(values.device) + count
        else:
            self._sums[name], self._counts[name] = values.sum(), count

    def state_dict(self) -> dict[str, Any]:
        """Return the open window."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}  # tensors here are replaced, never changed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the open window to what `state_dict` returned."""
        self._sums, self._counts = dict(state_dict["sums"]), dict(state_dict["counts"])

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return each metric's mean over all processes, and start a new window. Metrics without items are left out."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        totals = torch.stack([torch.stack([self._sums[n], self._counts[n]]) for n in names])  # (M, 2)
        totals = cast(Tensor, accelerator.reduce(totals.to(accelerator.device), reduction="sum"))
        self._sums, self._counts = {}, {}
        means = {name: (total / count) for name, (total, count) in zip(names, totals.tolist(), strict=True) if count}
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():  # also where they are of different rows (KTO)
            means.setdefault("rewards/margins", means["rewards/chosen"] - means["rewards/rejected"])
        return means


def add_batch_metrics(
    window: MetricWindow, result: PreferenceLoss, policy: PairLogps, label: Tensor | None, own: Tensor
) -> None:
    """Record `rewards/*` and `logps/*` of a batch.

    Args:
        window: where they are added.
        result: losses and rewards of the rows.
        policy: log-probs of both completions.
        label: boolean `(B,)` for unpaired rows (KTO), whose desirable ones are "chosen"; `None` for pairs.
        own: boolean `(B,)`, True for the rows that count here.
    """
    chosen, rejected = result.chosen_rewards, result.rejected_rewards
    if label is None:
        window.add("rewards/accuracies", (chosen > rejected)[own].double())
        window.add("rewards/margins", (chosen - rejected)[own])
        sides = {"chosen": (chosen, policy.chosen, own), "rejected": (rejected, policy.rejected, own)}
    else:  # each row is one completion, and lies in `.chosen`
        sides = {
            "chosen": (chosen, policy.chosen, own & label),
            "rejected": (rejected, policy.chosen, own & ~label),
        }
    for name, (rewards, logps, counted) in sides.items():
        window.add(f"rewards/{name}", rewards[counted])
        window.add(f"logps/{name}", logps[counted])


def add_token_metrics(
    window: MetricWindow, scores: TokenScores, sequence: Tensor, label: Tensor | None, own: Tensor
) -> None:
    """Record diagnostics of sampled completion tokens.

    Args:
        window: where they are added.
        scores: with statistics of `M` tokens, or none.
        sequence: the sequence that each token belongs to, `(M,)`: even ones are chosen, odd ones rejected.
        label: of unpaired rows, `(B,)`. Their odd sequences, which only serve the KL estimate, do not count.
        own: boolean `(B,)`, True for the rows that count here.
    """
    if scores.statistics is None:
        return
    entropy, mean_logit, is_top1 = scores.statistics
    row, is_first = sequence // 2, sequence % 2 == 0
    counts, is_chosen = (own[row], is_first) if label is None else (own[row] & is_first, label[row])
    window.add("entropy", entropy[counts])
    window.add("logits/chosen", mean_logit[is_chosen & counts])
    window.add("logits/rejected", mean_logit[~is_chosen & counts])
    window.add("mean_token_accuracy", is_top1[is_chosen & counts].double())


class Throughput:
    """Pairs and tokens per second of training, and the memory peak of this process."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new window."""
        self._start, self._pairs, self._tokens = time.perf_counter(), 0, 0

    def add(self, pairs: int, tokens: int) -> None:
        """Count a micro-batch; `tokens` are the positions that the model really computed."""
        self._pairs += pairs
        self._tokens += tokens

    def read(self, processes: int, device: torch.device) -> dict[str, float]:
        """Return the window's metrics, all processes taken together, and start a new one."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        metrics = {
            "pairs_per_second": processes * self._pairs / seconds,
            "tokens_per_second": processes * self._tokens / seconds,
            "peak_memory_bytes": peak_memory_bytes(device),
        }
        self.reset()
        return metrics


def add_window_metrics(
    logs: dict[str, float], windows: Mapping[str, Window], throughput: Throughput, accelerator: Accelerator
) -> None:
    """Add to an entry of the log what its window recorded: of an evaluation under its prefix, of training with speed.

    Args:
        logs: as Trainer made them.
        windows: of `"train"` and `"eval"`.
        throughput: of training.
        accelerator: of the run.
    """
    losses = [key for key in logs if key.endswith("_loss") and key != "train_loss"]
    if losses:
        evaluated = min(losses, key=len).removesuffix("loss")  # `compute_metrics` may have added longer ones
        logs |= {evaluated + name: value for name, value in windows["eval"].means(accelerator).items()}
    elif "loss" in logs:
        logs |= windows["train"].means(accelerator)
        logs |= throughput.read(accelerator.num_processes, accelerator.device)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on the CUDA device, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
