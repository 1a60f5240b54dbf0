"""Merged copies for generation, and 4-bit bases: what trains and what is frozen must not notice a rollout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from alignkit.data.layout import LAYOUTS
from alignkit.models.adapters import add_adapter
from alignkit.models.bundle import REFERENCE, ModelBundle
from alignkit.models.load import load_model, nf4
from alignkit.models.lora import FUSED_LORA, FusedForward, is_4bit, merged_copies
from alignkit.rollout.hf import HFEngine
from tests.model_factory import tiny_model
from tests.pair_factory import PAD, gradients, lora_config, mixed, our_bundle, random_pairs, reset, trainable
from tests.rollout.engine_cases import GREEDY, PROMPTS, SAMPLED, greedy_seeds, letter_tokenizer

TOKENIZER = letter_tokenizer(eos_token="</s>", pad_token="<pad>")
SEEDS = greedy_seeds(PROMPTS)
IDS = torch.arange(40, 52)[None]
LAYOUT = LAYOUTS["prefix_shared"](random_pairs(), PAD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama in bf16, to be loaded in 4 bits."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    path = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", hidden_size=64).to(torch.bfloat16).save_pretrained(path)
    return path


def step(bundle: ModelBundle) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    bundle.model.train()
    logps = bundle.score(LAYOUT).logps
    mixed(logps).backward()
    return logps.detach(), gradients(bundle.model)


def forward(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def fused_layers(model: PeftModel) -> list[FusedForward]:
    return [module for module in model.modules() if isinstance(module, FusedForward)]


def test_merged_layers_run_one_product_with_the_merged_weight():
    model = our_bundle().model.eval()
    expected = forward(model)
    layer = fused_layers(model)[0]
    with merged_copies(model):
        merged = layer._merged_copy
        assert merged is not None
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(merged.weight, layer.base_layer.weight + layer.scaling["default"] * b @ a)
        torch.testing.assert_close(forward(model), expected, rtol=1e-5, atol=1e-5)
        merged.weight.add_(1.0)  # control: it is the copy that is used, and a copy it is
        assert not torch.allclose(forward(model), expected, atol=1e-2)
    assert torch.equal(forward(model), expected)


def test_other_passes_take_their_usual_way_meanwhile():
    bundle = our_bundle()
    logps, grads = step(bundle)
    with bundle.role(REFERENCE):
        reference = forward(bundle.model)
    with merged_copies(bundle.model):
        for layer in fused_layers(bundle.model):
            assert layer._merged_copy is not None
            layer._merged_copy.weight.fill_(torch.nan)
        with bundle.role(REFERENCE):
            assert torch.equal(forward(bundle.model), reference)
        logps_meanwhile, grads_meanwhile = step(bundle)
        assert forward(bundle.model).isnan().any()
    assert torch.equal(logps_meanwhile, logps)
    assert all(torch.equal(grads_meanwhile[name], gradient) for name, gradient in grads.items())


def test_another_adapter_is_not_mistaken_for_the_merged_one():
    model = our_bundle().model.eval()
    model.add_adapter("other", lora_config())
    model.set_adapter("other")
    expected = forward(model)
    model.set_adapter("default")
    assert not torch.allclose(forward(model), expected, atol=1e-3)
    with merged_copies(model):
        model.set_adapter("other")
        assert torch.equal(forward(model), expected)


def test_adapters_that_are_off_are_not_merged():
    bundle = our_bundle()
    with bundle.role(REFERENCE), merged_copies(bundle.model):
        assert all(layer._merged_copy is None for layer in fused_layers(bundle.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_rollout_leaves_base_and_training_as_they_were(dtype):
    """The base bit for bit; log-probs and gradients afterwards as before; copies are gone."""
    model = add_adapter(tiny_model("llama").to(dtype), lora_config(), custom_modules=FUSED_LORA)
    reset(model)
    bundle = ModelBundle(model)
    bundle.use_row_attention()
    logps, grads = step(bundle)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = HFEngine(model, TOKENIZER, merge_adapters=True)
    found = engine.generate(PROMPTS, SEEDS, SAMPLED)
    assert all(layer._merged_copy is None for layer in fused_layers(model))
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    logps_after, grads_after = step(bundle)
    assert torch.equal(logps_after, logps)
    assert all(torch.equal(grads_after[name], gradient) for name, gradient in grads.items())
    if dtype == torch.float32:
        assert found == HFEngine(model, TOKENIZER).generate(PROMPTS, SEEDS, SAMPLED)


def test_a_rollout_merges_what_the_adapter_is_by_then():
    """Copies are made anew for every rollout: one after an update speaks with the updated adapter."""
    bundle = our_bundle()
    engine = HFEngine(bundle.model, TOKENIZER, merge_adapters=True)
    before = engine.generate(PROMPTS, SEEDS, GREEDY)
    with torch.no_grad():
        for parameter in trainable(bundle.model).values():
            parameter.mul_(-1.5)
    after = engine.generate(PROMPTS, SEEDS, GREEDY)
    assert after == HFEngine(bundle.model, TOKENIZER).generate(PROMPTS, SEEDS, GREEDY)
    assert after != before


def test_copies_are_dropped_after_a_failure():
    model = our_bundle().model
    with pytest.raises(RuntimeError, match="interrupted"), merged_copies(model):
        raise RuntimeError("interrupted")
    assert all(layer._merged_copy is None for layer in fused_layers(model))


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_dropout": 0.3}])
def test_adapters_that_are_not_plain_stay_unmerged(config):
    bundle = our_bundle("llama", lora_config(**config))
    with merged_copies(bundle.model):
        assert all(layer._merged_copy is None for layer in fused_layers(bundle.model))
    plain, merging = (HFEngine(bundle.model, TOKENIZER, merge_adapters=merge) for merge in (False, True))
    assert merging.generate(PROMPTS, SEEDS, SAMPLED) == plain.generate(PROMPTS, SEEDS, SAMPLED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_a_four_bit_base_trains_as_before(folder, targets, dtype):
    """Bitsandbytes would repack layers without an adapter in place, and no gradient would pass them."""
    base = load_model(folder, device=torch.device("cpu"), dtype=dtype, quantization_config=nf4(dtype))
    model = add_adapter(base, lora_config(target_modules=targets), custom_modules=FUSED_LORA)
    reset(model)
    bundle = ModelBundle(model)
    bundle.use_row_attention()
    logps, grads = step(bundle)
    assert all(gradient.any() for gradient in grads.values())
    modes = [module.training for module in model.modules()]
    packed = {name: module.weight.data.clone() for name, module in model.named_modules() if is_4bit(module)}
    engine = HFEngine(model, TOKENIZER, merge_adapters=True)
    assert any(completion.ids for completion in engine.generate(PROMPTS, SEEDS, SAMPLED))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(model.get_submodule(name).weight.data, weight) for name, weight in packed.items())
    logps_after, grads_after = step(bundle)
    assert torch.equal(logps_after, logps)
    assert all(torch.equal(grads_after[name], gradient) for name, gradient in grads.items())


def test_a_four_bit_base_without_a_bundle_is_not_repacked(folder):
    """No hooks of a bundle: the engine itself keeps these layers from repacking."""
    dtype = torch.float32
    base = load_model(folder, device=torch.device("cpu"), dtype=dtype, quantization_config=nf4(dtype))
    packed = {name: module.weight.data.clone() for name, module in base.named_modules() if is_4bit(module)}
    HFEngine(base, TOKENIZER).generate(PROMPTS, SEEDS, SAMPLED)
    assert packed
    assert all(torch.equal(base.get_submodule(name).weight.data, weight) for name, weight in packed.items())
