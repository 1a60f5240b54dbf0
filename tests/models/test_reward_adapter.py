"""A saved reward adapter: on the base that a policy shares, trained on, and refused where it does not belong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignkit.data.layout import LAYOUTS
from alignkit.errors import ModelError
from alignkit.models.adapters import add_adapter
from alignkit.models.bundle import POLICY, REWARD, ModelBundle
from alignkit.models.heads import SCORE
from alignkit.models.load import load_model
from alignkit.models.lora import FUSED_LORA
from alignkit.models.reward_adapter import (
    find_reward_adapter,
    load_reward_policy,
    reward_peft_config,
    with_reward_head,
)
from tests.model_factory import tiny_model
from tests.pair_factory import PAD, fill_adapter, lora_config, mixed, random_pairs, trainable

HEADS = 3
LAYOUT = LAYOUTS["prefix_shared"](random_pairs(), PAD)


def load_base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def reward_model(base: PreTrainedModel, config: LoraConfig | None = None) -> PeftModel:
    with_reward_head(base, HEADS)
    model = add_adapter(base, reward_peft_config(config or lora_config()), custom_modules=FUSED_LORA)
    fill_adapter(model, scale=0.2)
    return model


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama. Read only."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """The folder of a reward adapter, and the rewards that it gives to `LAYOUT`."""
    folder = tmp_path_factory.mktemp("reward") / "adapter"
    model = reward_model(load_base(base_folder))
    bundle = ModelBundle(model, heads={POLICY: SCORE})
    bundle.use_row_attention()
    rewards = bundle.values(LAYOUT, LAYOUT.last_index).detach()
    model.save_pretrained(folder)
    return folder, rewards


def policy_bundle(base_folder: Path, **settings) -> ModelBundle:
    model = add_adapter(load_base(base_folder), lora_config(**settings), custom_modules=FUSED_LORA)
    fill_adapter(model, seed=5, scale=0.2)
    bundle = ModelBundle(model)
    bundle.use_row_attention()
    return bundle


def test_the_files_are_those_of_a_sequence_classifier(saved):
    config = LoraConfig.from_pretrained(saved[0])
    assert config.task_type == "SEQ_CLS"
    assert SCORE in config.modules_to_save
    found = find_reward_adapter(saved[0])
    assert found is not None
    assert found.outputs == HEADS


def test_reward_and_policy_share_one_base(base_folder, saved):
    bundle = policy_bundle(base_folder)
    bundle.model.train()
    logps = bundle.score(LAYOUT).logps
    base_weights = {name: weight.clone() for name, weight in bundle.base.named_parameters() if "lora_" not in name}
    before = trainable(bundle.model).keys()
    assert bundle.add_reward_adapter(saved[0]) == HEADS
    torch.testing.assert_close(bundle.values(LAYOUT, LAYOUT.last_index, role=REWARD), saved[1], rtol=1e-5, atol=1e-6)
    # The policy is what it was: numbers, what is trained, the mode it is in.
    assert torch.equal(bundle.score(LAYOUT).logps, logps)
    assert trainable(bundle.model).keys() == before
    assert bundle.model.training
    assert all(torch.equal(weight, dict(bundle.base.named_parameters())[name]) for name, weight in base_weights.items())
    assert {type(module).__name__ for module in bundle.base.modules() if "Lora" in type(module).__name__} == {
        "FusedLoraLinear"
    }
    mixed(bundle.score(LAYOUT).logps).backward()
    assert all((parameter.grad is not None) == (".default." in name) for name, parameter in trained_lora(bundle))


def trained_lora(bundle: ModelBundle) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in bundle.model.named_parameters() if "lora_" in name]


def test_an_adapter_on_other_layers_fits_too(base_folder, saved):
    bundle = policy_bundle(base_folder, target_modules=["q_proj"])
    bundle.add_reward_adapter(saved[0])
    torch.testing.assert_close(bundle.values(LAYOUT, LAYOUT.last_index, role=REWARD), saved[1], rtol=1e-5, atol=1e-6)


def test_a_shared_reward_is_frozen_and_without_dropout(base_folder, tmp_path):
    reward_model(load_base(base_folder), lora_config(lora_dropout=0.5)).save_pretrained(tmp_path / "dropping")
    bundle = policy_bundle(base_folder)
    bundle.add_reward_adapter(tmp_path / "dropping")
    bundle.model.train()
    first, second = (bundle.values(LAYOUT, LAYOUT.last_index, role=REWARD) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    mixed(bundle.score(LAYOUT).logps).backward()
    assert all(".default." in name for name, parameter in bundle.model.named_parameters() if parameter.grad is not None)


def test_two_reward_adapters_have_a_head_each(base_folder, saved, tmp_path):
    other = reward_model(load_base(base_folder))
    fill_adapter(other, seed=9, scale=0.2)
    other.save_pretrained(tmp_path / "other")
    bundle = policy_bundle(base_folder)
    bundle.add_reward_adapter(saved[0])
    bundle.add_reward_adapter(tmp_path / "other", role="helpful")
    torch.testing.assert_close(bundle.values(LAYOUT, LAYOUT.last_index, role=REWARD), saved[1], rtol=1e-5, atol=1e-6)
    assert (bundle.values(LAYOUT, LAYOUT.last_index, role="helpful") - saved[1]).abs().max() > 0.1
    with pytest.raises(ModelError, match="the model has an adapter called 'reward' already"):
        bundle.add_reward_adapter(saved[0])


def test_another_base_is_refused_by_name(saved, tmp_path):
    tiny_model("llama", seed=4).save_pretrained(tmp_path / "another")
    bundle = policy_bundle(tmp_path / "another")
    with pytest.raises(ModelError, match=r"was trained on '.*llama', and the base here is '.*another'"):
        bundle.add_reward_adapter(saved[0])
    assert REWARD not in bundle.heads


@pytest.mark.parametrize("overrides", [{"hidden_size": 64}, {"num_hidden_layers": 1}])
def test_another_base_is_refused_by_its_shape(saved, overrides, tmp_path):
    """A base without a name is measured: its width, and whether it has the adapter's layers."""
    model = add_adapter(tiny_model("llama", **overrides), lora_config(), custom_modules=FUSED_LORA)
    bundle = ModelBundle(model)
    before = set(model.state_dict())
    with pytest.raises(ModelError, match="does not fit this base, so it was trained on another one"):
        bundle.add_reward_adapter(saved[0])
    assert set(model.peft_config) == {"default"}
    assert set(model.state_dict()) == before


def test_what_is_no_reward_adapter_is_refused(base_folder, saved, tmp_path):
    policy = policy_bundle(base_folder)
    policy.model.save_pretrained(tmp_path / "policy")
    with pytest.raises(ModelError, match="holds no reward adapter: give the output folder of a RewardTrainer"):
        policy.add_reward_adapter(tmp_path / "policy")
    with pytest.raises(ModelError, match="holds no reward adapter"):
        policy.add_reward_adapter(base_folder)
    with pytest.raises(ModelError, match="a model that is trained whole cannot share its weights"):
        ModelBundle(load_base(base_folder)).add_reward_adapter(saved[0])
    with pytest.raises(ModelError, match="is an adapter of a language model"):
        load_reward_policy(tmp_path / "policy")


def test_a_reward_adapter_is_no_policy(saved):
    with pytest.raises(ModelError, match=r"the adapter '.*' has task_type 'SEQ_CLS' for a causal language"):
        load_model(saved[0], dtype=torch.float32)


def test_training_goes_on_from_a_saved_adapter(saved):
    model = with_reward_head(load_reward_policy(saved[0], dtype=torch.float32, custom_modules=FUSED_LORA), HEADS)
    bundle = ModelBundle(model, heads={POLICY: SCORE})
    bundle.use_row_attention()
    rewards = bundle.values(LAYOUT, LAYOUT.last_index)
    torch.testing.assert_close(rewards, saved[1], rtol=1e-5, atol=1e-6)
    mixed(rewards.flatten()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in trainable(model).values())
    assert isinstance(model, PeftModel)
    assert model.peft_config["default"].modules_to_save.count(SCORE) == 1
    with pytest.raises(ModelError, match="has 3 heads and num_heads=1: set num_heads=3"):
        with_reward_head(model, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"task_type": "TOKEN_CLS"}, "task_type 'TOKEN_CLS': a reward model needs 'SEQ_CLS'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "a reward model computes no logits"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "a reward model computes no logits"),
    ],
)
def test_adapters_that_a_reward_model_cannot_train(config, message):
    with pytest.raises(ModelError, match=message):
        reward_peft_config(lora_config(**config))


@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("modules", [None, ["score"]])
def test_adapter_configurations_as_trl_takes_them(task, modules):
    given = lora_config(task_type=task, modules_to_save=modules)
    config = reward_peft_config(given)
    assert config.task_type == "SEQ_CLS"
    assert config.modules_to_save is None  # PEFT adds the head itself
    assert given.task_type == task


def test_a_peft_model_without_a_head_is_refused(base_folder):
    with pytest.raises(ModelError, match="has an adapter, but no reward head 'score' to train"):
        with_reward_head(policy_bundle(base_folder).model, 1)
