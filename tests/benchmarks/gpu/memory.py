"""What fits a card of a given memory, and how fast: an 8B-shaped model with LoRA, alignkit against TRL."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

import alignkit
from tests.benchmarks.gpu.card import GIB, Clock, capped, free, quiet
from tests.benchmarks.gpu.shapes import Shape, hh_lengths, large_model, token_rows, word_tokenizer
from tests.benchmarks.runs import LEARNING_RATE, LORA_RANK, PAIRS_PER_STEP

WARMUP_STEPS, TIMED_STEPS = 1, 2
FIXED_LENGTHS = (512, 256, 256)
SHORTEST_PAIR, LONGEST_PAIR = 1024, 32768  # tokens of prompt, chosen and rejected together


@dataclass(frozen=True, slots=True)
class Plan:
    """A way to make a step of `PAIRS_PER_STEP` pairs; where it does not fit, `halves` says to try smaller batches."""

    name: str
    side: str
    pairs_per_batch: int
    settings: dict[str, Any] = field(default_factory=dict)
    halves: bool = False


OURS = Plan("alignkit, checkpointing off", "alignkit", PAIRS_PER_STEP, {"activation_checkpointing": False})
OURS_CHECKPOINTING = Plan("alignkit, checkpointing on", "alignkit", PAIRS_PER_STEP, {"activation_checkpointing": True})
TRL_DEFAULT = Plan("TRL, defaults", "trl", PAIRS_PER_STEP, halves=True)
TRL_ONE = Plan("TRL, batch 1, checkpointing off", "trl", 1, {"gradient_checkpointing": False})
TRL_ONE_CHECKPOINTING = Plan("TRL, batch 1, checkpointing on", "trl", 1)
STEP_PLANS = (OURS, OURS_CHECKPOINTING, TRL_DEFAULT, TRL_ONE, TRL_ONE_CHECKPOINTING)
LENGTH_PLANS = (OURS_CHECKPOINTING, TRL_ONE_CHECKPOINTING)


@dataclass(slots=True)
class Measurement:
    """One plan on one card.

    Attributes:
        seconds: per optimizer step, median; `None` where it did not fit.
        peak_bytes: largest allocated memory, weights included; 0 on a CPU.
        first_grad_norm: must agree between sides up to rounding, which shows that they did the same work.
    """

    cap_gb: float
    data: str
    plan: str
    pairs_per_batch: int
    fits: bool
    seconds: float | None = None
    peak_bytes: int = 0
    first_loss: float | None = None
    first_grad_norm: float | None = None
    note: str = ""


class Bench:
    """Measure plans on one shape, until `deadline` (of `time.monotonic`) is past."""

    def __init__(self, shape: Shape, device: torch.device, deadline: float) -> None:
        self.shape, self.device, self.deadline = shape, device, deadline
        self.tokenizer: PreTrainedTokenizerFast = word_tokenizer(shape.vocabulary)
        self.has_trl = importlib.util.find_spec("trl") is not None
        self.is_tiny = shape.hidden < 1024

    def steps(self, cap_gb: float) -> list[Measurement]:
        """Time a step of 8 pairs with every plan, on pairs of one length and on a mix of lengths."""
        shrink = 16 if self.is_tiny else 1
        count = PAIRS_PER_STEP * (WARMUP_STEPS + TIMED_STEPS)
        lengths = {
            "512 + 256 + 256": [tuple(n // shrink for n in FIXED_LENGTHS)] * count,
            "mix": hh_lengths(count, shrink=shrink),
        }
        found = []
        for data, each in lengths.items():
            rows = token_rows(each, self.shape.vocabulary)
            for plan in STEP_PLANS:
                found += self._with_smaller_batches(cap_gb, data, plan, rows)
        return found

    def longest_pairs(self, cap_gb: float) -> list[Measurement]:
        """Double the length of a single pair, half of it prompt, until it no longer fits."""
        found = []
        for plan in LENGTH_PLANS:
            tokens = SHORTEST_PAIR // (16 if self.is_tiny else 1)
            longest = 2 * tokens if self.is_tiny else LONGEST_PAIR
            while tokens <= longest:
                rows = token_rows([(tokens // 2, tokens // 4, tokens // 4)] * 2, self.shape.vocabulary)
                found.append(self.measure(cap_gb, f"one pair of {tokens}", plan, rows, pairs_per_step=1, batch=1))
                if not found[-1].fits:
                    break
                tokens *= 2
        return found

    def _with_smaller_batches(self, cap_gb: float, data: str, plan: Plan, rows: list) -> list[Measurement]:
        batch = plan.pairs_per_batch
        found = [self.measure(cap_gb, data, plan, rows, PAIRS_PER_STEP, batch)]
        while plan.halves and not found[-1].fits and not found[-1].note and batch > 1:
            batch //= 2
            found.append(self.measure(cap_gb, data, plan, rows, PAIRS_PER_STEP, batch))
        return found

    def measure(
        self, cap_gb: float, data: str, plan: Plan, rows: list[dict[str, list[int]]], pairs_per_step: int, batch: int
    ) -> Measurement:
        """Build a fresh model under the cap and train on `rows`, once through."""
        result = Measurement(cap_gb, data, plan.name, batch, fits=False)
        if plan.side == "trl" and not self.has_trl:
            result.note = "skipped: trl is not installed"
        elif time.monotonic() > self.deadline:
            result.note = "left out: no time"
        else:
            with capped(cap_gb, self.device), tempfile.TemporaryDirectory() as folder:
                try:
                    self._train(result, plan, rows, pairs_per_step // batch, folder)
                    result.fits = True
                except torch.OutOfMemoryError:
                    pass  # that is the answer; nothing of the traceback may live on, since it holds tensors
                if self.device.type == "cuda":
                    result.peak_bytes = torch.cuda.max_memory_allocated(self.device)
            free(self.device)
        print(_line(result), flush=True)
        return result

    def _train(self, result: Measurement, plan: Plan, rows: list, accumulation: int, folder: str) -> None:
        dtype = torch.bfloat16
        trainer_class, config_class = _classes(plan.side)
        trainer = trainer_class(
            model=large_model(self.shape, dtype, self.device),
            args=config_class(
                output_dir=folder,
                per_device_train_batch_size=result.pairs_per_batch,
                gradient_accumulation_steps=accumulation,
                num_train_epochs=1,
                max_length=None,
                learning_rate=LEARNING_RATE,
                train_sampling_strategy="sequential",
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                bf16=True,
                use_cpu=self.device.type == "cpu",
                **plan.settings,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
            peft_config=LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        clock = Clock(self.device)
        trainer.add_callback(clock)
        with quiet():
            trainer.train()
        first = next(entry for entry in trainer.state.log_history if "loss" in entry)
        result.seconds = statistics.median(clock.seconds[WARMUP_STEPS:])
        result.first_loss, result.first_grad_norm = first["loss"], float(first["grad_norm"])


def _classes(side: str) -> tuple[Any, Any]:
    if side == "alignkit":
        return alignkit.DPOTrainer, alignkit.DPOConfig
    import trl

    class OnTokens(trl.DPOTrainer):
        """TRL's trainer on rows that are token ids already."""

        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

    return OnTokens, trl.DPOConfig


def _line(result: Measurement) -> str:
    if result.note:
        outcome = result.note
    elif not result.fits:
        outcome = "does not fit"
    else:
        outcome = f"{result.seconds:.3f} s, {result.peak_bytes / GIB:.2f} GiB"
    return f"{result.cap_gb:g} GB, {result.data}, {result.plan}, batch {result.pairs_per_batch}: {outcome}"


def run(shape: Shape, device: torch.device, caps_gb: list[float], deadline: float) -> list[dict[str, Any]]:
    """Measure every card in turn."""
    disable_progress_bars()
    bench = Bench(shape, device, deadline)
    found: list[Measurement] = []
    for cap_gb in caps_gb:
        found += bench.steps(cap_gb) + bench.longest_pairs(cap_gb)
    return [asdict(each) for each in found]


def table(measurements: list[dict[str, Any]], shape: Shape, note: str) -> str:
    """Measurements as markdown, card by card."""
    lines = [
        f"Llama-like, {shape.label}, LoRA r={LORA_RANK} on all linear layers" + (f". **{note}.**" if note else "."),
        "",
        "| card, GB | pairs | run | batch | s / step | peak, GiB | first gradient norm |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in measurements:
        numbers = each["note"] or "does not fit"
        if each["fits"]:
            numbers = f"{each['seconds']:.3f} | {each['peak_bytes'] / GIB:.2f} | {each['first_grad_norm']:.3f}"
        else:
            numbers += " | | "
        lines.append(
            f"| {each['cap_gb']:g} | {each['data']} | {each['plan']} | {each['pairs_per_batch']} | {numbers} |"
        )
    return "\n".join(lines)
