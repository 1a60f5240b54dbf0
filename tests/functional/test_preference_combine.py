"""Mixes of losses: weights, what each loss is given, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.functional import preference as p
from alignkit.functional.divergence import forward_kl
from alignkit.functional.preference import LOSSES, LossOptions, LossSpec, PairLogps, PairTokens, combine

POLICY = PairLogps(torch.tensor([-5.0, -9.0]), torch.tensor([-16.0, -8.0]))
REF = PairLogps(torch.tensor([-7.0, -8.0]), torch.tensor([-15.0, -9.0]))
TOKENS = PairTokens(torch.tensor([10, 4]), torch.tensor([20, 3]))
LABEL = torch.tensor([True, False])
OPTIONS = LossOptions(
    beta=0.3,
    label_smoothing=0.1,
    discopop_tau=0.2,
    simpo_gamma=0.9,
    cpo_alpha=0.4,
    dpop_lambda=7.0,
    desirable_weight=1.5,
    undesirable_weight=0.5,
)


def mix(*names: str, weights: tuple[float, ...] = (), options: LossOptions = OPTIONS, **given: Any) -> p.PreferenceLoss:
    pairs = list(zip([LOSSES[name] for name in names], weights or [1.0] * len(names), strict=True))
    return combine(pairs, POLICY, given.pop("ref", REF), options=options, **given)


def test_mix_is_the_weighted_sum_with_the_first_losses_rewards() -> None:
    result = mix("simpo", "sigmoid", "sft", weights=(0.5, 2.0, -1.0), tokens=TOKENS)
    simpo = p.simpo(POLICY, None, beta=0.3, tokens=TOKENS, simpo_gamma=0.9)
    sigmoid = p.sigmoid(POLICY, REF, beta=0.3, label_smoothing=0.1)
    sft = p.sft(POLICY, None, beta=0.3, tokens=TOKENS)
    torch.testing.assert_close(result.losses, 0.5 * simpo.losses + 2.0 * sigmoid.losses - sft.losses)
    assert torch.equal(result.chosen_rewards, simpo.chosen_rewards)
    assert torch.equal(result.rejected_rewards, simpo.rejected_rewards)


@pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in LOSSES.items()])
def test_every_loss_gets_the_options_and_tensors_of_its_row(spec: LossSpec) -> None:
    tensors: dict[str, Any] = {
        "tokens": TOKENS,
        "margin": torch.tensor([0.5, 1.0]),
        "label": LABEL,
        "kl": torch.tensor(0.7),
        "unweighted": PairLogps(POLICY.chosen * 2, POLICY.rejected * 2),
    }
    keywords = {name: tensors[name] for name in spec.reads}
    keywords |= {name: vars(OPTIONS)[name] for name in spec.options}
    expected = spec.function(POLICY, REF, beta=0.3, **keywords)
    result = mix(spec.name, **tensors)
    for actual, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=0)


def test_pair_weights_multiply_every_row_of_the_mix() -> None:
    weights = torch.tensor([0.25, 3.0])
    plain = mix("sigmoid", "sft", tokens=TOKENS)
    weighted = mix("sigmoid", "sft", tokens=TOKENS, pair_weights=weights)
    torch.testing.assert_close(weighted.losses, plain.losses * weights)
    assert torch.equal(weighted.chosen_rewards, plain.chosen_rewards)


def test_divergence_reaches_the_losses_that_have_one_and_spares_sft() -> None:
    options = LossOptions(beta=0.3, divergence=forward_kl)
    result = mix("sigmoid", "sft", options=options, tokens=TOKENS)
    expected = p.sigmoid(POLICY, REF, beta=0.3, divergence=forward_kl).losses
    expected = expected + p.sft(POLICY, REF, beta=0.3, tokens=TOKENS).losses
    torch.testing.assert_close(result.losses, expected)


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        ((), {}, "no loss given"),
        (("sigmoid",), {"ref": None}, "'sigmoid' compares with a reference"),
        (("sigmoid", "ipo"), {}, "'ipo' reads `tokens`"),
        (("kto",), {}, "'kto' reads `label`"),
        (("sigmoid", "aot"), {"pair_weights": torch.ones(2)}, "'aot' cannot be weighted"),
        (("sigmoid", "nca_pair"), {"options": LossOptions(divergence=forward_kl)}, "'nca_pair' has no form"),
        (("sigmoid", "kto"), {"label": LABEL}, "mix pairs with unpaired rows"),
    ],
)
def test_impossible_mixes_are_refused(names: tuple[str, ...], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mix(*names, **given)


def test_reference_free_mix_needs_no_reference() -> None:
    result = mix("orpo", ref=None, tokens=TOKENS)
    torch.testing.assert_close(result.losses, p.orpo(POLICY, None, beta=0.3, tokens=TOKENS).losses)
