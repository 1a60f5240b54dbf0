"""What `max_tokens_per_forward` comes to: the estimate's arithmetic on a pretended card, and who may not use it."""

from __future__ import annotations

import types

import pytest
import torch
from accelerate.utils import DistributedType

from alignkit.errors import ConfigError
from alignkit.trainers.budget import CPU_TOKENS, FEWEST_TOKENS, forward_budget_tokens
from tests.model_factory import tiny_model

MIB = 2**20
# Tiny Llama: 32 hidden, 64 feed-forward, 2 layers, fp32. A layer keeps 4 · (14 · 32 + 5 · 64) = 3,072 bytes a token.
CHECKPOINTED_TOKEN_BYTES = 2 * 32 * 4 + 3072
WHOLE_TOKEN_BYTES = 2 * 3072


def arguments(asked="auto", *, device: str = "cuda", checkpointing: bool = True) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        max_tokens_per_forward=asked, device=torch.device(device), activation_checkpointing=checkpointing
    )


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):
    """Pretend that a CUDA card has so many bytes free."""

    def free(free_bytes: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 2 * free_bytes))

    return free


@pytest.mark.parametrize(("asked", "expected"), [(300, 300), (None, None), ("auto", CPU_TOKENS)])
def test_on_a_cpu(asked, expected):
    assert forward_budget_tokens(tiny_model("llama"), arguments(asked, device="cpu")) == expected


@pytest.mark.parametrize(
    ("checkpointing", "token_bytes"), [(True, CHECKPOINTED_TOKEN_BYTES), (False, WHOLE_TOKEN_BYTES)]
)
def test_on_a_card_by_hand(card, checkpointing, token_bytes):
    model = tiny_model("llama")
    weights_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    card(64 * MIB)
    expected = int(0.6 * (64 * MIB - weights_bytes) / token_bytes)
    found = forward_budget_tokens(model, arguments(checkpointing=checkpointing))
    assert found == pytest.approx(expected, abs=200 * 1024 / token_bytes)  # buffers of the model count too
    assert found > FEWEST_TOKENS


def test_sixteen_bit_activations_take_half(card):
    card(256 * MIB)
    wide = forward_budget_tokens(tiny_model("llama"), arguments())
    narrow = forward_budget_tokens(tiny_model("llama").to(torch.bfloat16), arguments())
    assert narrow == pytest.approx(2 * wide, rel=1e-2)


def test_more_memory_and_checkpointing_give_more_tokens(card):
    card(64 * MIB)
    small = forward_budget_tokens(tiny_model("llama"), arguments())
    assert small > forward_budget_tokens(tiny_model("llama"), arguments(checkpointing=False))
    card(128 * MIB)
    assert forward_budget_tokens(tiny_model("llama"), arguments()) == pytest.approx(2 * small, rel=2e-2)


def test_a_full_card_still_gets_a_usable_number(card):
    card(0)
    assert forward_budget_tokens(tiny_model("llama"), arguments()) == FEWEST_TOKENS


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox", "gemma2"])
def test_every_architectures_config_can_be_read(card, architecture):
    """GPT-2 calls its sizes otherwise, and OPT has no `intermediate_size`."""
    card(64 * MIB)
    assert forward_budget_tokens(tiny_model(architecture), arguments()) > FEWEST_TOKENS


@pytest.mark.parametrize("distributed", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_training_runs_whole_micro_batches(distributed):
    """Processes must run equally many forward passes there."""
    model = tiny_model("llama")
    assert forward_budget_tokens(model, arguments("auto"), distributed) is None
    assert forward_budget_tokens(model, arguments(None), distributed) is None
    with pytest.raises(ConfigError, match="unequal numbers of forward passes, which FSDP and DeepSpeed cannot follow"):
        forward_budget_tokens(model, arguments(300), distributed)
