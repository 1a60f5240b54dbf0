"""Loss, every LoRA tensor's gradient and every metric of a batch equal the installed TRL's, in fp32.

Both trainers are built once. Between cases only what reads the loss options changes: our objective, and TRL's
attributes of the same names.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.functional.divergence import DIVERGENCES
from alignkit.functional.preference import LOSSES
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from alignkit.trainers.objective import Objective
from tests.golden.trl_twin import (
    RENAMED_OPTION_WARNINGS,
    Twins,
    assert_twins,
    build_ours,
    build_theirs,
    gradients,
    token_rows_of,
    trl_module,
)
from tests.tiny_preferences import QUIET, assert_close_tensors, text_rows

pytestmark = [pytest.mark.filterwarnings(pattern) for pattern in RENAMED_OPTION_WARNINGS]

RTOL = 1e-4
ATOL = 1e-6
LAYOUTS = ("prefix_shared", "packed", "padded")
SHARED_LOSSES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
]
MIXES = {("sigmoid", "bco_pair", "sft"): (0.8, 0.3, 1.1), ("apo_zero", "sft"): (1.0, 0.5), ("hinge", "ipo"): (2.0, 0.1)}
READ_SMOOTHING = {"exo_pair", "robust", "aot", "aot_unpaired"}
CANNOT_TAKE_WEIGHTS = {"aot", "aot_unpaired"}


class Case(NamedTuple):
    """Loss options that both trainers have."""

    losses: tuple[str, ...]
    divergence: str = "reverse_kl"
    ld_alpha: float | None = None
    use_weighting: bool = False
    weights: tuple[float, ...] | None = None

    @property
    def label_smoothing(self) -> float:
        """0.1 for the losses that read it in both trainers."""
        return 0.1 if READ_SMOOTHING & set(self.losses) else 0.0

    def __str__(self) -> str:
        parts = ["+".join(self.losses), self.divergence]
        parts += [f"ld{self.ld_alpha}"] * (self.ld_alpha is not None) + ["wpo"] * self.use_weighting
        return "-".join(parts)


# What a case is left out for: (which cases, why, what is asserted of it instead). The first that applies counts.
EXCLUSIONS = (
    (
        lambda case: case.use_weighting and bool(CANNOT_TAKE_WEIGHTS & set(case.losses)),
        "sorting separates a row's loss from its weight",
        "both_refuse",
    ),
    (
        lambda case: case.divergence != "reverse_kl" and not all(LOSSES[n].supports_f_divergence for n in case.losses),
        "the f-DPO reward has no meaning outside a difference of rewards",
        "both_refuse",
    ),
    (
        lambda case: case.use_weighting and bool({"hinge", "sft"} & set(case.losses)),
        "TRL multiplies WPO's weights into the loss in place, which autograd refuses for relu and for expanded tensors",
        "their_loss_raises",
    ),
    (
        lambda case: case.divergence != "reverse_kl" and case.losses == ("sft",),
        "the divergence changes nothing, so we refuse it, while TRL accepts and ignores it",
        "theirs_ignores_divergence",
    ),
)


def all_cases() -> Iterator[Case]:
    """Every shared loss and the mixes, by divergence, LD-DPO and weighting."""
    named = [((name,), None) for name in SHARED_LOSSES] + list(MIXES.items())
    for (losses, weights), divergence, ld_alpha, use_weighting in itertools.product(
        named, sorted(DIVERGENCES), (None, 0.5), (False, True)
    ):
        yield Case(losses, divergence, ld_alpha, use_weighting, weights)


def exclusion(case: Case) -> str | None:
    """What holds of a case that cannot be compared; `None` for the others."""
    return next((holds for applies, _, holds in EXCLUSIONS if applies(case)), None)


COMPARED = [case for case in all_cases() if exclusion(case) is None]
EXCLUDED = [case for case in all_cases() if exclusion(case) is not None]


@pytest.fixture(scope="module")
def built_twins(module_folder: Path) -> dict[str, Twins]:
    """The trainers by our layout; TRL's is the same in all three."""
    rows = text_rows(6)
    theirs = build_theirs(module_folder, rows, use_weighting=True)  # its head then computes what WPO reads
    theirs.model.train()
    built = {}
    for layout in LAYOUTS:
        ours = build_ours(module_folder / layout, rows, layout=layout, max_tokens_per_forward=None)
        ours.model.train()
        assert_twins(theirs, ours)
        token_rows = token_rows_of(theirs.train_dataset)
        assert token_rows_of(ours.train_dataset) == token_rows
        built[layout] = Twins(theirs, ours, token_rows)
    return built


@pytest.fixture
def twins(built_twins: dict[str, Twins]) -> dict[str, Twins]:
    """The trainers, alive: any new `TrainingArguments` resets the process-wide state that their accelerators read."""
    Accelerator(cpu=True)
    return built_twins


def our_options(case: Case) -> dict[str, Any]:
    return {
        "loss_type": list(case.losses),
        "loss_weights": None if case.weights is None else list(case.weights),
        "f_divergence_type": case.divergence,
        "ld_alpha": case.ld_alpha,
        "use_weighting": case.use_weighting,
        "label_smoothing": case.label_smoothing,
    }


def their_loss(twins: Twins, case: Case, rows: list[dict[str, Any]] | None = None) -> tuple[Tensor, dict[str, float]]:
    """TRL's loss of the rows under `case`, and the metrics that it would log."""
    trainer = twins.theirs
    trainer.loss_types = list(case.losses)
    trainer.loss_weights = list(case.weights or [1.0] * len(case.losses))
    trainer.f_divergence_type = case.divergence
    trainer.ld_alpha = case.ld_alpha
    trainer.use_weighting = case.use_weighting
    trainer.label_smoothing = case.label_smoothing
    rows = rows or twins.rows
    trainer.precompute_ref_logps = "ref_chosen_logps" in rows[0]
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    return loss, {name: value for name, (value,) in trainer._metrics["train"].items()}


def our_objective(trainer: DPOTrainer, options: dict[str, Any]) -> Objective:
    """The objective of the trainer's arguments with other loss options."""
    args = copy.copy(trainer.args)
    vars(args).update(options)
    return Objective.from_config(args)


def our_loss(twins: Twins, case: Case, rows: list[dict[str, Any]] | None = None) -> tuple[Tensor, dict[str, float]]:
    """Our loss of the same rows, and our metrics."""
    trainer = twins.ours
    trainer.objective = our_objective(trainer, our_options(case))
    trainer._windows["train"].means(trainer.accelerator)  # what an earlier case left
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows or twins.rows))
    return loss, trainer._windows["train"].means(trainer.accelerator)


def assert_same(twins: Twins, case: Case, rows: list[dict[str, Any]] | None = None) -> None:
    expected, their_metrics = their_loss(twins, case, rows)
    their_gradients = gradients(twins.theirs.model, expected)
    found, metrics = our_loss(twins, case, rows)
    assert torch.isfinite(expected)
    assert sum(gradient.norm() for gradient in their_gradients.values()) > 1e-3  # a case without slope shows nothing
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=0)
    assert_close_tensors(gradients(twins.ours.model, found), their_gradients, rtol=RTOL)
    del their_metrics["num_tokens"]
    if not any(LOSSES[name].needs_reference for name in case.losses):
        # TRL runs the reference even for a loss that does not read it, and logs log-ratios; we log what the loss reads.
        metrics = {name: value for name, value in metrics.items() if not name.startswith("rewards/")}
        their_metrics = {name: value for name, value in their_metrics.items() if name in metrics}
    assert metrics == pytest.approx(their_metrics, rel=RTOL, abs=ATOL)


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_loss_gradients_and_metrics(twins: dict[str, Twins], case: Case) -> None:
    assert_same(twins["prefix_shared"], case)
    assert twins["prefix_shared"].ours._passes.layout == "prefix_shared"
    assert twins["prefix_shared"].ours.bundle.kernels == {"products"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [
        Case(("sigmoid",)),
        Case(("sigmoid_norm",), "js_divergence", 0.5, True),
        Case(("aot",), ld_alpha=0.5),
        Case(("sigmoid", "bco_pair", "sft"), ld_alpha=0.5, weights=(0.8, 0.3, 1.1)),
    ],
    ids=str,
)
def test_every_layout(twins: dict[str, Twins], layout: str, case: Case) -> None:
    assert_same(twins[layout], case)
    assert twins[layout].ours._passes.layout == layout
    assert twins[layout].ours.bundle.kernels == (set() if layout == "padded" else {"products"})


@pytest.mark.parametrize("case", [Case(("sigmoid",)), Case(("ipo",), "alpha_divergence", 0.5)], ids=str)
def test_reference_columns(twins: dict[str, Twins], case: Case) -> None:
    """Precomputed log-probs are read from the rows, by both: values that no model would give prove it."""
    pair = twins["prefix_shared"]
    columns = [{"ref_chosen_logps": -20.0 - i, "ref_rejected_logps": -25.0 + 2 * i} for i in range(len(pair.rows))]
    rows = [{**row, **values} for row, values in zip(pair.rows, columns, strict=True)]
    assert_same(pair, case, rows)
    assert our_loss(pair, case, rows)[0] != our_loss(pair, case)[0]


def test_cases_cover_the_registry() -> None:
    """The table is about every loss that TRL has, and leaves little out."""
    assert set(SHARED_LOSSES) == set(LOSSES) - {"ipo_sum", "simpo", "orpo", "cpo", "kto", "dpop"}
    assert {name for case in COMPARED for name in case.losses} == set(SHARED_LOSSES)
    assert {case.divergence for case in COMPARED} == set(DIVERGENCES)
    assert all(any(applies(case) for case in EXCLUDED) for applies, _, _ in EXCLUSIONS)


@pytest.mark.parametrize("case", EXCLUDED, ids=str)
def test_exclusions_hold(twins: dict[str, Twins], case: Case, tmp_path: Path) -> None:
    pair, holds = twins["prefix_shared"], exclusion(case)
    if holds == "their_loss_raises":
        with pytest.raises(RuntimeError, match=r"in-place|inplace|single memory location"):
            their_loss(pair, case)[0].backward()
        found, _ = our_loss(pair, case)
        assert torch.isfinite(found)
        return
    with pytest.raises(ConfigError, match=r"f_divergence_type|use_weighting"):
        DPOConfig(str(tmp_path), **QUIET, **our_options(case))
    if holds == "theirs_ignores_divergence":
        assert torch.equal(their_loss(pair, case)[0], their_loss(pair, case._replace(divergence="reverse_kl"))[0])
        return
    assert holds == "both_refuse"
    with pytest.raises((ValueError, NotImplementedError), match=r"only supported for|not implemented for"):
        build_theirs(tmp_path, text_rows(1), **our_options(case))


def test_alpha_divergence_of_one_is_reverse_kl(twins: dict[str, Twins]) -> None:
    """The coefficient is read, and its singular value is the limit in both."""
    pair = twins["prefix_shared"]
    case = Case(("sigmoid",), "alpha_divergence")
    before = pair.theirs.f_alpha_divergence_coef
    for coefficient in (1.0, 2.0, -1.5):
        pair.theirs.f_alpha_divergence_coef = coefficient
        expected, _ = their_loss(pair, case)
        options = {**our_options(case), "f_alpha_divergence_coef": coefficient}
        pair.ours.objective = our_objective(pair.ours, options)
        found = pair.ours.compute_loss(pair.ours.model, pair.ours.data_collator(pair.rows))
        torch.testing.assert_close(found, expected, rtol=RTOL, atol=0)
        assert_close_tensors(gradients(pair.ours.model, found), gradients(pair.theirs.model, expected), rtol=RTOL)
    pair.theirs.f_alpha_divergence_coef = before


def test_fields_have_the_same_defaults() -> None:
    """The loss options that both have start from the same values, so a case that sets none compares the same loss."""
    theirs = {f.name: f.default for f in dataclasses.fields(trl_module("trl").DPOConfig)}
    ours = {f.name: f.default for f in dataclasses.fields(DPOConfig)}
    for name in ("beta", "label_smoothing", "f_alpha_divergence_coef", "ld_alpha", "discopop_tau", "use_weighting"):
        assert ours[name] == theirs[name], name
