"""Samples and small classifiers for the reward tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from alignkit.rollout.reward import RewardInputs
from tests.model_factory import tiny_config


def samples(*completions: str, **columns: list[Any]) -> RewardInputs:
    """Text samples with prompts "p0 ", "p1 ", ... and token ids that are as good as any."""
    count = len(completions)
    return RewardInputs(
        prompts=[f"p{i} " for i in range(count)],
        completions=list(completions),
        prompt_ids=[[1, i] for i in range(count)],
        completion_ids=[[5] * len(text) for text in completions],
        columns=columns,
    )


def conversations(*completions: str, prompt: str = "hi") -> RewardInputs:
    """The same as conversations of two messages."""
    text = samples(*completions)
    return RewardInputs(
        prompts=[[{"role": "user", "content": prompt}] for _ in completions],
        completions=[[{"role": "assistant", "content": completion}] for completion in completions],
        prompt_ids=text.prompt_ids,
        completion_ids=text.completion_ids,
    )


def tiny_classifier(architecture: str, *, num_labels: int = 1, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A seeded fp32 classifier in evaluation mode whose scores differ clearly from text to text."""
    settings = {"num_labels": num_labels, "pad_token_id": 0, **overrides}
    if architecture == "bert":
        width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = AutoConfig.for_model("bert", **{**width, "max_position_embeddings": 64, **settings})
    else:
        config = tiny_config(architecture, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1))
    return model.eval()


@torch.no_grad()
def logits_at_last_token(model: Any, ids: list[int]) -> Tensor:
    """The head on the last hidden state of one text without any padding, `(L,)`, of a decoder."""
    trunk = model.get_decoder() if model.config.model_type == "llama" else model.transformer
    return model.score(trunk(torch.tensor([ids])).last_hidden_state[0, -1])
