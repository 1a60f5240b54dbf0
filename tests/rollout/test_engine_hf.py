"""The decode loop against transformers' own `generate`, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from alignkit.data.layout import LAYOUTS
from alignkit.errors import ConfigError, DataError, TrainingError
from alignkit.models.bundle import REFERENCE, ModelBundle
from alignkit.rollout.engine import Sampling
from alignkit.rollout.hf import HFEngine
from tests.model_factory import ARCHITECTURES, VOCAB_SIZE, tiny_model
from tests.pair_factory import PAD, gradients, lora_config, mixed, our_bundle, random_pairs
from tests.rollout.engine_cases import EOS, GREEDY, PROMPTS, SAMPLED, greedy_seeds, letter_tokenizer, own_generate


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer(eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_transformers_generate(architecture, tokenizer):
    reference = tiny_model(architecture)
    reference.set_attn_implementation("eager")
    expected = own_generate(reference, PROMPTS, GREEDY.max_new_tokens)
    found = HFEngine(tiny_model(architecture), tokenizer).generate(PROMPTS, greedy_seeds(PROMPTS), GREEDY)
    assert found == expected


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "mistral"])
def test_greedy_equals_transformers_generate_after_the_switch_of_attention(architecture, tokenizer):
    reference = tiny_model(architecture)
    reference.set_attn_implementation("eager")
    expected = own_generate(reference, PROMPTS, GREEDY.max_new_tokens)
    bundle = ModelBundle(tiny_model(architecture))
    bundle.use_row_attention()
    assert bundle.attention_implementation == "alignkit"
    assert HFEngine(bundle.model, tokenizer).generate(PROMPTS, greedy_seeds(PROMPTS), GREEDY) == expected


def test_some_of_these_completions_end_and_some_do_not():
    """Control: the comparison above sees rows that leave the batch."""
    ends = {completion.finished for completion in own_generate(tiny_model("llama"), PROMPTS, GREEDY.max_new_tokens)}
    assert ends == {True, False}


RECURRENT = {
    "mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "expand": 2, "time_step_rank": 4},
    "lfm2": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
    },
}


def recurrent_model(architecture: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCAB_SIZE,
        eos_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=1,
        **RECURRENT[architecture],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("architecture", RECURRENT)
def test_recurrent_models_go_through_transformers_generate(architecture, tokenizer):
    model = recurrent_model(architecture)
    model.generation_config.repetition_penalty = 1.7  # a checkpoint's own option, which must not reach the draw
    found = HFEngine(model, tokenizer).generate(PROMPTS, greedy_seeds(PROMPTS), GREEDY)
    assert model.generation_config.repetition_penalty == 1.7
    model.generation_config.repetition_penalty = None
    expected = [own_generate(model, [prompt], GREEDY.max_new_tokens)[0] for prompt in PROMPTS]
    assert found == expected
    alone = HFEngine(model, tokenizer).generate([PROMPTS[3]], [[8]], SAMPLED)
    together = HFEngine(model, tokenizer).generate(PROMPTS, [[1], [2, 3], [4], [7, 8], [5], [6], [9]], SAMPLED)
    assert together[5] == alone[0]
    assert together[4] != alone[0]


def test_both_ways_draw_the_same_tokens(tokenizer):
    """The loop, and `generate` with our processor, on a model that can do both."""
    engine = HFEngine(tiny_model("llama"), tokenizer)
    seeds = [[10 * p, 10 * p + 1] for p in range(len(PROMPTS))]
    sampling = Sampling(max_new_tokens=16, temperature=1.3, min_new_tokens=3, stop_strings=("a", "bc"))
    expected = engine.generate(PROMPTS, seeds, sampling)
    engine._is_recurrent = True
    assert engine.generate(PROMPTS, seeds, sampling) == expected


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_completion_depends_on_its_prompt_and_seed_alone(architecture, tokenizer):
    """Alone, in a batch, in another order, with other batch bounds, as one of three completions."""
    model = tiny_model(architecture)
    engine = HFEngine(model, tokenizer)
    seeds = [[100 * p + g for g in range(3)] for p in range(len(PROMPTS))]
    expected = engine.generate(PROMPTS, seeds, SAMPLED)
    assert len({tuple(completion.ids) for completion in expected}) > len(PROMPTS) * 2
    flat = [(prompt, seed) for prompt, of_prompt in zip(PROMPTS, seeds, strict=True) for seed in of_prompt]
    for (prompt, seed), completion in zip(flat, expected, strict=True):
        assert engine.generate([prompt], [[seed]], SAMPLED) == [completion]
    backwards = engine.generate(PROMPTS[::-1], seeds[::-1], SAMPLED)
    assert [backwards[3 * p : 3 * p + 3] for p in range(len(PROMPTS))][::-1] == [
        expected[3 * p : 3 * p + 3] for p in range(len(PROMPTS))
    ]
    for bound in (1, 60, 150):
        assert HFEngine(model, tokenizer, max_batch_tokens=bound).generate(PROMPTS, seeds, SAMPLED) == expected


def test_prompts_may_have_different_numbers_of_completions(tokenizer):
    engine = HFEngine(tiny_model("llama"), tokenizer)
    found = engine.generate(PROMPTS[:3], [[1], [2, 3, 4], [5, 6]], SAMPLED)
    alone = [
        engine.generate([PROMPTS[p]], [[seed]], SAMPLED)[0]
        for p, seed in [(0, 1), (1, 2), (1, 3), (1, 4), (2, 5), (2, 6)]
    ]
    assert found == alone


def test_equal_seeds_give_equal_completions_and_longer_ones_continue(tokenizer):
    engine = HFEngine(tiny_model("llama"), tokenizer)
    first, second, other = engine.generate([PROMPTS[0]], [[5, 5, 6]], SAMPLED)
    assert first == second != other
    short = engine.generate([PROMPTS[0]], [[5]], Sampling(max_new_tokens=3))[0]
    assert short.ids == first.ids[:3]


def test_first_tokens_follow_the_model(tokenizer):
    """χ² of 4,000 completions of one prompt against softmax(logits / T) of the model itself."""
    model, temperature, count = tiny_model("llama"), 1.5, 4000
    found = HFEngine(model, tokenizer).generate(
        [PROMPTS[0]], [list(range(count))], Sampling(max_new_tokens=1, temperature=temperature)
    )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    expected = torch.softmax(logits / temperature, -1) * count
    observed = torch.bincount(torch.tensor([completion.ids[0] for completion in found]), minlength=VOCAB_SIZE)
    often = expected >= 20
    rest = [int(observed[~often].sum())], [expected[~often].sum()]
    result = chisquare([*observed[often], *rest[0]], [*expected[often], *rest[1]])
    assert often.sum() > 10
    assert result.pvalue > 1e-3


def test_second_tokens_follow_the_model_too(tokenizer):
    """Each drawn token is the one that inverse transform sampling from the whole sequence's logits gives."""
    model = tiny_model("llama")
    (completion,) = HFEngine(model, tokenizer).generate([PROMPTS[1]], [[3]], SAMPLED)
    numbers = torch.rand(SAMPLED.max_new_tokens, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids = torch.tensor([PROMPTS[1] + completion.ids])
    with torch.no_grad():
        probs = torch.softmax(model(input_ids=ids, use_cache=False).logits[0].double(), -1)
    for place, token in enumerate(completion.ids):
        cdf = probs[len(PROMPTS[1]) - 1 + place].cumsum(-1)
        assert cdf[token] - probs[len(PROMPTS[1]) - 1 + place, token] - 1e-6 <= numbers[place] <= cdf[token] + 1e-6


def test_every_prompt_is_run_once(tokenizer):
    model = tiny_model("llama")
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    HFEngine(model, tokenizer).generate(PROMPTS, [[1, 2, 3]] * len(PROMPTS), SAMPLED)
    prefills = [shape for shape in shapes if shape[1] > 1 or shape[0] == 1]
    assert sum(rows for rows, _ in prefills) <= len(PROMPTS) + SAMPLED.max_new_tokens  # a last row may be alone
    assert sum(rows for rows, tokens in shapes if tokens > 1) == sum(len(prompt) > 1 for prompt in PROMPTS)


def test_ended_rows_leave_the_batch(tokenizer):
    model = tiny_model("llama")
    rows = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = HFEngine(model, tokenizer).generate(PROMPTS, greedy_seeds(PROMPTS), GREEDY)
    assert sum(rows) == sum(len(completion.ids) for completion in found)
    assert any(completion.finished for completion in found)


def test_least_length_and_stop_strings(tokenizer):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [EOS, *range(40, 90)]  # most tokens end a completion
    engine = HFEngine(model, tokenizer)
    seeds = [[p, p + 50] for p in range(len(PROMPTS))]
    short = engine.generate(PROMPTS, seeds, Sampling(max_new_tokens=9))
    assert min(len(completion.ids) for completion in short) == 1
    for completion in engine.generate(PROMPTS, seeds, Sampling(max_new_tokens=9, min_new_tokens=5)):
        assert len(completion.ids) >= 5
        assert not set(completion.ids[:5]) & {EOS, *range(40, 90)}
    model.generation_config.eos_token_id = EOS
    free = engine.generate(PROMPTS, seeds, Sampling(max_new_tokens=9))
    letter = tokenizer.decode([next(token for token in free[0].ids[2:] if token >= 32)])
    stopped = engine.generate(PROMPTS, seeds, Sampling(max_new_tokens=9, stop_strings=(letter,)))
    for plain, cut in zip(free, stopped, strict=True):
        ends = [place for place, token in enumerate(plain.ids) if chr(token) == letter]
        assert cut.ids == (plain.ids[: ends[0] + 1] if ends else plain.ids)
        assert cut.finished == (bool(ends) or plain.finished)


def test_the_global_generator_and_all_modes_stay(tokenizer):
    bundle = our_bundle("llama", lora_config(lora_dropout=0.5))
    model = bundle.model.train()
    list(model.modules())[7].training = False
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    engine = HFEngine(model, tokenizer)
    found = engine.generate(PROMPTS, greedy_seeds(PROMPTS), SAMPLED)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert engine.generate(PROMPTS, greedy_seeds(PROMPTS), SAMPLED) == found  # no dropout
    bundle.model.config.max_position_embeddings = 4
    with pytest.raises(DataError):
        engine.generate(PROMPTS, greedy_seeds(PROMPTS), SAMPLED)
    assert [module.training for module in model.modules()] == modes


def test_modes_come_back_after_a_failure(tokenizer):
    model = tiny_model("llama").train()
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(TrainingError, match="not finite"):
        HFEngine(model, tokenizer).generate(PROMPTS, greedy_seeds(PROMPTS), SAMPLED)
    assert all(module.training for module in model.modules())


def step(bundle: ModelBundle, *, checkpointing: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    bundle.model.train()
    if checkpointing:
        bundle.model.enable_input_require_grads()
        bundle.protect_checkpointing(None)
    logps = bundle.score(LAYOUTS["prefix_shared"](random_pairs(), PAD)).logps
    mixed(logps).backward()
    return logps.detach(), gradients(bundle.model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_goes_on_as_before(checkpointing, tokenizer):
    bundle = our_bundle()
    bundle.use_row_attention()
    logps, grads = step(bundle, checkpointing=checkpointing)
    engine = HFEngine(bundle.model, tokenizer)
    found = engine.generate(PROMPTS, greedy_seeds(PROMPTS), SAMPLED)
    assert all(parameter.grad is None for parameter in bundle.model.parameters())
    logps_after, grads_after = step(bundle, checkpointing=checkpointing)
    assert torch.equal(logps_after, logps)
    assert all(torch.equal(grads_after[name], gradient) and gradient.any() for name, gradient in grads.items())
    plain = our_bundle()
    assert HFEngine(plain.model, tokenizer).generate(PROMPTS, greedy_seeds(PROMPTS), SAMPLED) == found


def test_the_role_that_the_base_wears_is_the_one_that_speaks(tokenizer):
    bundle = our_bundle()
    bundle.use_row_attention()
    engine = HFEngine(bundle.model, tokenizer)
    policy = engine.generate(PROMPTS, greedy_seeds(PROMPTS), GREEDY)
    with bundle.role(REFERENCE):
        reference = engine.generate(PROMPTS, greedy_seeds(PROMPTS), GREEDY)
    assert (
        policy != reference == HFEngine(tiny_model("llama"), tokenizer).generate(PROMPTS, greedy_seeds(PROMPTS), GREEDY)
    )


def test_errors_come_before_any_work(tokenizer):
    engine = HFEngine(tiny_model("llama"), tokenizer)
    assert engine.generate([], [], SAMPLED) == []
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        engine.generate([[5], []], [[1], [1]], SAMPLED)
    with pytest.raises(ConfigError, match="max_batch_tokens=0 must be at least 1"):
        HFEngine(tiny_model("llama"), tokenizer, max_batch_tokens=0)
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    with pytest.raises(ConfigError, match="end-of-sequence"):
        HFEngine(model, letter_tokenizer(pad_token="<pad>")).generate([[5]], [[1]], SAMPLED)
