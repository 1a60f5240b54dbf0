"""Small policies, prompts and trainers for the checks of PPO."""

from __future__ import annotations

import enum
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from tests.benchmarks.gpu.shapes import Shape, large_model, small_model
from tests.model_factory import VOCAB_SIZE
from tests.ppo_factory import WatchedTrainer, ppo_trainer, vowels
from tests.tiny_preferences import LETTERS

# Prompts around the kernels' block sizes, one of a single token.
PROMPT_TOKENS = (37, 5, 128, 1, 63, 90, 65, 20)
NEW_TOKENS = 24
EOS = 2  # of the character tokenizer
FOUR_BIT = Shape(256, 512, 2, 4, 2, VOCAB_SIZE, is_4bit=True)


class Model(enum.Enum):
    """How a policy's blocks are stored."""

    DENSE = enum.auto()
    NF4 = enum.auto()


def policy(dtype: torch.dtype, device: torch.device, kind: Model = Model.DENSE) -> PreTrainedModel:
    """A two-layer Llama for the character tokenizer."""
    if kind is Model.NF4:
        return large_model(FOUR_BIT, dtype, device)
    return small_model("llama", dtype, device, vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=EOS)


def episodes(seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions as token ids; no special ones, so that a classifier reads the last token."""
    source = random.Random(seed)

    def ids(count: int) -> list[int]:
        return source.choices(range(ord("a"), ord("z") + 1), k=count)

    return [ids(count) for count in PROMPT_TOKENS], [ids(source.randint(1, NEW_TOKENS)) for _ in PROMPT_TOKENS]


def trainer_for(
    folder: Path,
    model: Any,
    reward: Any = vowels,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **options: Any,
) -> WatchedTrainer:
    """A trainer that keeps what it was trained with.

    Args:
        folder: where it writes.
        model: a policy, or a folder, which then needs `dtype` and `device`.
        reward: what rewards.
        dtype, device: by default the policy's.
        **options: arguments of the trainer, or options of its configuration.
    """
    dtype = dtype or model.dtype
    is_cpu = (device or model.device).type == "cpu"
    source = random.Random(1)
    rows = [{"prompt": "".join(source.choices(LETTERS.strip(), k=count)).replace(" ", "e")} for count in PROMPT_TOKENS]
    settings = {
        "train_dataset": Dataset.from_list(rows),
        "max_completion_length": NEW_TOKENS,
        "use_cpu": is_cpu,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
    }
    trainer: Any = ppo_trainer(folder, reward, kind=WatchedTrainer, model=model, **{**settings, **options})
    return trainer
