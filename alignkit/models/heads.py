"""Scalar heads: what a reward model or a value function reads off a hidden state.

A head is a submodule of the causal language model itself, beside its output layer, so that DDP and FSDP take care of it
together with everything else that is trained, and PEFT saves it. A reward head is called `score`, the name that
transformers' sequence classifiers and PEFT's `SEQ_CLS` adapters know: as one of an adapter's `modules_to_save`, every
reward adapter on a shared base has a `score` of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.errors import ModelError

SCORE = "score"
VALUE = "value"


class ScalarHead(nn.Module):
    """`h Wᵀ` in fp32, whatever the precision around it: hidden states `(M, H)` to `(M, K)`.

    Not an `nn.Linear`, so that neither "all-linear" LoRA nor quantization takes it for a layer of the base. It has no
    bias: a reward is known up to a constant only, and a classifier's `score` has none either.

    Args:
        width: H, the size of the hidden states.
        outputs: K, the number of scalars.
    """

    def __init__(self, width: int, outputs: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, width, dtype=torch.float32))

    @property
    def outputs(self) -> int:
        """K."""
        return self.weight.shape[0]

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(..., H)` to `(..., K)` in the weight's dtype."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(self.weight.dtype), self.weight)


def hidden_width(model: PreTrainedModel) -> int:
    """H: the width of what the model's output layer reads, and so what a head reads.

    Raises:
        ModelError: the model has no output layer.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no linear output layer to put a scalar head beside; a causal language model "
            "is needed"
        )
    return layer.in_features


def add_reward_head(model: PreTrainedModel, outputs: int = 1) -> ScalarHead:
    """Put a reward head `score` on `model`, drawn from N(0, 1 / (H + 1)) (arXiv 2009.01325, Appendix B).

    With hidden states of unit size, rewards start with a variance of about 1. Several outputs are an ensemble: heads
    that start apart and share one adapter. Draws from the global generator.

    Raises:
        ModelError: the model has such a head, or no output layer.
    """
    head = put_head(model, SCORE, outputs)
    nn.init.normal_(head.weight, std=(head.weight.shape[1] + 1) ** -0.5)
    return head


def add_value_head(model: PreTrainedModel) -> ScalarHead:
    """Put a value head `value` on `model`, all zeros: before it has learned, every state is worth 0.

    A random one would start the critic with noise of the size of the rewards.

    Raises:
        ModelError: the model has such a head, or no output layer.
    """
    return put_head(model, VALUE)


def has_head(model: nn.Module, name: str) -> bool:
    """Whether `model` has a head called `name`, wrapped by an adapter or not."""
    return name in dict(model.named_children())


def put_head(model: PreTrainedModel, name: str, outputs: int = 1) -> ScalarHead:
    """Put a head of zeros on `model` under `name`, on the model's device.

    Raises:
        ModelError: the model has a module of that name, or no output layer.
    """
    if has_head(model, name):
        raise ModelError(f"{type(model).__name__} has a module called '{name}' already; load the model anew")
    head = ScalarHead(hidden_width(model), outputs).to(model.device)
    model.add_module(name, head)
    return head
