"""Scoring through forward hooks: other calls unchanged, trained heads right, nothing computed twice."""

from __future__ import annotations

import pytest
import torch

from alignkit.data.layout import LAYOUTS
from alignkit.errors import ModelError
from alignkit.functional.logprobs import Logits
from alignkit.models.bundle import ModelBundle
from alignkit.models.scoring import ScoreRequest, even_sample, install_scoring, logits_of
from tests.model_factory import tiny_config, tiny_model
from tests.pair_factory import (
    PAD,
    assert_same_gradients,
    gradients,
    lora_config,
    mixed,
    our_bundle,
    plain_model,
    plain_token_logps,
    random_pairs,
    trainable,
)

IDS = torch.arange(40, 60)[None]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
def test_a_plain_call_is_unchanged_to_the_bit(architecture):
    plain, hooked = tiny_model(architecture), tiny_model(architecture)
    install_scoring(hooked)
    with torch.no_grad():
        expected = plain(IDS, labels=IDS)
        found = hooked(IDS, labels=IDS)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.loss, expected.loss)
        hooked(IDS, score=ScoreRequest(torch.tensor([3]), torch.tensor([44])))
        assert torch.equal(hooked(IDS).logits, expected.logits)  # and nothing of a request is left behind


def test_generate_is_unchanged():
    plain = tiny_model("llama").generate(IDS, max_new_tokens=5, do_sample=False, min_new_tokens=5)
    bundle = ModelBundle(tiny_model("llama"))
    bundle.use_row_attention()
    found = bundle.model.generate(IDS, max_new_tokens=5, do_sample=False, min_new_tokens=5)
    assert found.shape == (1, 25)
    assert torch.equal(found, plain)


def test_generate_works_after_an_interrupted_scoring_pass():
    """PEFT's `generate` calls the base past the hook that opens requests, so an open one would divert its head."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    bundle = our_bundle()
    handle = bundle.base.model.layers[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        bundle.score(LAYOUTS["padded"](random_pairs(), PAD))
    handle.remove()
    assert bundle.model.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3).shape == (1, 23)


def test_a_request_through_a_peft_model_returns_scores_and_no_logits():
    bundle = our_bundle()
    with torch.no_grad():
        scores = bundle.model(input_ids=IDS, score=ScoreRequest(torch.tensor([2, 5]), torch.tensor([43, 46])))
        logits = bundle.model(input_ids=IDS).logits[0]
    expected = torch.log_softmax(logits, -1)[[2, 5], [43, 46]]
    torch.testing.assert_close(scores.logps, expected, rtol=1e-5, atol=1e-5)
    assert scores.statistics is None
    assert scores.square_sums is None


HEADS = {
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "dora on the head": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere2"])
@pytest.mark.parametrize("head", HEADS)
def test_trained_heads_get_the_gradient_of_naive_autograd(head, architecture):
    overrides = {"tie_word_embeddings": False}
    plain = plain_model(architecture, lora_config(**HEADS[head]), **overrides)
    expected = plain_token_logps(plain, random_pairs())
    mixed(expected).backward()
    bundle = our_bundle(architecture, lora_config(**HEADS[head]), **overrides)
    assert any("lm_head" in name for name in trainable(bundle.model))
    bundle.use_row_attention()
    scores = bundle.score(LAYOUTS["prefix_shared"](random_pairs(), PAD))
    mixed(scores.logps).backward()
    torch.testing.assert_close(scores.logps, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(bundle.model), gradients(plain), 2e-5)


@pytest.mark.parametrize("head", HEADS)
def test_the_reference_ignores_a_trained_head(head):
    bundle = our_bundle("llama", lora_config(**HEADS[head]), tie_word_embeddings=False)
    with torch.no_grad():
        expected = plain_token_logps(tiny_model("llama", tie_word_embeddings=False), random_pairs())
    found = bundle.score_reference(LAYOUTS["padded"](random_pairs(), PAD)).logps
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(bundle.score(LAYOUTS["padded"](random_pairs(), PAD)).logps, expected, atol=1e-2)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_model_trained_whole_gets_every_gradient(architecture):
    """Tied embeddings (Gemma 2) collect the gradient of both uses."""
    plain = tiny_model(architecture)
    plain.set_attn_implementation("eager")
    expected = plain_token_logps(plain, random_pairs())
    mixed(expected).backward()
    bundle = ModelBundle(tiny_model(architecture))
    bundle.use_row_attention()
    scores = bundle.score(LAYOUTS["prefix_shared"](random_pairs(), PAD))
    mixed(scores.logps).backward()
    assert_same_gradients(gradients(bundle.model), gradients(plain), 2e-5)


def test_statistics_and_square_sums_of_chosen_positions():
    bundle = our_bundle("gemma2")
    layout = LAYOUTS["padded"](random_pairs(), PAD)
    few = torch.tensor([0, 3, 8])
    scores = bundle.score(layout, statistics=few, square_sums=True)
    with torch.no_grad():
        logits = bundle.model(
            input_ids=layout.input_ids, attention_mask=layout.attention_mask, position_ids=layout.position_ids
        ).logits
    z = logits.reshape(-1, logits.shape[-1])[layout.score_index]
    probs = torch.softmax(z, -1)
    torch.testing.assert_close(scores.square_sums, (probs**2).sum(-1).log(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.statistics.mean_logit, z[few].mean(-1), rtol=1e-4, atol=1e-5)
    entropy = -(probs * probs.log()).sum(-1)[few]
    torch.testing.assert_close(scores.statistics.entropy, entropy, rtol=1e-4, atol=1e-5)
    assert scores.statistics.is_top1.tolist() == (z.argmax(-1) == layout.targets)[few].tolist()


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ModelError, match="LlamaModel has no output head; a causal language model is needed"):
        install_scoring(tiny_model("llama").model)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("llama", Logits(1.0, None)),
        ("gemma2", Logits(1.0, 3.0)),
        ("granite", Logits(0.5, None)),  # divides by logits_scaling = 2
        ("cohere2", Logits(0.5, None)),  # multiplies by logit_scale
    ],
)
def test_logits_of_an_architecture(architecture, expected):
    assert logits_of(tiny_config(architecture)) == expected


@pytest.mark.parametrize(
    ("count", "at_most", "expected"),
    [(5, 8, [0, 1, 2, 3, 4]), (8, 4, [0, 2, 4, 6]), (9, 4, [0, 3, 6]), (1, 1, [0]), (0, 4, [])],
)
def test_even_sample(count, at_most, expected):
    assert even_sample(count, at_most, torch.device("cpu")).tolist() == expected
