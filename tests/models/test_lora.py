"""The fused LoRA layer against PEFT's own, and against plain PEFT after saving."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from alignkit.models.adapters import add_adapter
from alignkit.models.lora import FUSED_LORA, FusedLoraLinear, dense_weight, frozen_linear, is_4bit, is_quantized
from tests.model_factory import tiny_model
from tests.pair_factory import fill_adapter, gradients, lora_config, our_model, plain_model, trainable

# Plain PEFT reads a property of the base that transformers has renamed.
PLAIN_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(40, 60)[None]
RANK, WIDTH, HEIGHT = 3, 12, 20


def layers(dtype: torch.dtype = torch.float32, bias: bool = True, **settings) -> tuple[PeftLinear, FusedLoraLinear]:
    """PEFT's layer and ours, on the same frozen weight, with the same fp32 factors."""
    config = LoraConfig(r=RANK, lora_alpha=5, **settings)
    torch.manual_seed(0)
    base = nn.Linear(WIDTH, HEIGHT, bias=bias, dtype=dtype).requires_grad_(False)
    pair = []
    for kind in (PeftLinear, FusedLoraLinear):
        layer = kind(copy.deepcopy(base), "default", config=config, r=RANK, lora_alpha=5)
        generator = torch.Generator().manual_seed(1)
        for matrix in (layer.lora_A, layer.lora_B):
            weight = matrix["default"].weight
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3
        pair.append(layer)
    return pair[0], pair[1]


def run(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, input gradient, and the factors' gradients."""
    x = x.clone().requires_grad_()
    out = layer(x)
    direction = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    (out * direction).sum().backward()
    found = [out.detach(), x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
    layer.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
@pytest.mark.parametrize("shape", [(2, 7, WIDTH), (5, WIDTH), (1, 1, WIDTH)])
def test_equals_pefts_own_layer(shape, settings, bias):
    plain, fused = layers(bias=bias, **settings)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for found, expected in zip(run(fused, x), run(plain, x), strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_by_hand():
    """W = 2, b = 1, A = 3, B = 5, scaling 4: y = 2x + 1 + 4 · 5 · 3 · x = 63 at x = 1; dy/dx 62, dy/dA 20, dy/dB 12."""
    layer = FusedLoraLinear(nn.Linear(1, 1), "default", config=LoraConfig(r=1, lora_alpha=4), r=1, lora_alpha=4)
    layer.requires_grad_(True)
    layer.base_layer.requires_grad_(False)
    with torch.no_grad():
        for parameter, value in (
            (layer.base_layer.weight, 2.0),
            (layer.base_layer.bias, 1.0),
            (layer.lora_A["default"].weight, 3.0),
            (layer.lora_B["default"].weight, 5.0),
        ):
            parameter.fill_(value)
    x = torch.ones(1, 1, requires_grad=True)
    out = layer(x)
    out.backward()
    assert out.item() == 63.0
    assert x.grad.item() == 62.0
    assert layer.lora_A["default"].weight.grad.item() == 20.0
    assert layer.lora_B["default"].weight.grad.item() == 12.0


def test_rslora_scales_with_the_root_of_the_rank():
    plain, fused = layers(use_rslora=True)
    assert plain.scaling["default"] == fused.scaling["default"] == pytest.approx(5 / 3**0.5)


def test_gradcheck():
    """In float64, the input's gradient and both factors'."""
    _, fused = layers(torch.float64)
    fused.double()
    factors = [fused.lora_A["default"].weight, fused.lora_B["default"].weight]
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)

    def apply(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return fused(x)

    assert torch.autograd.gradcheck(apply, [x, *factors])


def test_adapter_gradients_on_a_bf16_base_are_fp32_and_near_the_exact_ones():
    _, fused = layers(torch.bfloat16)
    exact, _ = layers(torch.float32)
    exact.base_layer.weight.data = fused.base_layer.weight.data.float()
    exact.base_layer.bias.data = fused.base_layer.bias.data.float()
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(2)).bfloat16()
    found, expected = run(fused, x), run(exact, x.float())
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).norm() <= 0.01 * other.norm()


def test_input_that_needs_no_gradient():
    """The first layer above a frozen embedding: only the factors get one."""
    plain, fused = layers()
    x = torch.randn(4, WIDTH)
    for layer in (plain, fused):
        layer(x).sum().backward()
    for ours, theirs in ((fused.lora_A, plain.lora_A), (fused.lora_B, plain.lora_B)):
        found, expected = ours["default"].weight.grad, theirs["default"].weight.grad
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def is_fused(out: torch.Tensor) -> bool:
    """Whether our function made a tensor, or a plain operation of PEFT's forward pass."""
    while out.grad_fn is not None and "View" in out.grad_fn.name():
        return "LoraProduct" in out.grad_fn.next_functions[0][0].name()
    return out.grad_fn is not None and "LoraProduct" in out.grad_fn.name()


def test_plain_lora_is_fused():
    _, fused = layers()
    assert is_fused(fused(torch.randn(2, WIDTH)))


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.5}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_what_is_not_plain_goes_through_pefts_forward(settings):
    name = "base_model.model.model.decoder.layers.0.self_attn.q_proj"  # OPT's layers have biases
    layer = our_model("opt", lora_config(**settings)).get_submodule(name)
    assert isinstance(layer, FusedLoraLinear)
    plain_layer = plain_model("opt", lora_config(**settings)).get_submodule(name)
    x = torch.randn(2, 32)
    for module in (layer, plain_layer):
        module.train()
    torch.manual_seed(0)
    found = layer(x)
    torch.manual_seed(0)
    assert torch.equal(found, plain_layer(x))
    assert not is_fused(found)


def test_dropout_of_zero_is_fused_and_dropout_is_random():
    _, fused = layers(lora_dropout=0.5)
    fused.update_layer("other", RANK, 5, config=LoraConfig(r=RANK, lora_dropout=0.0))
    fused.train()
    x = torch.randn(2, WIDTH)
    assert not torch.equal(fused(x), fused(x))
    fused.set_adapter("other")
    assert is_fused(fused(x))


def test_two_active_adapters_add_up_in_pefts_way():
    pair = layers()
    outs = []
    for layer in pair:
        torch.manual_seed(3)
        layer.update_layer("other", RANK, 5, config=LoraConfig(r=RANK, init_lora_weights=False))
        layer.set_adapter(["default", "other"])
        outs.append(layer(torch.ones(2, WIDTH)))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-6, atol=1e-6)
    assert not is_fused(outs[1])


def test_merged_disabled_and_unmerged():
    plain, fused = layers()
    x = torch.randn(4, WIDTH)
    with torch.no_grad():
        expected = plain(x)
        for layer in (plain, fused):
            layer.merge()
        torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(fused.base_layer.weight, plain.base_layer.weight)
        fused.unmerge()
        fused.enable_adapters(False)
        torch.testing.assert_close(fused(x), nn.functional.linear(x, fused.base_layer.weight, fused.base_layer.bias))
        fused.enable_adapters(True)
        torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-5)


def test_a_trainable_base_keeps_its_gradient():
    _, fused = layers()
    fused.base_layer.weight.requires_grad_(True)
    fused(torch.ones(1, WIDTH)).sum().backward()
    assert torch.equal(fused.base_layer.weight.grad, torch.ones(HEIGHT, WIDTH))


@PLAIN_PEFT
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_alpha": 3, "r": 5}], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_saved_adapter_gives_plain_peft_the_same_logits(architecture, settings, tmp_path):
    """`opt` has biases; GPT-2's layers are no `nn.Linear` and stay PEFT's own."""
    model = our_model(architecture, lora_config(**settings))
    fused = [module for module in model.modules() if isinstance(module, FusedLoraLinear)]
    assert bool(fused) == (architecture != "gpt2")
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(tiny_model(architecture), tmp_path)
    assert not any(isinstance(module, FusedLoraLinear) for module in plain.modules())
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(model(IDS).logits, tiny_model(architecture)(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_callers_config_is_not_changed():
    config = lora_config()
    before = copy.deepcopy(config)
    add_adapter(tiny_model("llama"), config, custom_modules=FUSED_LORA)
    assert vars(config) == vars(before)


def test_whole_model_equals_plain_peft():
    ours, plain = our_model("qwen3"), plain_model("qwen3")
    assert trainable(ours).keys() == trainable(plain).keys()
    for model in (ours, plain):
        model(input_ids=IDS, labels=IDS).loss.backward()
    expected = gradients(plain)
    for name, found in gradients(ours).items():
        assert (found - expected[name]).norm() <= 1e-5 * expected[name].norm()


def test_base_weights_are_never_touched():
    model = our_model("llama")
    before = {name: tensor.clone() for name, tensor in model.named_parameters() if not tensor.requires_grad}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_frozen_linear_and_dense_weight_of_a_plain_layer():
    layer = nn.Linear(3, 4)
    x = torch.randn(2, 3)
    assert dense_weight(layer) is layer.weight
    assert torch.equal(frozen_linear(x, layer), layer(x))
    assert not is_4bit(layer)
    assert not is_quantized(layer)


def test_fill_adapter_is_decided_by_names():
    """Control for the helpers: two copies agree, and their B factors are not zero."""
    one, other = our_model("llama"), our_model("llama")
    for first, second in zip(trainable(one).values(), trainable(other).values(), strict=True):
        assert torch.equal(first, second)
        assert first.abs().max() > 0
    fill_adapter(one, seed=1)
    first = next(iter(trainable(one).values()))
    assert not torch.equal(first, next(iter(trainable(other).values())))
