"""Fused modules take the place of a frozen model's own only where nothing is lost by it."""

from __future__ import annotations

import pytest
import torch

from alignkit.models.fused import FusedRMSNorm, FusedSwiGLU, fuse_frozen_modules
from tests.model_factory import tiny_model

LAYERS = 2


def fused_count(model: torch.nn.Module) -> int:
    return sum(isinstance(module, FusedRMSNorm | FusedSwiGLU) for module in model.modules())


def test_every_norm_and_feed_forward_of_a_frozen_llama():
    model = tiny_model("llama").requires_grad_(False)
    assert model.config.num_hidden_layers == LAYERS
    assert fuse_frozen_modules(model) == fused_count(model) == 3 * LAYERS + 1
    assert fuse_frozen_modules(model) == 0


def test_a_trained_norm_stays():
    model = tiny_model("llama").requires_grad_(False)
    model.model.norm.requires_grad_(True)
    assert fuse_frozen_modules(model) == 3 * LAYERS


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_watched_module_stays_and_is_still_watched(register):
    model = tiny_model("llama").requires_grad_(False)
    calls = []
    getattr(model.model.layers[0].mlp, register)(lambda *args: calls.append(args[0]))
    assert fuse_frozen_modules(model) == 3 * LAYERS
    model(input_ids=torch.tensor([[1, 5, 6]]))
    assert calls == [model.model.layers[0].mlp]


def test_weights_that_are_not_loaded_cannot_be_probed():
    with torch.device("meta"):
        model = tiny_model("llama").to("meta").requires_grad_(False)
    fuse_frozen_modules(model)
    assert not any(isinstance(module, FusedRMSNorm) for module in model.modules())
