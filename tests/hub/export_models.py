"""Tiny bases with real tokenizers, and adapters whose effect is large enough to be measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from alignkit.models.load import load_tokenizer
from tests.model_factory import tiny_model
from tests.models.conftest import character_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_base(folder: Path, architecture: str = "llama", *, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    """Save a tiny model with a tokenizer of single characters and a chat template."""
    tokenizer = character_tokenizer(eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tiny_model(architecture, **config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_wide_base(folder: Path, architecture: str = "llama", **config: Any) -> PreTrainedTokenizerBase:
    """Save a tiny model with the demonstration model's tokenizer, which llama.cpp knows."""
    tokenizer = load_tokenizer("demo")
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    tiny_model(architecture, hidden_size=64, **{**sizes, **config}).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_adapter(folder: Path, base: Path, *, scale: float = 0.1, **options: Any) -> Path:
    """Save an adapter on `base` whose weights are drawn from a normal distribution of that scale."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    adapted = get_peft_model(model, LoraConfig(**settings))
    shake(adapted, scale)
    adapted.save_pretrained(folder)
    return folder


def shake(model: PeftModel, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * scale
            # Magnitudes (DoRA) and whole modules start from something; LoRA's matrices are replaced.
            parameter.data = noise if "lora_A" in name or "lora_B" in name else parameter.data + noise
