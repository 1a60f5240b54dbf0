"""One PPO run in a process of its own: `python -m tests.benchmarks.ppo_side job.json result.json`.

TRL's runs are made by a Python of their own, which need not have what alignkit depends on: alignkit is imported by its
own side alone.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from tests.benchmarks.ppo_runs import COMMON, COMPLETION_TOKENS, PPO_EPOCHS, PPO_RUNS, PROMPTS, PPOJob, PPORun
from tests.benchmarks.runs import LORA_RANK
from tests.benchmarks.side import PeakMemory, resident_bytes

VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate")


class UpdateRecorder(TrainerCallback):
    """Wall-clock seconds of every update, its rollout included, and positions embedded in it by all models.

    Args:
        models: every model that looks tokens up.
        steps: optimizer steps of one update, as the side's state counts them.
    """

    def __init__(self, models: Sequence[Any], steps: int) -> None:
        self.steps = steps
        self.seconds: list[float] = []
        self.positions: list[int] = []
        self._count, self._last = 0, 0.0
        for model in models:
            model.get_input_embeddings().register_forward_pre_hook(self._embedded)

    def _embedded(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._count += args[0].numel()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count, self._last = 0, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps:
            return
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self.positions.append(self._count)
        self._count, self._last = 0, now


class Side(NamedTuple):
    """A trainer, and how to ask it for what both sides must agree on.

    Attributes:
        trainer: with `recorder` among its callbacks.
        prompts: token ids, as the trainer has them.
        probe: rewards of the rows' own completions.
        completion_tokens: generated in each update so far.
    """

    trainer: Any
    recorder: UpdateRecorder
    prompts: list[list[int]]
    probe: Callable[[], list[float]]
    completion_tokens: Callable[[], list[int]]


def measure(job: PPOJob) -> dict[str, Any]:
    """Make a few updates and return what was measured, as JSON."""
    run = PPO_RUNS[job.run]
    torch.set_num_threads(job.threads)
    tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="left")
    if tokenizer.pad_token == tokenizer.eos_token:  # TRL masks padding by its id, and would hide the ends of turns
        tokenizer.pad_token = tokenizer.unk_token
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.detach().sum()  # weights may be mapped from their file: bring them into memory before it is measured
    rows = json.loads(Path(job.rows).read_text(encoding="utf-8"))
    gc.collect()
    loaded_bytes = resident_bytes()  # one copy of the weights; the other models of a side count as its memory
    started = time.perf_counter()
    side = (_trl_side if run.side == "trl" else _our_side)(run, job, model, tokenizer, rows)
    setup_seconds = time.perf_counter() - started
    gc.collect()
    with PeakMemory() as peak:
        side.trainer.train()
    logs = [entry for entry in side.trainer.state.log_history if "objective/scores" in entry]
    return {
        "run": job.run,
        "update_seconds": side.recorder.seconds,
        "update_positions": side.recorder.positions,
        "completion_tokens": side.completion_tokens(),
        "rewards": [entry["objective/scores"] for entry in logs],
        "kl": [entry["objective/kl"] for entry in logs],
        "probe_rewards": side.probe(),
        "prompt_digest": hashlib.sha256(json.dumps(sorted(side.prompts)).encode()).hexdigest()[:16],
        "setup_seconds": setup_seconds,
        "peak_above_loaded_bytes": peak.bytes - loaded_bytes,
        "process_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _our_side(run: PPORun, job: PPOJob, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> Side:
    from alignkit import PPOConfig, PPOTrainer
    from alignkit.rollout.reward import RewardInputs

    trainer = PPOTrainer(
        model,
        job.adapter,
        PPOConfig(
            f"{job.scratch}/output",
            **{**COMMON, "logging_steps": PPO_EPOCHS},  # its steps are optimizer steps
            per_device_train_batch_size=run.prompts_per_batch,
            gradient_accumulation_steps=PROMPTS // run.prompts_per_batch,
            max_prompt_length=None,
            max_completion_length=COMPLETION_TOKENS,
            max_steps=PPO_EPOCHS * (job.warmup + job.updates),
            **run.settings,
        ),
        Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    recorder = UpdateRecorder([model], steps=PPO_EPOCHS)
    trainer.add_callback(recorder)
    prompts: list[list[int]] = [list(row["prompt_ids"]) for row in trainer.train_dataset]
    inputs = RewardInputs(
        prompts=[row["prompt"] for row in rows],
        completions=["" for _ in rows],  # the adapter reads ids
        prompt_ids=[row["prompt_ids"] for row in rows],
        completion_ids=[row["probe_ids"] for row in rows],
    )

    def completion_tokens() -> list[int]:
        logged = [entry.get("completions/mean_length") for entry in trainer.state.log_history]
        return [round(PROMPTS * length) for length in logged if length is not None]

    return Side(trainer, recorder, prompts, lambda: trainer.rewards(inputs).totals.tolist(), completion_tokens)


def _trl_side(run: PPORun, job: PPOJob, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> Side:
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    from trl.experimental.ppo.ppo_trainer import get_reward

    reward, critic = (
        AutoModelForSequenceClassification.from_pretrained(job.classifier, dtype=torch.bfloat16) for _ in range(2)
    )
    critic.score.weight.data.zero_()  # a critic that knows nothing, as on the other side
    if run.lora_critic:
        lora = LoraConfig(r=LORA_RANK, target_modules="all-linear", exclude_modules=["score"])
        critic = inject_adapter_in_model(lora, critic)
        critic.score.requires_grad_(True)
    recorder = UpdateRecorder([model, reward, critic], steps=1)
    lengths: list[int] = []  # completion tokens of each batch that was rewarded
    longest = max(len(row["prompt_ids"]) for row in rows)
    reward.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[0] * (args[0].shape[1] - longest))
    )
    dataset = Dataset.from_list([{"input_ids": row["prompt_ids"]} for row in rows])
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=f"{job.scratch}/output",
            **COMMON,
            per_device_train_batch_size=run.prompts_per_batch,
            gradient_accumulation_steps=PROMPTS // run.prompts_per_batch,
            response_length=COMPLETION_TOKENS,
            total_episodes=PROMPTS * (job.warmup + job.updates),
            num_sample_generations=0,
            stop_token="eos",
            **run.settings,
        ),
        processing_class=tokenizer,
        model=model,
        ref_model=None,  # the policy without its adapter
        reward_model=reward,
        value_model=critic,
        train_dataset=dataset,
        eval_dataset=dataset,  # it is made into a data loader, and not read
        callbacks=[recorder],
        peft_config=LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )

    def probe() -> list[float]:
        found = []
        for row in rows:
            ids = torch.tensor([row["prompt_ids"] + row["probe_ids"]])
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                found.append(get_reward(reward, ids, tokenizer.pad_token_id, len(row["prompt_ids"]))[1].item())
        return found

    updates = job.warmup + job.updates
    return Side(trainer, recorder, [row["input_ids"] for row in dataset], probe, lambda: lengths[:updates])


def _versions() -> dict[str, str]:
    installed = {each.name.lower() for each in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in VERSIONS if name in installed}


def main(argv: list[str]) -> int:
    """Read a job, run it, write its result."""
    job = PPOJob(**json.loads(Path(argv[1]).read_text(encoding="utf-8")))
    Path(argv[2]).write_text(json.dumps(measure(job)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
