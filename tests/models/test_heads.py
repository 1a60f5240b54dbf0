"""Scalar heads: read where asked, in fp32, without logits, with gradients to head and trunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from alignkit.data.layout import LAYOUTS, Groups
from alignkit.errors import ModelError
from alignkit.models.adapters import add_adapter
from alignkit.models.bundle import POLICY, REFERENCE, REWARD, ModelBundle, enable_checkpointing
from alignkit.models.heads import SCORE, VALUE, ScalarHead, add_reward_head, add_value_head, has_head, put_head
from alignkit.models.lora import FUSED_LORA
from alignkit.models.reward_adapter import reward_peft_config, with_reward_head
from tests.model_factory import tiny_model
from tests.pair_factory import (
    PAD,
    assert_same_gradients,
    fill_adapter,
    gradients,
    lora_config,
    mixed,
    random_pairs,
    sequences,
    trainable,
)

HEADS = 2


def reward_bundle(architecture: str = "llama", **overrides) -> ModelBundle:
    """A reward model with an adapter away from zero and two heads."""
    base = tiny_model(architecture, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        with_reward_head(base, HEADS)
    model = add_adapter(base, reward_peft_config(lora_config()), custom_modules=FUSED_LORA)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "lora_" in name:
                parameter.zero_()
    fill_adapter(model, scale=0.2)
    bundle = ModelBundle(model, adapters={REWARD: "default"}, heads={REWARD: SCORE})
    bundle.use_row_attention()
    return bundle


def plain_rewards(bundle: ModelBundle, pairs: Groups) -> Tensor:
    """Rewards by hand, one sequence at a time: the head's weight times the last hidden state that logits come from."""
    weight = bundle.base.get_submodule(SCORE).modules_to_save["default"].weight
    rewards = []
    for prompt, completion in sequences(pairs):
        ids = torch.tensor([prompt + completion])
        hidden = bundle.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
        rewards.append(weight @ hidden[0, -1].float())
    return torch.stack(rewards)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt", "granite"])
def test_rewards_are_read_at_the_last_token(architecture, layout):
    """One completion of one token is among the pairs."""
    bundle = reward_bundle(architecture)
    expected = plain_rewards(bundle, random_pairs())
    mixed(expected.flatten()).backward()
    wanted = gradients(bundle.model)
    laid_out = LAYOUTS[layout](random_pairs(), PAD)
    found = bundle.values(laid_out, laid_out.last_index, role=REWARD)
    assert found.shape == (6, HEADS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    mixed(found.flatten()).backward()
    assert_same_gradients(gradients(bundle.model), wanted)
    assert any(SCORE in name for name in wanted)


def test_groups_of_three_give_the_rewards_of_single_sequences():
    bundle = reward_bundle()
    pairs = random_pairs(((7, 4, 1),))
    prompt, first, second = pairs.parts()[0]
    third = torch.tensor([9, 8])
    triple = Groups(torch.cat([prompt, first, second, third]), torch.tensor([[7, 4, 1, 2]]))
    single = [Groups(torch.cat([prompt, ids]), torch.tensor([[7, len(ids)]])) for ids in (first, second, third)]
    layouts = [LAYOUTS["prefix_shared"](groups, PAD) for groups in (triple, *single)]
    together, *alone = (bundle.values(each, each.last_index, role=REWARD) for each in layouts)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_the_output_layer_never_runs():
    bundle = reward_bundle()
    rows: list[int] = []
    layer = bundle.base.get_output_embeddings()
    layer.register_forward_hook(lambda module, args, output: rows.append(args[0].numel()))
    laid_out = LAYOUTS["prefix_shared"](random_pairs(), PAD)
    bundle.values(laid_out, laid_out.last_index, role=REWARD)
    assert rows == [0]


def test_log_probs_and_values_come_out_of_one_pass():
    model = tiny_model("llama")
    head = add_value_head(model)
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    bundle = ModelBundle(
        add_adapter(model, lora_config(modules_to_save=None), custom_modules=FUSED_LORA), heads={"value": VALUE}
    )
    bundle.use_row_attention()
    laid_out = LAYOUTS["prefix_shared"](random_pairs(), PAD)
    scores = bundle.score(laid_out, heads=(VALUE,), head_index=laid_out.score_index)
    torch.testing.assert_close(scores.logps, bundle.score(laid_out).logps, rtol=0, atol=0)
    assert scores.values.keys() == {VALUE}
    assert scores.values[VALUE].shape == (len(laid_out.targets), 1)
    with torch.no_grad():
        hidden = bundle.base.model(
            input_ids=laid_out.input_ids[:, :11], position_ids=laid_out.position_ids[:, :11]
        ).last_hidden_state[0, 10]
    # The prompt's last position predicts the first token of both completions: one value for both.
    first, second = scores.values[VALUE][0], scores.values[VALUE][5]
    torch.testing.assert_close(first, head.weight @ hidden, rtol=1e-4, atol=1e-5)
    assert torch.equal(first, second)
    assert not bundle.score(laid_out).values


def test_the_head_is_fp32_over_a_bf16_base_and_under_autocast():
    base = tiny_model("llama", hidden_size=64).to(torch.bfloat16)
    with_reward_head(base, 1)
    bundle = ModelBundle(
        add_adapter(base, reward_peft_config(lora_config()), custom_modules=FUSED_LORA), heads={POLICY: SCORE}
    )
    laid_out = LAYOUTS["padded"](random_pairs(), PAD)
    plain = bundle.values(laid_out, laid_out.last_index)
    assert plain.dtype == torch.float32
    assert not torch.equal(plain, plain.bfloat16().float())
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    head = ScalarHead(8, 2)
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    expected = hidden @ head.weight.t()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(head(hidden), expected, rtol=1e-6, atol=1e-6)


def test_initial_values():
    torch.manual_seed(0)
    model = tiny_model("llama", hidden_size=1024, num_attention_heads=4)
    head = add_reward_head(model, 64)
    assert head.weight.shape == (64, 1024)
    assert head.outputs == 64
    assert head.weight.std().item() == pytest.approx(1025**-0.5, rel=0.02)
    assert not add_value_head(model).weight.any()
    assert has_head(model, SCORE)
    assert not has_head(model, "critic")


def test_a_head_twice_or_without_an_output_layer_is_refused():
    model = tiny_model("llama")
    add_reward_head(model)
    with pytest.raises(ModelError, match="LlamaForCausalLM has a module called 'score' already"):
        add_reward_head(model)
    with pytest.raises(ModelError, match="LlamaModel has no linear output layer"):
        put_head(tiny_model("llama").model, VALUE)


def test_roles_without_a_head_are_refused():
    bundle = reward_bundle()
    laid_out = LAYOUTS["padded"](random_pairs(), PAD)
    with pytest.raises(ModelError, match=r"role 'policy' has no scalar head; roles with one: \['reward'\]"):
        bundle.values(laid_out, laid_out.last_index)
    with pytest.raises(ModelError, match=r"the model has no head \['value'\]"):
        ModelBundle(tiny_model("llama"), heads={POLICY: VALUE})
    with pytest.raises(ModelError, match="role 'critic' needs adapters or a separate model"), bundle.role("critic"):
        pass


def test_lora_on_all_linear_layers_leaves_head_and_output_layer_alone():
    names = set(trainable(reward_bundle().model))
    assert {name for name in names if "lora_" not in name} == {"base_model.model.score.modules_to_save.default.weight"}
    assert not any("lm_head" in name for name in names)


def test_a_model_trained_whole_reads_rewards_under_every_role():
    model = tiny_model("llama")
    with_reward_head(model, 1)
    bundle = ModelBundle(model, adapters={REWARD: None}, heads={REWARD: SCORE})
    laid_out = LAYOUTS["padded"](random_pairs(), PAD)
    bundle.values(laid_out, laid_out.last_index, role=REWARD).sum().backward()
    assert model.get_submodule(SCORE).weight.grad.abs().max() > 0
    assert not model.lm_head.weight.requires_grad  # it never runs
    assert not bundle.can_reference
    with pytest.raises(ModelError, match="role 'reference'"):
        bundle.score_reference(laid_out)


def two_roles() -> ModelBundle:
    """A policy and a trainable reward adapter with its head on one base, both away from zero."""
    base = tiny_model("llama")
    put_head(base, SCORE)
    model = add_adapter(base, reward_peft_config(lora_config()), custom_modules=FUSED_LORA)
    model.add_adapter("reward", reward_peft_config(lora_config()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or ".modules_to_save." in name)
        if parameter.requires_grad:
            nn.init.zeros_(parameter)
    fill_adapter(model, scale=0.2, adapter="default")
    fill_adapter(model, seed=1, scale=0.2, adapter="reward")
    bundle = ModelBundle(model, adapters={REWARD: "reward"}, heads={POLICY: SCORE, REWARD: SCORE})
    bundle.use_row_attention()
    model.train()
    return bundle


def role_gradients(bundle: ModelBundle) -> dict[str, Tensor]:
    """Read both roles' heads, then run one backward pass through both while the base wears no adapter."""
    laid_out = LAYOUTS["prefix_shared"](random_pairs(), PAD)
    policy = mixed(bundle.values(laid_out, laid_out.last_index).flatten())
    reward = mixed(bundle.values(laid_out, laid_out.last_index, role=REWARD).flatten())
    with bundle.role(REFERENCE):
        (policy + 2 * reward).backward()
    return gradients(bundle.model)


def test_two_adapters_each_with_its_head_under_checkpointing():
    expected = role_gradients(two_roles())
    assert len([name for name in expected if ".modules_to_save." in name]) == 2
    bundle = two_roles()
    enable_checkpointing(bundle.base, {"use_reentrant": False})
    bundle.model.enable_input_require_grads()
    bundle.protect_checkpointing({"use_reentrant": False})
    assert_same_gradients(role_gradients(bundle), expected, 1e-6)
