"""Every loss of the registry: golden numbers, gradients, extremes, and agreement of the row with the function.

The golden case is one pair with log-ratios a = 2 and b = -1 and lengths 10 and 20, so its mean log-probabilities
are -0.5 and -0.8.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

from alignkit.functional import preference
from alignkit.functional.divergence import forward_kl, js_divergence, reverse_kl
from alignkit.functional.preference import LOSSES, LossOptions, LossSpec, PairLogps, PairTokens, get_loss

SPECS = [pytest.param(spec, id=name) for name, spec in LOSSES.items()]


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


POLICY = PairLogps(chosen=f64(-5.0), rejected=f64(-16.0))
REF = PairLogps(chosen=f64(-7.0), rejected=f64(-15.0))
TOKENS = PairTokens(chosen=torch.tensor([10]), rejected=torch.tensor([20]))

# (loss, keywords besides beta = 0.1 and the tensors that it reads, expected value)
GOLDEN: list[tuple[str, dict[str, Any], float]] = [
    ("sigmoid", {}, 0.554355),
    ("sigmoid", {"label_smoothing": 0.1}, 0.584355),
    ("sigmoid", {"margin": f64(0.3)}, math.log(2)),  # beta * delta = 0.3, all of it asked for by the margin
    ("sigmoid", {"divergence": forward_kl}, 0.572316),
    ("sigmoid", {"divergence": js_divergence}, 0.635589),
    ("hinge", {}, 0.7),
    ("robust", {"label_smoothing": 0.1}, 0.516855),
    ("ipo", {}, 22.5625),  # (2/10 + 1/20 - 5)^2
    ("ipo_sum", {}, 4.0),  # (3 - 5)^2
    ("exo_pair", {"label_smoothing": 1e-3}, 2.258199),
    ("nca_pair", {}, 1.319407),
    ("bco_pair", {}, 1.242536),
    ("sppo_hard", {}, 25.0),  # (2 - 5)^2 + (-1 + 5)^2
    ("apo_zero", {}, 0.925187),
    ("apo_down", {}, 0.975391),
    ("discopop", {"discopop_tau": 0.05}, 0.740357),
    ("sigmoid_norm", {"beta": 5.0}, 0.251929),
    ("simpo", {"beta": 2.0, "simpo_gamma": 1.0}, 0.913015),
    ("orpo", {"beta": 1.0}, 0.5 + 0.424833),
    ("orpo", {}, 0.5 + 0.0424833),
    ("cpo", {}, 0.7873353),  # log(1 + exp(-0.1 * 11)) + 0.5
    ("cpo", {"cpo_alpha": 2.0}, 1.2873353),
    ("sft", {}, 0.5),
    ("aot", {}, 0.554355),
    ("aot_unpaired", {}, 0.554355),
    ("aot", {"label_smoothing": 0.1}, 0.584355),
    ("aot_unpaired", {"label_smoothing": 0.1}, 0.584355),
    ("dpop", {}, 0.554355),  # the chosen completion gained, so no penalty
    ("kto", {}, 0.4501660),  # 1 - sigma(0.1 * 2): the mismatched log-ratio is -1, so the KL estimate is 0
    ("kto", {"label": torch.tensor([False]), "undesirable_weight": 2.0}, 1.0996680),  # 2 * (1 - sigma(-0.2))
    ("kto", {"kl": f64(3.0), "desirable_weight": 3.0}, 1.5749376),  # 3 * (1 - sigma(-0.1))
]


def keywords_for(spec: LossSpec, rows: int = 1, **given: Any) -> dict[str, Any]:
    """Beta 0.1, what the row says the loss cannot do without, and whatever the test gives."""
    needed: dict[str, Any] = {"beta": 0.1}
    if "tokens" in spec.reads:
        needed["tokens"] = PairTokens(*(lengths.repeat(rows) for lengths in TOKENS))
    if "label" in spec.reads:
        needed["label"] = torch.arange(rows) % 2 == 0
    if spec.name == "exo_pair":
        needed["label_smoothing"] = 1e-3
    return needed | given


@pytest.mark.parametrize(("name", "given", "expected"), GOLDEN)
def test_golden_number(name: str, given: dict[str, Any], expected: float) -> None:
    spec = LOSSES[name]
    result = spec.function(POLICY, REF, **keywords_for(spec, **given))
    assert result.losses.shape == (1,)
    assert result.losses.item() == pytest.approx(expected, rel=1e-6 if name == "kto" else 1e-5, abs=6e-7)


def test_every_loss_has_a_golden_number() -> None:
    assert {name for name, _, _ in GOLDEN} == set(LOSSES)


@pytest.mark.parametrize("spec", SPECS)
def test_rewards_are_beta_times_the_score_and_detached(spec: LossSpec) -> None:
    policy = PairLogps(*(logps.clone().requires_grad_() for logps in POLICY))
    result = spec.function(policy, REF, **keywords_for(spec, beta=0.5))
    chosen, rejected = {
        "simpo": (-0.25, -0.4),  # 0.5 * mean log-probability
        "orpo": (-0.25, -0.4),
        "cpo": (-2.5, -8.0),  # 0.5 * summed log-probability
        "kto": (1.0, 0.0),  # the row is desirable, so nothing is on the other side
    }.get(spec.name, (1.0, -0.5))
    assert result.chosen_rewards.item() == pytest.approx(chosen, rel=1e-12)
    assert result.rejected_rewards.item() == pytest.approx(rejected, rel=1e-12)
    assert result.losses.requires_grad
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


@pytest.mark.parametrize("spec", SPECS)
def test_gradient_matches_finite_differences(spec: LossSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, ref_chosen, ref_rejected = (
        (-12 - 6 * torch.rand(4, generator=generator, dtype=torch.float64)).requires_grad_(index < 2)
        for index in range(4)
    )
    keywords = keywords_for(spec, rows=4, beta=0.3)
    if "kl" in spec.reads:
        keywords["kl"] = f64(0.7).squeeze()  # estimated from the batch it is detached, which differences would not see

    def losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        policy = PairLogps(chosen, rejected)
        return spec.function(policy, PairLogps(ref_chosen, ref_rejected), **keywords).losses

    assert torch.autograd.gradcheck(losses, (chosen, rejected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [900.0, -900.0, 1e5, -1e5])  # beta * delta = +-90 and +-1e4
@pytest.mark.parametrize("spec", SPECS)
def test_value_and_gradient_are_finite_at_extremes(spec: LossSpec, gap: float, dtype: torch.dtype) -> None:
    chosen = torch.tensor([min(gap, 0.0) - 1], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([min(-gap, 0.0) - 1], dtype=dtype, requires_grad=True)
    ref = PairLogps(torch.tensor([-1.0], dtype=dtype), torch.tensor([-1.0], dtype=dtype))
    losses = spec.function(PairLogps(chosen, rejected), ref, **keywords_for(spec)).losses
    assert torch.isfinite(losses).all()
    grads = torch.autograd.grad(losses.sum(), (chosen, rejected), allow_unused=True)
    assert all(torch.isfinite(grad).all() for grad in grads if grad is not None)


def test_discopop_far_below_zero_is_the_logistic_loss() -> None:
    # beta * delta = -90: the exponential branch, exp(90) times sigma(-1800), must contribute nothing, not 0 * inf.
    policy = PairLogps(torch.tensor([-901.0], requires_grad=True), torch.tensor([-1.0]))
    ref = PairLogps(torch.tensor([-1.0]), torch.tensor([-1.0]))
    losses = preference.discopop(policy, ref, beta=0.1).losses
    losses.sum().backward()
    assert losses.item() == pytest.approx(90.0, rel=1e-6)
    assert policy.chosen.grad is not None
    assert policy.chosen.grad.item() == pytest.approx(-0.1, rel=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_registry_row_agrees_with_the_function(spec: LossSpec) -> None:
    parameters = inspect.signature(spec.function).parameters
    positional = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    keyword_only = {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    divergence = {"divergence"} if spec.reads_divergence else set()
    assert positional == ["policy", "ref"]
    assert keyword_only == {"beta"} | spec.options | spec.reads | divergence
    assert LOSSES[spec.name] is spec
    assert spec.function.__name__ == spec.name
    assert spec.summary


@pytest.mark.parametrize("spec", SPECS)
def test_scalars_are_loss_options_with_the_same_defaults(spec: LossSpec) -> None:
    defaults = vars(LossOptions())
    for name, parameter in inspect.signature(spec.function).parameters.items():
        if name in spec.options or name in {"beta", "divergence"}:
            assert name in defaults
            assert parameter.default in (inspect.Parameter.empty, defaults[name])


@pytest.mark.parametrize("spec", SPECS)
def test_needs_reference_is_true_exactly_where_the_reference_moves_the_loss(spec: LossSpec) -> None:
    other = PairLogps(chosen=f64(-6.0), rejected=f64(-12.5))
    losses = [spec.function(POLICY, ref, **keywords_for(spec)).losses for ref in (REF, other)]
    assert torch.equal(*losses) != spec.needs_reference
    if not spec.needs_reference:
        assert torch.equal(spec.function(POLICY, None, **keywords_for(spec)).losses, losses[0])


@pytest.mark.parametrize("spec", SPECS)
def test_couples_rows_is_true_exactly_where_one_row_moves_another(spec: LossSpec) -> None:
    policy = PairLogps(f64(-5.0, -9.0), f64(-16.0, -8.0))
    moved = PairLogps(f64(-5.0, -2.0), f64(-16.0, -30.0))
    ref = PairLogps(f64(-7.0, -8.0), f64(-19.0, -9.0))
    keywords = keywords_for(spec, rows=2)
    before, after = keywords, keywords
    if spec.name == "sft":  # coupled by the token count alone
        after = keywords | {"tokens": PairTokens(torch.tensor([10, 40]), torch.tensor([20, 40]))}
    first = spec.function(policy, ref, **before).losses
    second = spec.function(moved, ref, **after).losses
    assert torch.equal(first[:1], second[:1]) != spec.couples_rows


def test_names_are_the_promised_ones() -> None:
    trl = (
        "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft"
    )
    ours = "sigmoid_norm ipo_sum simpo orpo cpo kto dpop"
    assert set(LOSSES) == set(trl.split()) | set(ours.split())
    accepted = {name for name, spec in LOSSES.items() if spec.supports_f_divergence}
    generalised = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "ipo_sum", "exo_pair", "robust", "discopop"}
    assert accepted == generalised | {"sft"}
    assert {name for name, spec in LOSSES.items() if not spec.supports_weighting} == {"aot", "aot_unpaired", "kto"}
    assert {name for name, spec in LOSSES.items() if spec.unpaired} == {"kto"}


@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in LOSSES.values() if s.reads_divergence])
def test_every_divergence_is_applied(spec: LossSpec) -> None:
    values = {
        divergence.__name__: spec.function(POLICY, REF, **keywords_for(spec, divergence=divergence)).losses.item()
        for divergence in (reverse_kl, forward_kl, js_divergence)
    }
    assert len(set(values.values())) == 3


def test_unknown_loss_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown loss_type 'simgoid'.*Did you mean 'sigmoid'\?"):
        get_loss("simgoid")
