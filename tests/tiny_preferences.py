"""Tiny preference data, and the adapter that tests train on it: everything small, seeded and fp32.

The characters of a text are its tokens, so text rows and token rows are easy to write down, and their ids fit the
models of `tests.model_factory`.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

from tests.model_factory import VOCAB_SIZE
from tests.two_processes import whole

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?"

# Trainer options of every tiny run: fp32, no files, no trackers, no bars.
QUIET: dict[str, Any] = {
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,  # torch warns about it on a CPU
}


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each ASCII character, with padding, BOS and EOS tokens of its own."""
    special = ["<pad>", "<s>", "</s>", *(f"<unused{i}>" for i in range(3, 32)), "<unused127>"]
    ids = [*range(32), VOCAB_SIZE - 1]
    vocabulary = dict(zip(special, ids, strict=True)) | {chr(code): code for code in range(32, VOCAB_SIZE - 1)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def text_rows(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Rows of explicit prompts with two completions of quite different lengths, down to a single letter."""
    source = random.Random(seed)

    def text(shortest: int, longest: int) -> str:
        return "".join(source.choices(LETTERS, k=source.randint(shortest, longest)))

    return [{"prompt": text(3, 12), "chosen": text(1, 9), "rejected": text(1, 9)} for _ in range(count)]


def token_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """The same as token ids, as `DPOTrainer` takes them."""
    tokenizer = character_tokenizer()
    eos = [tokenizer.eos_token_id]
    return [
        {
            "prompt_ids": tokenizer(row["prompt"])["input_ids"],
            "chosen_ids": tokenizer(row["chosen"])["input_ids"] + eos,
            "rejected_ids": tokenizer(row["rejected"])["input_ids"] + eos,
        }
        for row in text_rows(count, seed=seed)
    ]


def lora(**overrides: Any) -> LoraConfig:
    """LoRA on every linear layer but the head."""
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **overrides}
    )


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def randomise_adapter(model: nn.Module, *, seed: int = 7, scale: float = 0.1) -> None:
    """Give every trainable tensor seeded noise, so that policy and reference differ before the first step."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(adapter_weights(model).items()):
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def assert_close_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float) -> None:
    """Compare tensors by name; the difference is measured against each tensor's own largest entry."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        bound = rtol * want.abs().max().item()
        torch.testing.assert_close(found[name], want, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


class RecordGradients(TrainerCallback):
    """Keeps a copy of every step's gradients; for runs with `max_grad_norm=0`, which leaves them as they are."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Copy them just before the optimizer reads them."""
        gradients = {name.removeprefix("module."): whole(p.grad).clone() for name, p in adapter_weights(model).items()}
        self.steps.append(gradients)
