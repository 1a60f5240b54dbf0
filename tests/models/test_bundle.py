"""Roles on one base: gradients under activation checkpointing, what is trainable, and a base that never changes."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from alignkit.data.layout import LAYOUTS
from alignkit.errors import ModelError
from alignkit.models.adapters import add_adapter, reference_adapter
from alignkit.models.bundle import POLICY, REFERENCE, ModelBundle, enable_checkpointing
from alignkit.models.lora import FUSED_LORA
from tests.model_factory import is_checkpointing, tiny_model
from tests.pair_factory import (
    PAD,
    fill_adapter,
    gradients,
    lora_config,
    mixed,
    our_bundle,
    our_model,
    plain_token_logps,
    random_pairs,
    trainable,
)

LAYOUT = LAYOUTS["prefix_shared"](random_pairs(), PAD)


def two_adapters() -> ModelBundle:
    """Policy and a second, equally trained adapter, both away from zero and from each other."""
    model = add_adapter(tiny_model("llama"), lora_config(), custom_modules=FUSED_LORA)
    model.add_adapter("reward", lora_config())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            torch.nn.init.zeros_(parameter)  # PEFT draws A at random
    fill_adapter(model, scale=0.2, adapter="default")
    fill_adapter(model, seed=1, scale=0.2, adapter="reward")
    bundle = ModelBundle(model, adapters={"reward": "reward"})
    bundle.use_row_attention()
    model.train()
    return bundle


def role_gradients(bundle: ModelBundle, *, switch_first: bool = True) -> dict[str, torch.Tensor]:
    """Score under both roles, switch to neither, then run one backward pass through both."""
    policy = mixed(bundle.score(LAYOUT).logps)
    with bundle.role("reward"):
        reward = mixed(bundle.score(LAYOUT).logps)
    with bundle.role(REFERENCE):  # backward runs while the base wears no adapter at all
        (policy + 2 * reward).backward()
    return gradients(bundle.model)


def checkpointed(bundle: ModelBundle, *, protected: bool) -> ModelBundle:
    enable_checkpointing(bundle.base, {"use_reentrant": False})  # what Trainer does
    bundle.model.enable_input_require_grads()
    if protected:
        bundle.protect_checkpointing({"use_reentrant": False})
    return bundle


def test_both_adapters_get_gradients_without_checkpointing():
    found = role_gradients(two_adapters())
    assert found.keys() == trainable(two_adapters().model).keys()
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_checkpointing_recomputes_under_the_adapter_of_the_forward_pass():
    expected = role_gradients(two_adapters())
    bundle = checkpointed(two_adapters(), protected=True)
    assert is_checkpointing(bundle.base)
    found = role_gradients(bundle)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_unprotected_checkpointing_would_lose_or_corrupt_gradients():
    """Control: the same two roles, recomputed under whatever adapter is active by then."""
    expected = role_gradients(two_adapters())
    bundle = checkpointed(two_adapters(), protected=False)
    try:
        found = role_gradients(bundle)
    except torch.utils.checkpoint.CheckpointError:
        return  # the recomputed graph had another shape: loud, but not trainable either
    wrong = [name for name, gradient in expected.items() if not torch.equal(found.get(name, torch.zeros(1)), gradient)]
    assert len(wrong) > len(expected) / 2


def test_checkpointing_really_recomputes():
    """Control: a layer runs once more in the backward pass, so the tests above tested something."""
    bundle = checkpointed(two_adapters(), protected=True)
    calls = []
    # Before its forward pass: recomputation stops as soon as the last saved tensor is there.
    bundle.base.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(bundle._worn))
    loss = mixed(bundle.score(LAYOUT).logps)
    assert calls == ["default"]
    with bundle.role("reward"):
        loss.backward()
        assert calls == ["default", "default"]
        assert bundle.model.active_adapters == ["reward"]  # and recomputing gave the role back


def test_reference_under_checkpointing_leaves_the_policys_gradient_alone():
    """The usual step: policy forward, reference forward, policy backward."""
    expected = our_bundle()
    expected.use_row_attention()
    mixed(expected.score(LAYOUT).logps).backward()
    bundle = checkpointed(our_bundle(), protected=True)
    bundle.use_row_attention()
    bundle.model.train()
    loss = mixed(bundle.score(LAYOUT).logps)
    bundle.score_reference(LAYOUT)
    loss.backward()
    wanted = gradients(expected.model)
    for name, gradient in gradients(bundle.model).items():
        assert torch.equal(gradient, wanted[name]), name


def states(model: torch.nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("role", [POLICY, REFERENCE, "reward"])
def test_a_role_gives_back_what_was_trainable_and_worn(role):
    bundle = two_adapters()
    before = states(bundle.model)
    with bundle.role(role):
        assert states(bundle.model) == before  # PEFT itself would freeze the adapter that is not active
    assert states(bundle.model) == before
    assert bundle.model.active_adapters == ["default"]
    with pytest.raises(RuntimeError, match="inside"), bundle.role(role):
        raise RuntimeError("inside")
    assert states(bundle.model) == before
    assert bundle.model.active_adapters == ["default"]


def test_pefts_own_switch_would_freeze_the_policy():
    """Control: why `role` restores `requires_grad`."""
    model = two_adapters().model
    before = states(model)
    model.set_adapter("reward")
    assert states(model) != before


def test_frozen_parameters_stay_frozen_where_an_adapter_is_frozen():
    model = our_model()
    fill_adapter(model, seed=3)
    name = reference_adapter(model)
    bundle = ModelBundle(model, adapters={REFERENCE: name})
    bundle.score_reference(LAYOUTS["padded"](random_pairs(), PAD))
    assert not any(flag for parameter, flag in states(model).items() if f".{name}." in parameter)
    assert all(".default." in parameter for parameter in trainable(model))


def test_roles_nest():
    bundle = two_adapters()
    with torch.no_grad():
        policy = bundle.score(LAYOUT).logps
        with bundle.role("reward"):
            reward = bundle.score(LAYOUT).logps
            with bundle.role(REFERENCE):
                reference = bundle.score(LAYOUT).logps
            assert torch.equal(bundle.score(LAYOUT).logps, reward)
        assert torch.equal(bundle.score(LAYOUT).logps, policy)
    assert not torch.allclose(policy, reward, atol=1e-2)
    assert not torch.allclose(policy, reference, atol=1e-2)


def test_the_reference_does_not_move_with_the_policy():
    bundle = our_bundle()
    bundle.use_row_attention()
    before = bundle.score_reference(LAYOUT).logps
    policy = bundle.score(LAYOUT).logps
    fill_adapter(bundle.model, seed=7)
    assert torch.equal(bundle.score_reference(LAYOUT).logps, before)
    assert not torch.allclose(bundle.score(LAYOUT).logps, policy, atol=1e-2)


def test_a_continued_adapters_reference_is_the_adapter_as_it_was():
    model = our_model()
    bundle = ModelBundle(model, adapters={REFERENCE: reference_adapter(model)})
    bundle.use_row_attention()
    with torch.no_grad():
        start = bundle.score(LAYOUT).logps
    assert torch.equal(bundle.score_reference(LAYOUT).logps, start)
    fill_adapter(model, seed=7)
    assert torch.equal(bundle.score_reference(LAYOUT).logps, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_weights_are_the_same_to_the_bit_after_training(dtype):
    base: PreTrainedModel = tiny_model("llama").to(dtype)
    bundle = ModelBundle(add_adapter(base, lora_config(), custom_modules=FUSED_LORA))
    bundle.use_row_attention()
    frozen = {name: p.clone() for name, p in bundle.model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trainable(bundle.model).values(), lr=0.05)
    start = bundle.score(LAYOUT).logps.detach()
    for _ in range(3):
        (mixed(bundle.score(LAYOUT).logps) - bundle.score_reference(LAYOUT).logps.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(bundle.score(LAYOUT).logps.detach(), start, atol=1e-2)
    after = dict(bundle.model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert torch.equal(bundle.score_reference(LAYOUT).logps, start)  # B starts at zero: the policy was the reference


def test_a_separate_reference_is_frozen_and_used():
    reference = tiny_model("llama", seed=1)
    with torch.no_grad():
        expected = plain_token_logps(tiny_model("llama", seed=1), random_pairs())
    bundle = ModelBundle(our_model(), reference=reference)
    bundle.use_row_attention()
    assert bundle.can_reference
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    torch.testing.assert_close(bundle.score_reference(LAYOUT).logps, expected, rtol=1e-5, atol=1e-5)


def test_a_model_trained_whole_has_no_reference_of_its_own():
    bundle = ModelBundle(tiny_model("llama"))
    assert not bundle.can_reference
    with bundle.role(POLICY):
        pass
    with pytest.raises(ModelError, match="role 'reference' needs adapters or a separate model"):
        bundle.score_reference(LAYOUT)


def test_the_policy_cannot_be_its_own_reference():
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="ref_model is the policy itself"):
        ModelBundle(model, reference=model)
    ModelBundle(model, reference=copy.deepcopy(model))


def test_an_unknown_adapter_is_named():
    with pytest.raises(ModelError, match=r"the model has no adapter \['critic'\]; it has \['default'\]"):
        ModelBundle(our_model(), adapters={"value": "critic"})


def test_kernels_and_dtype():
    bundle = our_bundle()
    assert bundle.compute_dtype == torch.float32
    bundle.use_row_attention()
    assert bundle.kernels == set()
    bundle.score(LAYOUT)
    assert bundle.kernels == {"products"}
