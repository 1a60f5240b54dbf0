"""A reward adapter on the policy's base against transformers' sequence classifier with the same adapter by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignkit.models.adapters import add_adapter, peft_warnings
from alignkit.models.load import load_model, nf4
from alignkit.models.lora import FUSED_LORA
from alignkit.models.reward_adapter import reward_peft_config, with_reward_head
from alignkit.models.reward_files import without_load_report
from alignkit.rollout.hf import evaluate
from alignkit.rollout.reward import RewardInputs
from tests.benchmarks.gpu.ppo_models import episodes, policy, trainer_for
from tests.benchmarks.gpu.shapes import PAD, adapted
from tests.pair_factory import fill_adapter, lora_config

# Of the scores' standard deviation, root mean square. In 16 bits twice the classifier's own error is allowed besides.
FLOOR = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TIMES_PLAIN = 2.0


class Precision(NamedTuple):
    """What a base is stored and computed in."""

    name: str
    dtype: torch.dtype
    is_4bit: bool = False


class Compared(NamedTuple):
    """Error of the scores, what is allowed, and the deviation of the scores themselves."""

    error: float
    allowed: float
    spread: float


def precisions(device: torch.device) -> list[Precision]:
    """What to compare in; fp16 is for GPUs."""
    found = [Precision("fp32", torch.float32), Precision("bf16", torch.bfloat16)]
    if device.type == "cuda":
        found.append(Precision("fp16", torch.float16))
    return [*found, Precision("NF4, fp32", torch.float32, is_4bit=True)]


def save_base(folder: Path) -> Path:
    """Save a small base in fp32."""
    policy(torch.float32, torch.device("cpu")).save_pretrained(folder)
    return folder


def save_reward(base: Path, folder: Path) -> Path:
    """Save a reward adapter with a head, as `RewardTrainer` does."""
    torch.manual_seed(0)
    model = with_reward_head(_load(base), 1)
    wearing = add_adapter(model, reward_peft_config(lora_config()), custom_modules=FUSED_LORA)  # type: ignore[arg-type]
    fill_adapter(wearing, scale=0.05)
    wearing.save_pretrained(str(folder))
    return folder


def save_policy(base: Path, folder: Path) -> Path:
    """Save an adapter to go on from."""
    model: Any = adapted(_load(base)).model
    model.save_pretrained(str(folder))
    return folder


def reward_inputs(prompts: list[list[int]], completions: list[list[int]]) -> RewardInputs:
    """What rewards are told of these episodes."""
    return RewardInputs(
        prompts=["".join(map(chr, ids)) for ids in prompts],
        completions=["".join(map(chr, ids)) for ids in completions],
        prompt_ids=prompts,
        completion_ids=completions,
    )


def compare(base: Path, reward: Path, precision: Precision, device: torch.device, folder: Path) -> Compared:
    """Score the same episodes both ways."""
    prompts, completions = episodes(seed=3)
    sequences = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    model: Any = str(base)
    if precision.is_4bit:
        model = load_model(base, dtype=precision.dtype, device=device, quantization_config=nf4(precision.dtype))
    trainer = trainer_for(folder, model, str(reward), dtype=precision.dtype, device=device)
    ours = trainer.rewards(reward_inputs(prompts, completions)).totals.float()
    truth = _classified(base, reward, precision._replace(dtype=torch.float32), device, sequences)
    plain = _classified(base, reward, precision, device, sequences)
    times = 0.0 if precision.dtype == torch.float32 else TIMES_PLAIN
    spread = truth.std().item()
    return Compared(_error(ours, truth), FLOOR[precision.dtype] * spread + times * _error(plain, truth), spread)


def _error(found: Tensor, truth: Tensor) -> float:
    return (found - truth).square().mean().sqrt().item()


def _load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def _classified(
    base: Path, reward: Path, precision: Precision, device: torch.device, sequences: list[list[int]]
) -> Tensor:
    """Logits of a plain classifier, one sequence at a time, `(B,)`."""
    settings: dict[str, Any] = {"attn_implementation": "eager", "dtype": precision.dtype}
    if precision.is_4bit:
        settings |= {"quantization_config": nf4(precision.dtype), "device_map": {"": device}}
    with without_load_report(), peft_warnings():
        classifier = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, pad_token_id=PAD, **settings
        )
        model: Any = PeftModel.from_pretrained(classifier, str(reward))
    if not precision.is_4bit:
        model = model.to(device)
    evaluate(model)  # plain eval() would round 4-bit weights' scales on a CPU
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([ids], device=device)).logits[0, 0] for ids in sequences]
    return torch.stack(logits).float().cpu()
