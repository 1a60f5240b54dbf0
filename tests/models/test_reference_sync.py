"""TR-DPO under LoRA: the reference's weights against the mix that the paper defines."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer

from alignkit.data.layout import LAYOUTS
from alignkit.errors import ConfigError
from alignkit.models.adapters import REFERENCE_ADAPTER
from alignkit.models.bundle import REFERENCE, ModelBundle
from alignkit.models.reference_sync import add_synced_reference, sync_reference_adapter
from tests.pair_factory import PAD, fill_adapter, lora_config, our_model, random_pairs, trainable

LAYOUT = LAYOUTS["prefix_shared"](random_pairs(), PAD)


def changes(model, adapter: str) -> dict[str, torch.Tensor]:
    """What an adapter adds to the weight of each layer, in float64."""
    return {
        name: layer.scaling[adapter]
        * layer.lora_B[adapter].weight.detach().double()
        @ layer.lora_A[adapter].weight.detach().double()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def synced_model(*, continued: bool = False, **settings):
    model = our_model("llama", lora_config(**settings))
    assert add_synced_reference(model, continued=continued) == REFERENCE_ADAPTER
    return model


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 7}], ids=["plain", "rslora"])
def test_a_new_reference_is_the_base(settings):
    model = synced_model(**settings)
    assert all(not change.any() for change in changes(model, REFERENCE_ADAPTER).values())
    assert all(".default." in name for name in trainable(model))
    assert all(layer.scaling[REFERENCE_ADAPTER] == 1.0 for layer in model.modules() if isinstance(layer, LoraLayer))


def test_alpha_one_makes_the_reference_the_policy():
    model = synced_model()
    bundle = ModelBundle(model, adapters={REFERENCE: REFERENCE_ADAPTER})
    bundle.use_row_attention()
    with torch.no_grad():
        policy = bundle.score(LAYOUT).logps
    assert not torch.allclose(bundle.score_reference(LAYOUT).logps, policy, atol=1e-2)
    assert sync_reference_adapter(model, "default", alpha=1.0) < 1e-6
    torch.testing.assert_close(bundle.score_reference(LAYOUT).logps, policy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 7}], ids=["plain", "rslora"])
def test_the_first_sync_moves_by_alpha_exactly(settings):
    model = synced_model(**settings)
    error = sync_reference_adapter(model, "default", alpha=0.6)
    assert error < 1e-6
    policy = changes(model, "default")
    for name, change in changes(model, REFERENCE_ADAPTER).items():
        assert policy[name].norm() > 0
        assert (change - 0.6 * policy[name]).norm() <= 1e-6 * policy[name].norm()


def test_the_second_sync_is_still_exact():
    """Two policies' changes of rank 4 fit the reference's rank of 8: α p₂ + (1 − α) α p₁."""
    model = synced_model()
    first = changes(model, "default")
    sync_reference_adapter(model, "default", alpha=0.6)
    fill_adapter(model, seed=5)
    second = changes(model, "default")
    assert sync_reference_adapter(model, "default", alpha=0.6) < 1e-5
    for name, change in changes(model, REFERENCE_ADAPTER).items():
        expected = 0.6 * second[name] + 0.24 * first[name]
        assert (change - expected).norm() <= 1e-5 * expected.norm()


def test_the_returned_error_is_that_of_the_worst_layer():
    """From the third sync on the sum needs more rank than the reference has: the best approximation is taken."""
    model = synced_model()
    for seed in range(2, 4):
        sync_reference_adapter(model, "default", alpha=0.5)
        fill_adapter(model, seed=seed, scale=0.3)
    before, policy = changes(model, REFERENCE_ADAPTER), changes(model, "default")
    reported = sync_reference_adapter(model, "default", alpha=0.5)
    after = changes(model, REFERENCE_ADAPTER)
    errors = []
    for name, change in after.items():
        wanted = 0.5 * policy[name] + 0.5 * before[name]
        errors.append(((change - wanted).norm() / wanted.norm()).item())
        # Eckart-Young: nothing of rank 8 is nearer than what the largest 8 singular values give.
        best = torch.linalg.svdvals(wanted)[8:].norm() / wanted.norm()
        assert errors[-1] == pytest.approx(best.item(), rel=1e-3, abs=1e-6)
    assert reported == pytest.approx(max(errors), rel=1e-3)
    assert 0.01 < reported < 1


def test_alpha_zero_changes_nothing():
    model = synced_model()
    sync_reference_adapter(model, "default", alpha=1.0)
    before = changes(model, REFERENCE_ADAPTER)
    fill_adapter(model, seed=5)
    sync_reference_adapter(model, "default", alpha=0.0)
    for name, change in changes(model, REFERENCE_ADAPTER).items():
        assert (change - before[name]).norm() <= 1e-5 * before[name].norm()


def test_a_continued_adapter_starts_as_its_own_reference():
    model = synced_model(continued=True)
    bundle = ModelBundle(model, adapters={REFERENCE: REFERENCE_ADAPTER})
    bundle.use_row_attention()
    with torch.no_grad():
        policy = bundle.score(LAYOUT).logps
    torch.testing.assert_close(bundle.score_reference(LAYOUT).logps, policy, rtol=1e-5, atol=1e-5)


def test_the_policy_and_the_global_generator_are_left_alone():
    model = our_model()
    before = {name: parameter.clone() for name, parameter in trainable(model).items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    add_synced_reference(model, continued=True)
    sync_reference_adapter(model, "default", alpha=0.3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(trainable(model)[name], tensor) for name, tensor in before.items())
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"q_proj": 2}}],
    ids=["dora", "modules_to_save", "rank_pattern"],
)
def test_adapters_that_cannot_be_mixed_are_refused(settings):
    model = our_model("llama", lora_config(**settings))
    with pytest.raises(ConfigError, match="sync_ref_model needs plain LoRA"):
        add_synced_reference(model, continued=False)


def test_biased_lora_is_refused():
    model = our_model("opt", lora_config(lora_bias=True, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="lora_bias=True cannot be mixed"):
        add_synced_reference(model, continued=False)
