"""TR-DPO under LoRA: a reference that follows the policy, as an adapter of its own.

TR-DPO (arXiv 2404.09656) moves the reference's *weights*, `W_ref <- α W_policy + (1 − α) W_ref`. Both are the base and
a low-rank change `s B A`, so the new change is `α s_p B_p A_p + (1 − α) s_r B_r A_r`: exactly the product of stacked
factors. The reference has twice the policy's rank; where the sum needs more, its best approximation of that rank is
taken (Eckart-Young, by QR and a small SVD), and the relative error is returned.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from alignkit.errors import ConfigError
from alignkit.models.adapters import REFERENCE_ADAPTER


def add_synced_reference(model: PeftModel, *, continued: bool) -> str:
    """Add the reference adapter, frozen, of twice the policy's rank, and return its name.

    Args:
        model: its active adapter is the policy.
        continued: the policy's adapter was trained before: the reference starts as that adapter, not as the base.

    Raises:
        ConfigError: the adapter is not plain LoRA on linear layers.
    """
    policy = model.active_adapters[0]
    config = model.peft_config[policy]
    if not isinstance(config, LoraConfig) or config.use_dora or config.modules_to_save or config.rank_pattern:
        raise ConfigError("sync_ref_model needs plain LoRA: no DoRA, no modules_to_save, no rank_pattern")
    if config.lora_bias:
        raise ConfigError("sync_ref_model needs plain LoRA: lora_bias=True cannot be mixed")
    config = copy.deepcopy(config)
    config.r, config.lora_alpha, config.use_rslora = 2 * config.r, 2 * config.r, False  # a scaling of 1
    config.alpha_pattern, config.lora_dropout, config.init_lora_weights = {}, 0.0, True
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(REFERENCE_ADAPTER, config)
    for layer in _lora_layers(model):
        for matrices in (layer.lora_A, layer.lora_B):
            matrices[REFERENCE_ADAPTER].weight.requires_grad_(False).zero_()
            matrices[REFERENCE_ADAPTER].weight.data = matrices[REFERENCE_ADAPTER].weight.data.float()
    if continued:
        sync_reference_adapter(model, policy, alpha=1.0)
    return REFERENCE_ADAPTER


@torch.no_grad()
def sync_reference_adapter(model: PeftModel, policy: str, *, alpha: float) -> float:
    """Move the reference adapter towards the policy's by `alpha` in `[0, 1]`.

    Returns:
        The largest relative error, in Frobenius norm, that cutting a layer's change to the reference's rank made.
    """
    worst = 0.0
    for layer in _lora_layers(model):
        low, high = layer.lora_A[REFERENCE_ADAPTER].weight, layer.lora_B[REFERENCE_ADAPTER].weight
        a = torch.cat([layer.lora_A[policy].weight.float(), low])  # (r + R, in)
        b = torch.cat([alpha * layer.scaling[policy] * layer.lora_B[policy].weight.float(), (1 - alpha) * high], dim=1)
        new_a, new_b, error = _best_of_rank(a, b, low.shape[0])
        low.copy_(new_a)
        high.copy_(new_b)
        worst = max(worst, error)
    return worst


def load_synced_reference(model: PeftModel, folder: Path) -> None:
    """Load the reference adapter out of a checkpoint into a model whose weights are sharded.

    FSDP's own part of a checkpoint holds what is trained alone, and nothing else of it is read. The adapter's folder
    beside it is whole; every process reads it and keeps its shards.

    Args:
        model: the sharded model.
        folder: the checkpoint.

    Raises:
        OSError, LookupError: the adapter is not there, or lacks a weight.
    """
    saved = load_file(folder / REFERENCE_ADAPTER / SAFETENSORS_WEIGHTS_NAME)
    part = f".{REFERENCE_ADAPTER}."
    names = [name for name, _ in model.named_parameters() if part in name]
    named: dict[str, Any] = {name: saved[name.replace(part, ".")] for name in names}
    set_model_state_dict(model, named, options=StateDictOptions(full_state_dict=True, strict=False))


def _best_of_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factors `(rank, in)`, `(out, rank)` nearest to `b a`, and the relative error of their product."""
    q_b, r_b = torch.linalg.qr(b)  # (out, k), (k, k)
    q_a, r_a = torch.linalg.qr(a.t())  # (in, k), (k, k)
    u, sizes, v = torch.linalg.svd(r_b @ r_a.t())
    kept = min(rank, len(sizes))
    root = sizes[:kept].sqrt()
    new_a = a.new_zeros(rank, a.shape[1])
    new_b = b.new_zeros(b.shape[0], rank)
    new_a[:kept] = root[:, None] * (v[:kept] @ q_a.t())
    new_b[:, :kept] = (q_b @ u[:, :kept]) * root
    total = sizes.norm().item()
    return new_a, new_b, (sizes[kept:].norm().item() / total if total else 0.0)


def _lora_layers(model: PeftModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
