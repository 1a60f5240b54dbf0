"""Tiny models of many architectures, built from configs without any download.

`from tests.model_factory import tiny_model`: two layers, 128 tokens, seeded fp32 weights,
evaluation mode (the configs keep their own dropout).
Biases, norms and soft-caps are made non-trivial on purpose, so that a layer that is skipped or applied
twice changes the output.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 128
SLIDING_WINDOW = 8  # tokens; shorter than the sequences of any test, so a window that is ignored shows

_WIDTH: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED: dict[str, Any] = {**_WIDTH, "num_key_value_heads": 2}
_GEMMA: dict[str, Any] = {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": SLIDING_WINDOW}
_LAYER_TYPES = ["sliding_attention", "full_attention"]

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "gemma2": {**_GEMMA, "layer_types": _LAYER_TYPES, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**_GEMMA, "layer_types": _LAYER_TYPES},
    "mistral": {**_GROUPED, "sliding_window": SLIDING_WINDOW, "head_dim": 8},
    "phi": _WIDTH,
    "phi3": {**_GROUPED, "sliding_window": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {**_WIDTH, "rotary_pct": 0.5},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 256,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 256},
    "smollm3": {**_GROUPED, "no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 2},
    "olmo2": _GROUPED,
    "granite": {
        **_GROUPED,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
        "logits_scaling": 2.0,
    },
    "cohere2": {
        **_GROUPED,
        "head_dim": 8,
        "logit_scale": 0.5,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": _LAYER_TYPES,
    },
}

ARCHITECTURES: tuple[str, ...] = tuple(_CONFIGS)


def tiny_config(architecture: str, **overrides: Any) -> Any:
    """Return the config of a tiny model; `overrides` replace its fields."""
    settings = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(architecture, **{**settings, **_CONFIGS[architecture], **overrides})


def tiny_model(architecture: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a fresh tiny model: fp32, evaluation mode, weights from `seed` without touching the global generator."""
    config = tiny_config(architecture, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                # Larger than the usual 0.02, so that attention is far from uniform and differences are visible.
                noise = torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1)
                parameter.add_(noise)
    return model.eval()


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether a model's blocks are run again in the backward pass; transformers has two names for that."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
