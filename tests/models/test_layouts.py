"""Prefix-shared ≡ packed ≡ padded ≡ the model's own logits, for every architecture, in values and gradients."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alignkit.data.layout import LAYOUTS, Pairs
from alignkit.errors import ConfigError, ModelError
from alignkit.models.adapters import disable_dropout
from alignkit.models.attention import ATTENTION_NAME
from alignkit.models.bundle import ModelBundle
from alignkit.models.fused import fuse_frozen_modules
from alignkit.models.probe import cannot_pack, choose_layout
from tests.model_factory import SLIDING_WINDOW, tiny_model
from tests.pair_factory import (
    LENGTHS,
    PAD,
    assert_same_gradients,
    gradients,
    mixed,
    our_bundle,
    our_model,
    pairs_with_a_shared_start,
    plain_model,
    plain_token_logps,
    random_pairs,
)

SHARING = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "mistral",
    "phi",
    "phi3",
    "smollm3",
    "gpt2",
    "gpt_neox",
    "opt",
    "olmo2",
    "granite",
    "cohere2",
)
FUSED = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "smollm3",
    "olmo2",
    "granite",
    "cohere2",
)  # plain RMSNorm or SwiGLU
IGNORING = ("bloom", "gptj")  # these swallow the attention function's keywords and run their own
RELATIVE = 1e-5


def expected_numbers(architecture: str, pairs: Pairs | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token log-probabilities and LoRA gradients by plain transformers and PEFT, sequence by sequence."""
    model = plain_model(architecture)
    logps = plain_token_logps(model, pairs or random_pairs())
    mixed(logps).backward()
    return logps.detach(), gradients(model)


def assert_scores(
    bundle: ModelBundle,
    layout: str,
    logps: torch.Tensor,
    grads: dict[str, torch.Tensor],
    pairs: Pairs | None = None,
) -> None:
    scored = bundle.score(LAYOUTS[layout](pairs or random_pairs(), PAD)).logps
    mixed(scored).backward()
    torch.testing.assert_close(scored.detach(), logps, rtol=RELATIVE, atol=RELATIVE)
    assert_same_gradients(gradients(bundle.model), grads, RELATIVE)


@pytest.mark.parametrize("architecture", SHARING)
def test_every_layout_gives_the_models_own_numbers(architecture):
    assert min(prompt + max(tails) for prompt, *tails in LENGTHS) > SLIDING_WINDOW
    logps, grads = expected_numbers(architecture)
    bundle = our_bundle(architecture)
    disable_dropout(bundle.model)  # GPT-2 has attention dropout, which packed rows refuse
    assert_scores(bundle, "padded", logps, grads)  # with transformers' own attention
    assert bundle.kernels == set()
    assert bundle.attention_implementation != ATTENTION_NAME
    assert choose_layout(bundle, random_pairs(), "auto", PAD) == "prefix_shared"
    assert bundle.attention_implementation == ATTENTION_NAME
    for layout in LAYOUTS:
        bundle.kernels.clear()
        assert_scores(bundle, layout, logps, grads)
        # Padded rows go through transformers' SDPA path, packed ones through the batched products.
        assert bundle.kernels == (set() if layout == "padded" else {"products"})
    # And once more as the trainer runs it.
    assert (fuse_frozen_modules(bundle.base) > 0) == (architecture in FUSED)
    assert_scores(bundle, "prefix_shared", logps, grads)


@pytest.mark.parametrize("architecture", SHARING)
def test_a_start_that_prompts_share_is_computed_once(architecture):
    pairs = pairs_with_a_shared_start()
    layout = LAYOUTS["prefix_shared"](pairs, PAD)
    assert [block.root for block in layout.blocks] == [0, 11, 11]
    assert layout.tokens == len(pairs.input_ids) - 2 * 11
    logps, grads = expected_numbers(architecture, pairs)
    bundle = our_bundle(architecture)
    disable_dropout(bundle.model)
    bundle.use_row_attention()
    assert_scores(bundle, "prefix_shared", logps, grads, pairs)
    assert bundle.kernels == {"products"}


REFUSING = {"llama": {"attention_dropout": 0.1}, "bloom": {}}


@pytest.mark.parametrize("architecture", REFUSING)
def test_a_reference_of_its_own_gets_its_own_attention_back(architecture):
    """Packed rows fail on the policy. Its attention function would leave the soft caps of the reference out."""
    policy, reference = tiny_model(architecture, **REFUSING[architecture]), tiny_model("gemma2")
    bundle = ModelBundle(policy, reference=reference)
    before = bundle.attention_implementations
    with torch.no_grad():
        expected = plain_token_logps(reference, random_pairs())
    assert choose_layout(bundle, random_pairs(), "auto", PAD) == "padded"
    assert bundle.attention_implementations == before
    found = bundle.score_reference(LAYOUTS["padded"](random_pairs(), PAD)).logps
    torch.testing.assert_close(found, expected, rtol=RELATIVE, atol=RELATIVE)


@pytest.mark.parametrize("architecture", SHARING)
def test_reference_is_the_base_in_every_layout(architecture):
    base = tiny_model(architecture)
    base.set_attn_implementation("eager")
    with torch.no_grad():
        expected = plain_token_logps(base, random_pairs())
    bundle = our_bundle(architecture)
    bundle.use_row_attention()
    for layout in LAYOUTS:
        found = bundle.score_reference(LAYOUTS[layout](random_pairs(), PAD)).logps
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=RELATIVE, atol=RELATIVE)


@pytest.mark.parametrize(
    ("architecture", "without"),
    [
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"layer_types": ["full_attention"] * 2}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 2}),
        ("cohere2", {"logit_scale": 1.0}),
        ("granite", {"logits_scaling": 1.0}),
    ],
)
def test_the_tiny_models_show_a_feature_that_is_left_out(architecture, without):
    """Control for the equalities above: each of these features moves the numbers far more than their tolerance."""
    models = [tiny_model(architecture), tiny_model(architecture, **without)]
    with torch.no_grad():
        for model in models:
            model.set_attn_implementation("eager")
        with_it, without_it = (plain_token_logps(model, random_pairs()) for model in models)
    assert (with_it - without_it).abs().max() > 1000 * RELATIVE


@pytest.mark.parametrize("layout", ["prefix_shared", "packed"])
def test_pairs_and_tails_do_not_see_each_other(layout):
    """Replacing one completion changes its own log-probs and no other's, to the bit."""
    bundle = our_bundle("mistral")
    bundle.use_row_attention()
    pairs = random_pairs()
    changed = pairs.input_ids.clone()
    prompt, chosen, _ = LENGTHS[0]
    changed[prompt : prompt + chosen] = 50  # the first pair's chosen completion
    with torch.no_grad():
        before = bundle.score(LAYOUTS[layout](pairs, PAD)).logps
        after = bundle.score(LAYOUTS[layout](pairs._replace(input_ids=changed), PAD)).logps
    assert (before[:chosen] != after[:chosen]).all()
    assert torch.equal(before[chosen:], after[chosen:])


def test_tokens_after_a_completion_do_not_reach_it():
    """Causality inside one completion: its last token changes nobody else's log-prob."""
    bundle = our_bundle("llama")
    bundle.use_row_attention()
    pairs = random_pairs(((4, 6, 3),))
    changed = pairs.input_ids.clone()
    changed[9] = 50
    with torch.no_grad():
        before = bundle.score(LAYOUTS["prefix_shared"](pairs, PAD)).logps
        after = bundle.score(LAYOUTS["prefix_shared"](pairs._replace(input_ids=changed), PAD)).logps
    assert (before != after).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("layout", ["prefix_shared", "packed", "padded"])
def test_layout_asked_for_by_name_is_used(layout):
    bundle = our_bundle("qwen3")
    assert choose_layout(bundle, random_pairs(), layout, PAD) == layout
    assert (bundle.attention_implementation == ATTENTION_NAME) == (layout != "padded")


def our_log(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("alignkit")]


@pytest.mark.parametrize("architecture", IGNORING)
def test_models_that_ignore_the_attention_interface_fall_back(architecture, caplog):
    logps, grads = expected_numbers(architecture)
    bundle = our_bundle(architecture)
    own = bundle.attention_implementation
    with caplog.at_level(logging.WARNING, logger="alignkit"):
        layout = choose_layout(bundle, random_pairs(), "auto", PAD)
    assert layout == "padded"
    assert bundle.kernels == set()
    assert bundle.attention_implementation == own
    assert our_log(caplog) == [
        f"layout: padded, because {type(bundle.base).__name__} cannot run packed rows: "
        "its attention does not go through transformers' attention interface"
    ]
    assert_scores(bundle, layout, logps, grads)


def drop_the_plan(module, args, kwargs):
    """What a model does that swallows keywords: the row's attention plan never arrives."""
    kwargs.pop("row", None)
    return args, kwargs


def straighten_positions(module, args, kwargs):
    """What a model does that cannot branch: positions go on counting where they should go back to the prompt's end."""
    if kwargs.get("position_ids") is None:
        return args, kwargs
    positions = kwargs["position_ids"].clone()
    for row in positions:
        for i in range(1, len(row)):
            row[i] = 0 if row[i] == 0 else row[i - 1] + 1
    return args, {**kwargs, "position_ids": positions}


def test_a_swallowed_plan_shows_in_the_numbers(caplog):
    bundle = our_bundle("llama")
    bundle.base.model.register_forward_pre_hook(drop_the_plan, with_kwargs=True)
    with caplog.at_level(logging.WARNING, logger="alignkit"):
        assert choose_layout(bundle, random_pairs(), "auto", PAD) == "padded"
    (message,) = our_log(caplog)
    assert message.startswith("layout: padded, because LlamaForCausalLM cannot run packed rows: log-probs differ by")
    assert bundle.attention_implementation != ATTENTION_NAME


def test_a_model_that_cannot_branch_is_packed(caplog):
    logps, grads = expected_numbers("llama")
    bundle = our_bundle("llama")
    bundle.base.model.register_forward_pre_hook(straighten_positions, with_kwargs=True)
    with caplog.at_level(logging.WARNING, logger="alignkit"):
        assert choose_layout(bundle, random_pairs(), "auto", PAD) == "packed"
    assert our_log(caplog) == ["layout: packed, because prefix_shared does not agree with padded on this model"]
    bundle.kernels.clear()
    assert_scores(bundle, "packed", logps, grads)
    assert bundle.kernels == {"products"}
    with pytest.raises(
        ModelError, match="layout='prefix_shared' does not work with LlamaForCausalLM: log-probs differ"
    ):
        choose_layout(bundle, random_pairs(), "prefix_shared", PAD)


@pytest.mark.parametrize("kind", [True, False], ids=["disagrees", "agrees"])
def test_processes_agree_on_a_layout(kind, caplog):
    """Under FSDP a forward pass is a collective one: all processes try the same layouts and take the same."""
    votes = []

    def on_any_process(value):
        votes.append(value)
        return value or kind

    with caplog.at_level(logging.WARNING, logger="alignkit"):
        layout = choose_layout(our_bundle("llama"), random_pairs(), "auto", PAD, on_any_process=on_any_process)
    assert layout == ("padded" if kind else "prefix_shared")
    assert votes == ([False, False] if kind else [False])
    assert [line.split(": ")[-1] for line in our_log(caplog)] == (
        ["another process found that it does not agree with padded"] if kind else []
    )


def test_attention_dropout_falls_back_to_padded(caplog):
    """Packed rows have no attention dropout, and a probe in evaluation mode would not notice."""
    bundle = ModelBundle(tiny_model("llama", attention_dropout=0.5).eval())
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, logger="alignkit"):
        assert choose_layout(bundle, random_pairs(), "auto", PAD) == "padded"
    assert "attention dropout is not supported on packed rows" in our_log(caplog)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in bundle.model.modules())


def test_a_separate_reference_is_probed_too():
    """It may be of another architecture than the policy."""
    bundle = ModelBundle(our_model("llama"), reference=tiny_model("gptj"))
    with torch.no_grad():
        expected = plain_token_logps(tiny_model("gptj"), random_pairs())
    assert choose_layout(bundle, random_pairs(), "auto", PAD) == "padded"
    found = bundle.score_reference(LAYOUTS["padded"](random_pairs(), PAD)).logps
    torch.testing.assert_close(found, expected, rtol=RELATIVE, atol=RELATIVE)


def test_ignored_attention_would_give_wrong_numbers():
    """Control: without the fallback GPT-J runs, complains about nothing, and is wrong."""
    bundle = our_bundle("gptj")
    with torch.no_grad():
        expected = bundle.score(LAYOUTS["padded"](random_pairs(), PAD)).logps
        found = bundle.score(LAYOUTS["prefix_shared"](random_pairs(), PAD)).logps
    assert (expected - found).abs().max() > 0.01


@pytest.mark.parametrize("architecture", IGNORING)
@pytest.mark.parametrize("layout", ["prefix_shared", "packed"])
def test_asking_such_a_model_for_a_layout_by_name_is_an_error(architecture, layout):
    bundle = our_bundle(architecture)
    with pytest.raises(ModelError, match=f"layout='{layout}' does not work with .*Set layout='auto'"):
        choose_layout(bundle, random_pairs(), layout, PAD)


def test_unknown_layout_is_an_error():
    with pytest.raises(ConfigError, match="layout='stacked' is unknown"):
        choose_layout(our_bundle(), random_pairs(), "stacked", PAD)


RECURRENT = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "lfm2": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
    },
}


@pytest.mark.parametrize("architecture", RECURRENT)
def test_recurrent_models_fall_back_and_are_right(architecture, caplog):
    config = AutoConfig.for_model(
        architecture, vocab_size=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, **RECURRENT[architecture]
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert cannot_pack(config) is not None
    with torch.no_grad():
        expected = plain_token_logps(model, random_pairs())
    bundle = ModelBundle(model)
    with caplog.at_level(logging.WARNING, logger="alignkit"):
        assert choose_layout(bundle, random_pairs(), "auto", PAD) == "padded"
    assert our_log(caplog) == [
        f"layout: padded, because {type(model).__name__} cannot run packed rows: {cannot_pack(config)}"
    ]
    with torch.no_grad():
        found = bundle.score(LAYOUTS["padded"](random_pairs(), PAD)).logps
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="layout='packed' does not work"):
        choose_layout(bundle, random_pairs(), "packed", PAD)


def test_a_head_of_unknown_form_is_refused():
    """Logits that are not the head's product, scaled and capped as the config says, would be scored wrongly."""
    model = tiny_model("cohere2")
    bundle = ModelBundle(model)  # reads logit_scale from the config now
    model.logit_scale = 3.0
    with pytest.raises(ModelError, match="turns hidden states into logits in a way that is not known here"):
        choose_layout(bundle, random_pairs(), "auto", PAD)
