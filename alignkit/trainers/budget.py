"""How many tokens one forward pass may hold: the meaning of `max_tokens_per_forward="auto"`."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import PreTrainedModel

from alignkit.errors import ConfigError
from alignkit.trainers.config_engine import EngineConfig

# On a CPU larger passes gain nothing more and take memory: matrix products are at full speed by then.
CPU_TOKENS = 3072
# Share of the memory that is free after loading which activations may take; the rest is for the optimizer, the head's
# chunks and fragmentation.
ACTIVATION_SHARE = 0.6
FEWEST_TOKENS = 512


def forward_budget_tokens(
    base: PreTrainedModel, args: EngineConfig, distributed_type: DistributedType = DistributedType.NO
) -> int | None:
    """Return the tokens per forward pass that `max_tokens_per_forward` means, or `None` for whole micro-batches.

    Raises:
        ConfigError: a number, under FSDP or DeepSpeed.
    """
    asked = args.max_tokens_per_forward
    if distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        if isinstance(asked, int):
            raise ConfigError(
                "max_tokens_per_forward would give processes unequal numbers of forward passes, which FSDP and "
                "DeepSpeed cannot follow. Leave it out and bound memory with per_device_train_batch_size."
            )
        return None
    return _device_tokens(base, args) if isinstance(asked, str) else asked


def _device_tokens(base: PreTrainedModel, args: EngineConfig) -> int:
    """Estimate how many tokens fit one forward and backward pass on this process's device.

    The estimate counts what autograd keeps per token: with activation checkpointing one hidden state per layer and the
    activations of one layer, otherwise those of every layer. A layer keeps about 14 tensors of the hidden size and 5
    of the feed-forward size.
    """
    if args.device.type != "cuda":
        return CPU_TOKENS
    config: Any = base.config.get_text_config()  # its attributes, unlike its dict, know GPT-2's own names
    hidden, layers = config.hidden_size, config.num_hidden_layers
    feed_forward = config.to_dict().get("intermediate_size") or 4 * hidden
    embeddings: Any = base.get_input_embeddings()
    width_bytes = torch.finfo(embeddings.weight.dtype).bits // 8
    layer_bytes = width_bytes * (14 * hidden + 5 * feed_forward)
    kept_bytes = layers * hidden * width_bytes + layer_bytes
    token_bytes = kept_bytes if args.activation_checkpointing else layers * layer_bytes
    free_bytes, _ = torch.cuda.mem_get_info(args.device)
    weights_bytes = 0 if base.device.type == "cuda" else base.get_memory_footprint()
    return max(FEWEST_TOKENS, int(ACTIVATION_SHARE * (free_bytes - weights_bytes) / token_bytes))
