"""What all rollout engines share: the inverse-CDF sampler, the ends of completions, and the checks of a request."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chisquare

from alignkit.errors import ConfigError, DataError, ModelError, TrainingError
from alignkit.rollout.engine import Endings, Sampling, check_request, draw_tokens, token_uniforms
from tests.model_factory import VOCAB_SIZE, tiny_model
from tests.rollout.engine_cases import letter_tokenizer

LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -torch.inf])
NEVER = 1.0 - 2.0**-53  # the largest number that torch.rand gives in float64


def uniform(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_token_is_the_first_whose_cumulative_probability_exceeds_the_number():
    """Probabilities 0.1, 0.2, 0.3, 0.4 by hand: bounds at 0.1, 0.3, 0.6."""
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(8, 4)
    numbers = uniform(0.0, 0.09999, 0.10001, 0.29999, 0.30001, 0.59999, 0.60001, NEVER)
    assert draw_tokens(logits, numbers, 1.0).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_temperature_divides_the_logits():
    """Logits 0 and ln 3: p = 1/4 and 3/4; at temperature 1/2 they are 1/10 and 9/10, at 2 they are 1/(1 + √3), …"""
    logits = torch.tensor([0.0, math.log(3)])
    for temperature, first in ((1.0, 0.25), (0.5, 0.1), (2.0, 1 / (1 + math.sqrt(3)))):
        found = draw_tokens(logits.expand(2, 2), uniform(first - 1e-6, first + 1e-6), temperature)
        assert found.tolist() == [0, 1]


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((3, 6), -torch.inf)
    logits[:, 2], logits[:, 4] = 0.0, 0.0
    assert draw_tokens(logits, uniform(0.0, 0.5, NEVER), 1.0).tolist() == [2, 4, 4]


def test_temperature_zero_takes_the_most_probable():
    assert draw_tokens(LOGITS.expand(2, 6), uniform(0.0, NEVER), 0.0).tolist() == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.9])
def test_draws_follow_the_softmax(temperature, dtype):
    """χ² over 40,000 completions with neighbouring seeds, each drawing its first token."""
    count = 40_000
    numbers = token_uniforms(range(count), 1)[:, 0]
    tokens = draw_tokens(LOGITS.to(dtype).expand(count, 6), numbers, temperature)
    expected = torch.softmax(LOGITS.to(dtype).double() / temperature, -1)[:5] * count
    found = torch.bincount(tokens, minlength=6)
    assert found[5] == 0
    assert chisquare(found[:5], expected * (count / expected.sum())).pvalue > 1e-3


def test_tokens_of_one_seed_follow_the_softmax_too():
    count = 40_000
    tokens = draw_tokens(LOGITS.expand(count, 6), token_uniforms([7], count)[0], 1.0)
    expected = torch.softmax(LOGITS.double(), -1)[:5] * count
    assert chisquare(torch.bincount(tokens, minlength=6)[:5], expected).pvalue > 1e-3


def test_a_large_vocabulary_is_drawn_without_a_gap():
    """Each of 150,000 equally probable tokens is hit by the number in the middle of its interval."""
    size = 150_000
    tokens = torch.arange(0, size, 9973)
    found = draw_tokens(torch.zeros(1, size).expand(len(tokens), size), (tokens.double() + 0.5) / size, 1.0)
    assert torch.equal(found, tokens)


def test_rows_do_not_depend_on_each_other():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    numbers = token_uniforms(range(5), 1)[:, 0]
    together = draw_tokens(logits, numbers, 1.0).tolist()
    assert together == [draw_tokens(logits[[row]], numbers[[row]], 1.0).item() for row in range(5)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    with pytest.raises(TrainingError, match="logits are not finite"):
        draw_tokens(torch.tensor([[0.0, 1.0, 2.0], bad]), uniform(0.5, 0.5), temperature)


def test_random_numbers_belong_to_their_seed():
    state = torch.random.get_rng_state()
    table = token_uniforms([3, 4, 3], 20)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(table[0], table[2])
    assert not torch.equal(table[0], table[1])
    assert torch.equal(token_uniforms([3], 5)[0], table[0, :5])
    assert table.dtype == torch.float64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: a completion needs at least 1 token"),
        ({"min_new_tokens": 5}, "min_new_tokens=5 must lie between 0 and max_new_tokens=4"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1 must lie between"),
        ({"temperature": -0.5}, "temperature=-0.5 must be 0"),
        ({"temperature": math.nan}, "temperature=nan must be 0"),
        ({"temperature": math.inf}, "temperature=inf must be 0"),
        ({"stop_strings": "END"}, r"stop_strings='END' is one string: write \('END',\)"),
        ({"stop_strings": ("END", "")}, "stop_strings holds an empty string"),
    ],
)
def test_bad_sampling(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**{"max_new_tokens": 4, **settings})


def endings(*, eos=2, tokenizer=None, **settings) -> Endings:
    model = tiny_model("llama")
    assert model.generation_config is not None
    model.generation_config.eos_token_id = eos
    tokenizer = tokenizer or letter_tokenizer(eos_token="</s>")
    return Endings(model, tokenizer, Sampling(**{"max_new_tokens": 20, **settings}))


def text(string: str) -> list[int]:
    return [ord(letter) for letter in string]


def test_every_end_token_ends_and_stays():
    rule = endings(eos=[7, 40])
    assert rule.eos_ids == (2, 7, 40)  # the tokenizer's own is 2
    for token in (2, 7, 40):
        assert rule.cut([50, 51, token, 52]) == ([50, 51, token], True)
    assert rule.cut([50, 51]) == ([50, 51], False)


def test_an_end_token_of_either_side_is_enough():
    assert endings(eos=None).eos_ids == (2,)
    assert endings(eos=9, tokenizer=letter_tokenizer(pad_token="<pad>")).eos_ids == (9,)


def test_stop_strings_end_at_the_token_that_completes_one():
    rule = endings(stop_strings=("END", "##"))
    assert rule.cut(text("abENcENDde")) == (text("abENcEND"), True)
    assert rule.cut(text("a#b##")) == (text("a#b##"), True)
    assert rule.cut(text("aENd#")) == (text("aENd#"), False)
    assert not rule.reached(text("##a"))  # completed before, not by this token


def test_stop_strings_are_found_across_tokens(byte_bpe_tokenizer):
    """Merged tokens and characters that are cut in several bytes."""
    rule = endings(tokenizer=byte_bpe_tokenizer, stop_strings=("bark 🙂",), eos=None, max_new_tokens=99)
    ids = byte_bpe_tokenizer("say hello to the bark 🙂 and more").input_ids
    found = rule.cut(ids)
    assert found.finished
    assert byte_bpe_tokenizer.decode(found.ids) == "say hello to the bark 🙂"


def test_a_special_token_can_be_a_stop_string():
    rule = endings(eos=None, stop_strings=("<s>",), tokenizer=letter_tokenizer(eos_token="</s>", bos_token="<s>"))
    assert rule.cut([50, 1, 51]) == ([50, 1], True)


def test_nothing_ends_before_the_least_length():
    rule = endings(min_new_tokens=4, stop_strings=("ab",))
    assert rule.cut(text("abcab")) == (text("abcab"), True)
    assert rule.cut([2, 2, 2, 2, 2]) == ([2, 2, 2, 2], True)


def test_completions_are_cut_at_the_greatest_length():
    assert endings(max_new_tokens=3).cut([50, 51, 52, 2]) == ([50, 51, 52], False)
    assert endings(max_new_tokens=3).cut([50, 51, 2]) == ([50, 51, 2], True)


def test_no_end_token_at_all_is_refused():
    bare = letter_tokenizer(pad_token="<pad>")
    with pytest.raises(ConfigError, match="Neither the tokenizer nor the model's generation config"):
        endings(eos=None, tokenizer=bare)
    assert endings(eos=None, tokenizer=bare, stop_strings=("x",)).eos_ids == ()


def test_an_end_token_of_another_vocabulary_is_refused():
    with pytest.raises(ModelError, match=f"token 500 is outside the model's vocabulary of {VOCAB_SIZE}"):
        endings(eos=500)


@pytest.mark.parametrize(
    ("prompts", "seeds", "error", "message"),
    [
        ([[5]], [], ConfigError, "1 prompts came with 0 lists of seeds"),
        ([[5], [6]], [[1], []], ConfigError, "prompt 1 has no seeds"),
        ([[5], []], [[1], [1]], DataError, "prompt 1 has no tokens"),
        ([[5, 128]], [[1]], DataError, "prompt 0 holds token ids from 5 to 128, but the model's vocabulary has 128"),
        ([[5, -1]], [[1]], DataError, "prompt 0 holds token ids from -1 to 5"),
        ([[5] * 31], [[1]], DataError, "31 tokens, which with max_new_tokens=2 is more than the model's 32 positions"),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bad_requests(prompts, seeds, error, message, architecture):
    name = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    model = tiny_model(architecture, **{name: 32})
    check_request(model, [[5] * 30], [[1]], Sampling(max_new_tokens=2))
    with pytest.raises(error, match=message):
        check_request(model, prompts, seeds, Sampling(max_new_tokens=2))
