"""One benchmark run in a process of its own: `python -m tests.benchmarks.side job.json result.json`."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import resource
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

from tests.benchmarks.arithmetic import ModelShape, model_shape
from tests.benchmarks.profiling import StepProfiler
from tests.benchmarks.runs import LEARNING_RATE, LORA_RANK, MAX_LENGTH, PAIRS_PER_STEP, RUNS, Job, Run

SAMPLE_SECONDS = 0.02
PAGE_BYTES = resource.getpagesize()


def resident_bytes() -> int:
    """Memory of this process that is resident now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES


class PeakMemory:
    """Sample resident memory in a thread; `bytes` is the largest sample between entering and leaving."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident_bytes())

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, resident_bytes())


class StepRecorder(TrainerCallback):
    """Wall-clock seconds of every optimizer step, data loading and logging included, and positions embedded in it.

    Every forward pass of either side looks up its tokens' embeddings once, so this counts what was really computed:
    padding, repeated prompts and the reference's pass included.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.seconds: list[float] = []
        self.positions: list[int] = []
        self._count = 0
        model.get_input_embeddings().register_forward_pre_hook(self._embedded)

    def _embedded(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._count += args[0].numel()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count, self._last = 0, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self.positions.append(self._count)
        self._count, self._last = 0, now


def measure(job: Job) -> dict[str, Any]:
    """Train for a few steps and return what was measured, as JSON."""
    run = RUNS[job.run]
    torch.set_num_threads(job.threads)
    trainer_class, config_class = _classes(run.side)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.detach().sum()  # weights may be mapped from their file: bring them into memory before it is measured
    shape = model_shape(model, LORA_RANK)
    dataset = Dataset.from_list(json.loads(Path(job.rows).read_text(encoding="utf-8")))
    gc.collect()
    loaded_bytes = resident_bytes()
    with _head_as_on_cuda() if run.completions_only else contextlib.nullcontext():
        started = time.perf_counter()
        trainer = trainer_class(
            model=model,
            args=config_class(**_arguments(run, job)),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        setup_seconds = time.perf_counter() - started
        recorder = StepRecorder(model)
        trainer.add_callback(recorder)
        profiler = StepProfiler(job.warmup + job.steps, shape.vocabulary, LORA_RANK) if job.profile else None
        if profiler is not None:
            trainer.add_callback(profiler)
        gc.collect()
        with PeakMemory() as peak:
            trainer.train()
    return {
        **_results(trainer, recorder, shape),
        "run": job.run,
        "setup_seconds": setup_seconds,
        "loaded_bytes": loaded_bytes,
        "peak_above_loaded_bytes": peak.bytes - loaded_bytes,
        "process_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "profile": None if profiler is None else profiler.groups,
    }


def _classes(side: str) -> tuple[Any, Any]:
    if side == "trl":
        import trl

        return trl.DPOTrainer, trl.DPOConfig
    import alignkit

    return alignkit.DPOTrainer, alignkit.DPOConfig


def _arguments(run: Run, job: Job) -> dict[str, Any]:
    arguments = {
        "output_dir": f"{job.scratch}/output",
        "per_device_train_batch_size": run.pairs_per_batch,
        "gradient_accumulation_steps": PAIRS_PER_STEP // run.pairs_per_batch,
        "max_steps": job.warmup + job.steps,
        "max_length": MAX_LENGTH,
        "learning_rate": LEARNING_RATE,
        "train_sampling_strategy": "sequential",  # the same pairs in the same order on every side
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": True,  # the default of both sides, where the processor has it
        **run.settings,
    }
    if run.side == "alignkit" and run.is_precomputed:
        arguments["reference_cache_dir"] = f"{job.scratch}/reference"  # nothing from an earlier run
    return arguments


@contextlib.contextmanager
def _head_as_on_cuda() -> Iterator[None]:
    """Let TRL's head skip prompts and padding, which it does only where Triton runs.

    Its forward pass asks one function whether to; that name is replaced where the head looks it up, for this process.
    The kernels look the function up elsewhere and go on without Triton.
    """
    with mock.patch("trl.trainer.utils._use_triton", return_value=True) as asked:
        yield
    assert asked.called, "TRL's head did not ask whether to score completions alone"


def _results(trainer: Trainer, recorder: StepRecorder, shape: ModelShape) -> dict[str, Any]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    lengths, shared_starts, digest = _describe(trainer.train_dataset)
    return {
        "step_seconds": recorder.seconds,
        "step_positions": recorder.positions,
        "loss": [entry["loss"] for entry in logs],
        "grad_norm": [float(entry["grad_norm"]) for entry in logs],
        "logps_chosen": [entry["logps/chosen"] for entry in logs],
        "lengths": lengths,
        "shared_starts": shared_starts,
        "data_digest": digest,
        "shape": asdict(shape),
    }


def _describe(dataset: Any) -> tuple[list[list[int]], list[int], str]:
    """Describe the rows as trained on: tokens of prompt, chosen and rejected, `(N, 3)`; how many tokens all prompts of
    each step begin with, each prompt's last left out; a hash of the ids.
    """
    lengths, prompts, digest = [], [], hashlib.sha256()
    for row in dataset:
        prompt = list(row["prompt_ids"])[:MAX_LENGTH]
        room = MAX_LENGTH - len(prompt)  # TRL cuts when it collates, alignkit before
        parts = [prompt, list(row["chosen_ids"])[:room], list(row["rejected_ids"])[:room]]
        lengths.append([len(part) for part in parts])
        prompts.append(prompt[:-1])
        digest.update(json.dumps(parts).encode())
    steps = [prompts[start : start + PAIRS_PER_STEP] for start in range(0, len(prompts), PAIRS_PER_STEP)]
    shared_starts = [len(list(takewhile(lambda ids: len(set(ids)) == 1, zip(*step, strict=False)))) for step in steps]
    return lengths, shared_starts, digest.hexdigest()[:16]


def main(argv: list[str]) -> int:
    """Read a job, run it, write its result."""
    job = Job(**json.loads(Path(argv[1]).read_text(encoding="utf-8")))
    Path(argv[2]).write_text(json.dumps(measure(job)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
