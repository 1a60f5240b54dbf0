"""Continuous batching gives the completions of the decode loop, out of a cache of the size that was asked for."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from alignkit.errors import ConfigError, DataError, ModelError, TrainingError
from alignkit.models.bundle import ModelBundle
from alignkit.rollout.continuous import ContinuousEngine
from alignkit.rollout.engine import Sampling
from alignkit.rollout.hf import HFEngine
from tests.model_factory import tiny_model
from tests.pair_factory import lora_config, our_bundle
from tests.rollout.engine_cases import EOS, GREEDY, PROMPTS, SAMPLED, greedy_seeds, letter_tokenizer

# Several completions of a prompt, also of one with a single token.
SEEDS = [[1, 2, 3], [4], [5, 6], [7], [8, 9], [10], [11]]
CACHE = {"max_cache_tokens": 512, "page_tokens": 16, "max_batch_tokens": 64}


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer(eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt2", "mistral", "phi"])
def test_completions_equal_those_of_the_decode_loop(architecture, tokenizer):
    bundle = ModelBundle(tiny_model(architecture))
    bundle.use_row_attention()
    expected = HFEngine(bundle.model, tokenizer).generate(PROMPTS, SEEDS, SAMPLED)
    engine = ContinuousEngine(bundle.model, tokenizer, **CACHE)
    state, threads = torch.random.get_rng_state(), set(threading.enumerate())
    assert engine.generate(PROMPTS, SEEDS, SAMPLED) == expected
    assert torch.equal(torch.random.get_rng_state(), state)
    assert bundle.attention_implementation == "alignkit"
    assert set(threading.enumerate()) <= threads  # another test's thread may end meanwhile


def test_greedy_and_adapters_and_modes(tokenizer):
    bundle = our_bundle("llama", lora_config(lora_dropout=0.5))
    model = bundle.model.train()
    list(model.modules())[7].training = False
    modes = [module.training for module in model.modules()]
    seeds = greedy_seeds(PROMPTS)
    found = ContinuousEngine(model, tokenizer, **CACHE).generate(PROMPTS, seeds, GREEDY)
    assert [module.training for module in model.modules()] == modes
    assert found == HFEngine(model, tokenizer).generate(PROMPTS, seeds, GREEDY)
    assert found != HFEngine(tiny_model("llama"), tokenizer).generate(PROMPTS, seeds, GREEDY)


def test_a_cache_that_cannot_hold_all_at_once_changes_nothing(tokenizer):
    """Four pages of 16: one or two completions at a time, and some start anew."""
    model = tiny_model("llama")
    expected = HFEngine(model, tokenizer).generate(PROMPTS, SEEDS, SAMPLED)
    engine = ContinuousEngine(model, tokenizer, max_cache_tokens=64, page_tokens=16, max_batch_tokens=32)
    assert engine.generate(PROMPTS, SEEDS, SAMPLED) == expected


def test_the_cache_has_the_size_that_was_asked_for(tokenizer, monkeypatch):
    from transformers.generation.continuous_batching import cache

    made = []
    original = cache.PagedAttentionCache.__init__

    def noted(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(cache.PagedAttentionCache, "__init__", noted)
    ContinuousEngine(tiny_model("llama"), tokenizer, **CACHE).generate(PROMPTS, SEEDS, SAMPLED)
    assert [found.num_blocks for found in made] == [512 // 16]


def test_ends_lengths_and_stop_strings(tokenizer):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [EOS, *range(40, 60)]
    sampling = Sampling(max_new_tokens=8, min_new_tokens=4, temperature=1.4, stop_strings=("a", "bc", "Z"))
    expected = HFEngine(model, tokenizer).generate(PROMPTS, SEEDS, sampling)
    assert {completion.finished for completion in expected} == {True, False}
    free = HFEngine(model, tokenizer).generate(PROMPTS, SEEDS, dataclasses.replace(sampling, min_new_tokens=0))
    assert min(len(completion.ids) for completion in free) < 4 <= min(len(completion.ids) for completion in expected)
    assert ContinuousEngine(model, tokenizer, **CACHE).generate(PROMPTS, SEEDS, sampling) == expected


def test_a_failure_is_an_error_and_leaves_the_model_as_it_was(tokenizer):
    model = tiny_model("llama").train()
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    before, threads = model.config._attn_implementation, set(threading.enumerate())
    with pytest.raises(TrainingError, match=r"continuous batching failed: .*not finite"):
        ContinuousEngine(model, tokenizer, **CACHE).generate(PROMPTS, SEEDS, SAMPLED)
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == before
    assert set(threading.enumerate()) <= threads  # another test's thread may end meanwhile


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("gemma2", "its attention caps its scores"),
        ("bloom", "its attention does not go through transformers' attention interface"),
    ],
)
def test_models_that_cannot_are_refused(architecture, reason, tokenizer):
    with pytest.raises(ModelError, match=f"cannot generate by continuous batching, because {reason}"):
        ContinuousEngine(tiny_model(architecture), tokenizer, **CACHE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_cache_tokens": 8}, "max_cache_tokens=8 is less than one page of 16"),
        ({"max_batch_tokens": 0}, "max_batch_tokens=0 must be at least 1"),
        ({"page_tokens": 2}, "page_tokens=2 must be at least 4"),
    ],
)
def test_bad_bounds(settings, message, tokenizer):
    with pytest.raises(ConfigError, match=message):
        ContinuousEngine(tiny_model("llama"), tokenizer, **{**CACHE, **settings})


def test_bad_requests(tokenizer):
    engine = ContinuousEngine(tiny_model("llama"), tokenizer, **{**CACHE, "max_cache_tokens": 32})
    assert engine.generate([], [], SAMPLED) == []
    with pytest.raises(DataError, match="prompt 0 has no tokens"):
        engine.generate([[]], [[1]], SAMPLED)
    with pytest.raises(ConfigError, match="max_cache_tokens=32 cannot hold one completion of 33 tokens in pages of 16"):
        engine.generate([[5] * 21], [[1]], SAMPLED)
