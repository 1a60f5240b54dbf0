"""Random models, token rows and a tokenizer for the GPU checks: nothing is downloaded."""

from __future__ import annotations

import importlib.util
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from alignkit.models.adapters import add_adapter
from alignkit.models.bundle import ModelBundle
from alignkit.models.lora import FUSED_LORA

PAD, EOS = 0, 1
FIRST_WORD = 2  # ids below are special
WEIGHT_SCALE = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama-like model, and whether its blocks are stored in 4 bits (NF4)."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    is_4bit: bool

    @property
    def label(self) -> str:
        return f"{self.layers} layers, hidden {self.hidden}, {'NF4' if self.is_4bit else '16-bit'}"


def has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def eight_billion(*, tiny: bool) -> tuple[Shape, str]:
    """Return the shape to measure, and what its figures mean where it is not the real thing ("" where it is).

    Without bitsandbytes a quarter of the layers in 16 bits weighs what all of them weigh in NF4, so the same caps
    make sense; activations are a quarter, and so is the time of the blocks.
    """
    if tiny:
        shape = Shape(64, 128, 2, 4, 2, 512, is_4bit=has_bitsandbytes())
        return shape, "a dry run on a tiny model: the figures mean nothing"
    if has_bitsandbytes():
        return Shape(4096, 14336, 32, 32, 8, 128256, is_4bit=True), ""
    shape = Shape(4096, 14336, 8, 32, 8, 128256, is_4bit=False)
    return shape, (
        "bitsandbytes is not installed: 8 of 32 layers in 16 bits stand in for 32 in NF4. Weights take the same "
        "memory; activations and the blocks' time are a quarter of the real model's, and nothing is dequantized"
    )


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token per number; a text is numbers with spaces between them."""
    words = {"<pad>": PAD, "</s>": EOS, **{str(i): i for i in range(FIRST_WORD, vocabulary)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def token_rows(lengths: list[tuple[int, int, int]], vocabulary: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random token rows with the given lengths of prompt, chosen and rejected."""
    source = random.Random(seed)

    def ids(count: int) -> list[int]:
        return source.choices(range(FIRST_WORD, vocabulary), k=count)

    return [
        {"prompt_ids": ids(prompt), "chosen_ids": ids(chosen), "rejected_ids": ids(rejected)}
        for prompt, chosen, rejected in lengths
    ]


def hh_lengths(count: int, seed: int = 0, shrink: int = 1) -> list[tuple[int, int, int]]:
    """Lengths spread as those of dialogue preferences: prompts around 120 tokens, answers around 50, long tails."""
    source = random.Random(seed)

    def draw(median: int, spread: float, longest: int) -> int:
        return max(2, min(longest, round(source.lognormvariate(math.log(median), spread))) // shrink)

    return [(draw(120, 0.8, 700), draw(50, 0.9, 300), draw(50, 0.9, 300)) for _ in range(count)]


def small_model(architecture: str, dtype: torch.dtype, device: torch.device, **overrides: Any) -> PreTrainedModel:
    """A two-layer model whose head size suits every kernel, with attention far from uniform."""
    sizes = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "initializer_range": 0.08,
        "pad_token_id": PAD,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
    }
    config = AutoConfig.for_model(architecture, **{**sizes, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(device, dtype).eval()


def adapted(model: PreTrainedModel) -> ModelBundle:
    """Put seeded LoRA on every linear layer, with neither of its matrices zero."""
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    wearing = add_adapter(model, config, custom_modules=FUSED_LORA)
    generator = torch.Generator().manual_seed(1)
    for parameter in wearing.parameters():
        if parameter.requires_grad:
            parameter.data = (0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter.device)
    return ModelBundle(wearing)


def empty_model(shape: Shape, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama of this shape whose weights take no memory."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def large_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A random Llama of this shape, always the same one, made layer by layer: no 16-bit copy of it ever exists."""
    torch.manual_seed(0)
    model: Any = empty_model(shape, dtype)
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not head and shape.is_4bit:
                setattr(parent, name, _linear_4bit(child, dtype, device))
            else:
                _fill(child, dtype, device)
    model.to(device)  # what is left are buffers
    if shape.is_4bit:
        model.is_loaded_in_4bit = True  # what PEFT and TRL ask for
    return model.eval()


def _fill(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        matrix = parameter.dim() > 1
        new = _random(parameter.shape, dtype, device) if matrix else torch.ones(parameter.shape, dtype=dtype)
        setattr(module, name, nn.Parameter(new.to(device), requires_grad=False))


def _random(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device).mul_(WEIGHT_SCALE)


def _linear_4bit(linear: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    weight = Params4bit(
        _random(linear.weight.shape, dtype, device),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=layer,
    )
    layer.weight = weight.to(device)
    return layer
