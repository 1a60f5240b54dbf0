"""LoRA as one fused operation: `y = x Wᵀ + b + s · (x Aᵀ) Bᵀ` (arXiv 2106.09685, Eq. 3).

PEFT's layers stay in charge of everything but the arithmetic of a plain training step: `fused_lora_layer` is handed to
PEFT through `LoraConfig._register_custom_module`, and the layers that it makes fall back to PEFT's own forward pass for
dropout, variants (DoRA), merged weights and several active adapters. What is saved is an ordinary PEFT adapter.

Adapters are fp32 and stay so. A forward pass casts each to the compute dtype once and keeps the copy for the backward
pass; autocast, which would cast at every use, is not involved. Adapter gradients are accumulated in fp32; each one is a
product in the compute dtype.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.utils import is_bitsandbytes_available

from alignkit.models.adapters import CustomModules

logger = logging.getLogger(__name__)


def is_4bit(layer: nn.Module) -> bool:
    """Whether `layer` keeps its weight in bitsandbytes' 4-bit format."""
    if not is_bitsandbytes_available():
        return False
    from bitsandbytes.nn import Linear4bit

    return isinstance(layer, Linear4bit)


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight of `model` is stored as integers."""
    return any(not parameter.is_floating_point() for parameter in model.parameters())


def dense_weight(layer: Any) -> Tensor:
    """Return the weight of a linear layer as a `(out, in)` matrix, dequantized where it is stored in 4 bits."""
    if not is_4bit(layer):
        return layer.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def frozen_linear(x: Tensor, layer: Any) -> Tensor:
    """`x Wᵀ + b` of a frozen linear layer; for 4-bit weights this bypasses the layer's own forward pass.

    On a CPU that pass repacks the 4-bit weight in place in evaluation mode, and gradients vanish below it afterwards.
    """
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, dense_weight(layer).to(x.dtype), bias)


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lora_a, lora_b, layer, scaling):  # x (…, in), A (r, in), B (out, r)
        low_a, low_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        projected = F.linear(x, low_a)  # (…, r)
        y = frozen_linear(x, layer)  # (…, out)
        y.view(-1, y.shape[-1]).addmm_(projected.view(-1, low_a.shape[0]), low_b.t(), alpha=scaling)
        ctx.save_for_backward(x, projected, low_a, low_b)
        ctx.layer, ctx.scaling, ctx.adapter_dtype = layer, scaling, lora_a.dtype
        return y

    @staticmethod
    def backward(ctx, grad):  # (…, out)
        x, projected, low_a, low_b = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        rank_grad = (g @ low_b).mul_(ctx.scaling)  # (N, r)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (g @ dense_weight(ctx.layer).to(g.dtype)).addmm_(rank_grad, low_a).view(x.shape)
        grad_a = rank_grad.t() @ x.reshape(-1, x.shape[-1])
        grad_b = (g.t() @ projected.view(-1, low_a.shape[0])).mul_(ctx.scaling)
        return grad_x, grad_a.to(ctx.adapter_dtype), grad_b.to(ctx.adapter_dtype), None, None


class _Merged(NamedTuple):
    """A layer's weight with one adapter added, `W + s · B A`, in the base's dtype."""

    adapter: str
    weight: Tensor  # (out, in)


class FusedForward(nn.Module):
    """The forward pass that `FusedLoraLinear` and its 4-bit twin put before PEFT's own."""

    _merged_copy: _Merged | None = None  # set by `merged_copies`, for the time of a rollout

    # PEFT's layers set these; nn.Module's own attribute types say too little.
    base_layer: Any
    lora_A: Any  # noqa: N815
    lora_B: Any  # noqa: N815
    lora_dropout: Any
    lora_variant: Any
    scaling: dict[str, float]
    active_adapters: list[str]
    merged: bool
    disable_adapters: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `(…, in)` to `(…, out)`."""
        if args or kwargs or self.merged:
            return super().forward(x, *args, **kwargs)
        if self.disable_adapters:
            return frozen_linear(x, self.base_layer)
        name = self._plain_adapter()
        if name is None:
            return super().forward(x)
        merged = self._merged_copy
        if merged is not None and merged.adapter == name and not torch.is_grad_enabled():
            bias = self.base_layer.bias
            return F.linear(x, merged.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        lora_a, lora_b = self.lora_A[name].weight, self.lora_B[name].weight
        return _LoraProduct.apply(x, lora_a, lora_b, self.base_layer, self.scaling[name])

    def _plain_adapter(self) -> str | None:
        """The one active adapter, if it is plain LoRA over a frozen layer: no dropout, no bias, no variant."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or self.base_layer.weight.requires_grad:
            return None
        name = active[0]
        plain = (
            name not in self.lora_variant
            and self.lora_B[name].bias is None
            and (isinstance(self.lora_dropout[name], nn.Identity) or self.lora_dropout[name].p == 0.0)
        )
        return name if plain else None


@contextlib.contextmanager
def merged_copies(model: nn.Module) -> Iterator[None]:
    """While this is open, forward passes without gradients run fused LoRA layers as one product with `W + s · B A`.

    The sums are copies, rounded to the base's dtype (a 16-bit forward pass rounds by as much anyway): the base is not
    written to, and memory rises by one copy of the adapted weights. They are made of the adapters' values at the
    start; a pass with gradients, with another adapter or with none takes its usual way. 4-bit layers, and layers whose
    adapter is not plain LoRA, are left alone.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, FusedForward)]
    try:
        for layer in layers:
            layer._merged_copy = _merge(layer)
        yield
    finally:
        for layer in layers:
            layer._merged_copy = None


@torch.no_grad()
def _merge(layer: FusedForward) -> _Merged | None:
    name = None if layer.merged or layer.disable_adapters else layer._plain_adapter()
    if name is None or is_4bit(layer.base_layer):
        return None
    weight, scaling = layer.base_layer.weight, layer.scaling[name]
    lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _Merged(name, torch.addmm(weight.to(lora_a.dtype), lora_b, lora_a, alpha=scaling).to(weight.dtype))


class FusedLoraLinear(FusedForward, PeftLinear):
    """PEFT's LoRA layer over a frozen dense linear layer."""


def fused_lora_layer(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """Make the LoRA layer for a linear `target`, or return `None` to leave it to PEFT (8-bit and other formats).

    Signature as PEFT calls it; register it with `config._register_custom_module({nn.Linear: fused_lora_layer})`.
    """
    layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if is_4bit(layer):
        from alignkit.models.lora_4bit import FusedLoraLinear4bit

        return FusedLoraLinear4bit(target, adapter_name, config=config, **kwargs)
    if type(layer) is nn.Linear:
        return FusedLoraLinear(target, adapter_name, config=config, **kwargs)
    return None


# What `add_adapter` and `load_model` take as `custom_modules`; bitsandbytes' layers are `nn.Linear` too.
FUSED_LORA: CustomModules = {nn.Linear: fused_lora_layer}


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers on a CPU trainable below, whatever mode the model is in.

    One evaluation-mode forward pass without gradients repacks such a layer's weight in place, and every gradient below
    it is zero from then on. A hook keeps these layers in training mode, which changes nothing else about them. Layers
    that were repacked before are unpacked, as bitsandbytes does on saving: their scales stay rounded to bf16.
    """
    restored = 0
    module: Any
    for module in model.modules():
        if is_4bit(module) and module.weight.device.type == "cpu":
            module.register_forward_pre_hook(_in_training_mode)
            if vars(module.weight.quant_state).get("packing_format_for_cpu"):
                module.state_dict()
                restored += 1
    if restored:
        logger.warning(
            "%d 4-bit layers had been repacked by an inference pass; they are unpacked again, which leaves their "
            "scales rounded to bf16. Make the trainer before generating to avoid it.",
            restored,
        )


def _in_training_mode(module: nn.Module, args: tuple) -> None:
    module.training = True
