"""Bases in 4 bits on a CPU: training is the same before and after an inference pass.

bitsandbytes repacks a 4-bit weight in place on the first evaluation-mode forward pass without gradients, and from then
on every gradient below that layer is zero, with no error.
"""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, TrainerControl, TrainerState

from alignkit.data.layout import LAYOUTS
from alignkit.errors import TrainingError
from alignkit.models.adapters import add_adapter
from alignkit.models.bundle import POLICY, ModelBundle
from alignkit.models.heads import SCORE
from alignkit.models.load import load_model, nf4
from alignkit.models.lora import FUSED_LORA, dense_weight, is_4bit, is_quantized, keep_unpacked
from alignkit.models.reward_adapter import reward_peft_config, with_reward_head
from alignkit.trainers.callbacks_engine import LiveGradients
from tests.pair_factory import PAD, gradients, lora_config, mixed, random_pairs, reset, trainable

nn = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is not installed")
repacks = pytest.mark.skipif(
    not nn.Linear4bit(32, 32).support_avx512bf16_for_cpu,
    reason="bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16 alone",
)

CPU = torch.device("cpu")
IDS = torch.arange(40, 52)[None]
LAYOUT = LAYOUTS["prefix_shared"](random_pairs(), PAD)


def four_bit_base(tiny_folder, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(tiny_folder, device=CPU, dtype=dtype, quantization_config=nf4(dtype))


def four_bit_bundle(tiny_folder, dtype: torch.dtype = torch.float32, config: LoraConfig | None = None) -> ModelBundle:
    model = add_adapter(four_bit_base(tiny_folder, dtype), config or lora_config(), custom_modules=FUSED_LORA)
    reset(model)
    bundle = ModelBundle(model)
    bundle.use_row_attention()
    return bundle


def step(bundle: ModelBundle) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    bundle.model.train()
    logps = bundle.score(LAYOUT).logps
    mixed(logps).backward()
    return logps.detach(), gradients(bundle.model)


def infer(model) -> torch.Tensor:
    """What a rollout or an evaluation does, and what repacks."""
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    return model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=PAD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["plain", "dora", "two of seven layers"])
def test_training_is_the_same_before_and_after_generate(tiny_folder, variant, dtype):
    """DoRA runs PEFT's own forward pass; layers without an adapter run bitsandbytes' own."""
    settings = {
        "plain": {},
        "dora": {"use_dora": True},
        "two of seven layers": {"target_modules": ["q_proj", "v_proj"]},
    }
    bundle = four_bit_bundle(tiny_folder, dtype, lora_config(**settings[variant]))
    assert any(is_4bit(module) for module in bundle.model.modules())
    logps, grads = step(bundle)
    assert all(gradient.abs().max() > 0 for gradient in grads.values())
    infer(bundle.model)
    logps_after, grads_after = step(bundle)
    assert torch.equal(logps_after, logps)
    assert grads_after.keys() == grads.keys()
    for name, gradient in grads.items():
        assert torch.equal(grads_after[name], gradient), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_the_same_before_and_after_generate(tiny_folder, dtype):
    bundle = four_bit_bundle(tiny_folder, dtype)
    before = bundle.score_reference(LAYOUT).logps
    infer(bundle.model)
    assert torch.equal(bundle.score_reference(LAYOUT).logps, before)


@repacks
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered:UserWarning")
def test_plain_peft_loses_every_gradient_below(tiny_folder):
    """Control: the same steps without alignkit, in this version of bitsandbytes.

    Only what reaches the loss through the residual stream, past every repacked layer, keeps a gradient.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT reads a property that transformers has renamed
        model = get_peft_model(four_bit_base(tiny_folder), lora_config())
    found = []
    for _ in range(2):
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({name: gradient for name, gradient in gradients(model).items() if "lora_B" in name})
        infer(model)
    before, after = found
    assert all(gradient.any() for gradient in before.values())
    alive = {name.split(".")[-4] for name, gradient in after.items() if gradient.any()}
    assert alive == {"o_proj", "down_proj"}


@repacks
def test_a_model_that_was_repacked_before_the_bundle_is_restored(tiny_folder, caplog):
    """Repacking rounds a layer's scales to bf16 (relative 2⁻⁹), which stays; gradients come back."""
    expected = step(four_bit_bundle(tiny_folder))[1]
    base = four_bit_base(tiny_folder)
    infer(base)
    model = add_adapter(base, lora_config(), custom_modules=FUSED_LORA)
    reset(model)
    bundle = ModelBundle(model)
    assert "14 4-bit layers had been repacked by an inference pass" in caplog.text
    bundle.use_row_attention()
    logps, found = step(bundle)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 0.1 * gradient.norm(), name
    infer(bundle.model)
    assert torch.equal(step(bundle)[0], logps)


def test_the_mode_of_other_modules_is_left_alone(tiny_folder):
    bundle = four_bit_bundle(tiny_folder, config=lora_config(lora_dropout=0.5))
    infer(bundle.model)
    modes = {type(module).__name__ for module in bundle.model.modules() if module.training}
    assert modes <= {"Linear4bit"}


def test_four_bit_equals_the_same_weights_unpacked(tiny_folder):
    """The fused layer over 4 bits against a dense layer that holds the dequantized weight."""
    bundle = four_bit_bundle(tiny_folder)
    layers = [module for module in bundle.model.modules() if type(module).__name__ == "FusedLoraLinear4bit"]
    assert len(layers) == 14
    layer = layers[3]
    dense = dense_weight(layer.base_layer)
    assert dense.shape == (layer.base_layer.out_features, layer.base_layer.in_features)
    x = torch.randn(5, dense.shape[1], requires_grad=True)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ dense.t() + layer.scaling["default"] * x @ a.t() @ b.t()
    wanted = torch.autograd.grad(expected.pow(2).sum(), (x, a, b))
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad(found.pow(2).sum(), (x, a, b)), wanted, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_layouts_agree_on_a_four_bit_base(tiny_folder):
    bundle = four_bit_bundle(tiny_folder)
    expected, wanted = step(bundle)
    padded = bundle.score(LAYOUTS["padded"](random_pairs(), PAD)).logps
    mixed(padded).backward()
    torch.testing.assert_close(padded, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(bundle.model).items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm()


def test_packed_weights_are_not_changed_by_training_or_inference(tiny_folder):
    bundle = four_bit_bundle(tiny_folder)
    packed = {name: module.weight.data.clone() for name, module in bundle.model.named_modules() if is_4bit(module)}
    optimizer = torch.optim.AdamW(trainable(bundle.model).values(), lr=0.05)
    for _ in range(2):
        mixed(bundle.score(LAYOUT).logps).backward()
        optimizer.step()
        optimizer.zero_grad()
        infer(bundle.model)
    for name, weight in packed.items():
        assert torch.equal(bundle.model.get_submodule(name).weight.data, weight), name


def test_dense_and_quantized_models_are_told_apart(tiny_folder):
    assert is_quantized(four_bit_base(tiny_folder))
    dense = load_model(tiny_folder, device=CPU, dtype=torch.float32)
    assert not is_quantized(dense)
    keep_unpacked(dense)  # nothing to do, no harm
    assert not any(module._forward_pre_hooks for module in dense.modules())


def test_dead_gradients_stop_the_run(tiny_folder):
    bundle = four_bit_bundle(tiny_folder)
    state, control = TrainerState(), TrainerControl()
    args = types.SimpleNamespace()
    guard = LiveGradients()
    guard.on_pre_optimizer_step(args, state, control, model=bundle.model)  # no gradients at all: a skipped step
    parameters = list(trainable(bundle.model).values())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):  # may be a loss that every pair satisfies
        guard.on_pre_optimizer_step(args, state, control, model=bundle.model)
    parameters[-1].grad[0, 0] = 1e-30
    guard.on_pre_optimizer_step(args, state, control, model=bundle.model)
    parameters[-1].grad[0, 0] = 0.0
    for _ in range(2):
        guard.on_pre_optimizer_step(args, state, control, model=bundle.model)
    with pytest.raises(TrainingError, match="step 1: every gradient has been exactly zero for 3 steps"):
        guard.on_pre_optimizer_step(args, state, control, model=bundle.model)


def test_a_reward_head_trains_on_a_4_bit_base_before_and_after_inference(tiny_folder):
    base = with_reward_head(four_bit_base(tiny_folder), 2)
    model = add_adapter(base, reward_peft_config(lora_config()), custom_modules=FUSED_LORA)
    reset(model)
    bundle = ModelBundle(model, heads={POLICY: SCORE})
    bundle.use_row_attention()

    def rewards() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        bundle.model.train()
        found = bundle.values(LAYOUT, LAYOUT.last_index)
        mixed(found.flatten()).backward()
        return found.detach(), gradients(bundle.model)

    before, grads = rewards()
    assert before.shape == (6, 2)
    assert any(SCORE in name for name in grads)
    assert all(gradient.abs().max() > 0 for gradient in grads.values())
    bundle.model.eval()
    with torch.no_grad():
        bundle.values(LAYOUT, LAYOUT.last_index)
    after, grads_after = rewards()
    assert torch.equal(after, before)
    assert all(torch.equal(grads_after[name], gradient) for name, gradient in grads.items())
