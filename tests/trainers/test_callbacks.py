"""Callbacks: the displacement guard's patience, the moving reference, and which callbacks a run gets."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from transformers import TrainerControl, TrainerState

from alignkit.models.adapters import REFERENCE_ADAPTER
from alignkit.models.bundle import REFERENCE, ModelBundle
from alignkit.models.reference_sync import add_synced_reference
from alignkit.trainers.callbacks import DisplacementGuard, SyncReference, dpo_callbacks
from alignkit.trainers.callbacks_engine import ProtectCheckpointing
from tests.model_factory import is_checkpointing, tiny_model
from tests.models.test_reference_sync import changes
from tests.pair_factory import our_bundle, our_model

BETA = 0.1
FALLING = (-0.8, -2.0)  # rewards: 8 and 20 nats below the reference


def arguments(**settings) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        **{
            "activation_checkpointing": False,
            "sync_ref_model": False,
            "activation_checkpointing_kwargs": None,
            "loss_type": ["sigmoid"],
            **settings,
        }
    )


def log(guard: DisplacementGuard, chosen: float, rejected: float) -> list[str]:
    """Texts of the warnings that one log entry brings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guard.on_log(
            arguments(),
            TrainerState(),
            TrainerControl(),
            logs={"rewards/chosen": chosen, "rewards/rejected": rejected, "loss": 0.3},
        )
    return [str(warning.message) for warning in caught]


def test_displacement_is_reported_once_after_three_windows():
    guard = DisplacementGuard(BETA)
    assert log(guard, *FALLING) == []
    assert log(guard, *FALLING) == []
    (text,) = log(guard, *FALLING)
    assert "Chosen answers are becoming less likely, together with rejected ones: by 8.0 and 20.0 nats" in text
    assert "Remedies: loss_type=['sigmoid', 'sft'] or 'dpop', a larger beta, a lower learning rate" in text
    for _ in range(5):
        assert log(guard, *FALLING) == []


def test_a_window_that_recovers_starts_the_count_anew():
    guard = DisplacementGuard(BETA)
    for entry in (FALLING, FALLING, (0.1, -2.0), FALLING, FALLING):
        assert log(guard, *entry) == []
    assert len(log(guard, *FALLING)) == 1


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [(0.5, -3.0), (0.0, -3.0), (-0.49, -3.0), (-3.0, 0.5), (-3.0, -0.4)],
    ids=["chosen rises", "chosen stays", "chosen falls a little", "rejected rises", "rejected falls a little"],
)
def test_no_warning_unless_both_sides_fall(chosen, rejected):
    guard = DisplacementGuard(BETA)
    assert [log(guard, chosen, rejected) for _ in range(6)] == [[]] * 6


def test_the_threshold_is_in_nats_not_in_rewards():
    """A reward of −0.8 is 8 nats at β = 0.1 and 1.6 nats at β = 0.5."""
    guard = DisplacementGuard(0.5)
    assert [log(guard, *FALLING) for _ in range(6)] == [[]] * 6


def test_entries_of_evaluation_and_of_the_end_do_not_count():
    guard = DisplacementGuard(BETA)
    for logs in (None, {"eval_rewards/chosen": -2.0, "eval_rewards/rejected": -3.0}, {"train_runtime": 3.0}):
        guard.on_log(arguments(), TrainerState(), TrainerControl(), logs=logs)
    assert guard.windows == 0


def names(bundle: ModelBundle, **settings) -> list[str]:
    return [type(callback).__name__ for callback in dpo_callbacks(bundle, arguments(**settings), BETA)]


def test_each_run_gets_the_callbacks_that_it_needs():
    bundle = our_bundle()
    assert names(bundle) == ["DisplacementGuard"]
    assert names(bundle, activation_checkpointing=True) == ["DisplacementGuard", "ProtectCheckpointing"]
    assert names(bundle, sync_ref_model=True) == ["DisplacementGuard", "SyncReference"]


def test_rewards_without_a_reference_are_not_watched():
    """CPO's rewards are β times log-probs, which lie far below 0 from the start."""
    assert names(our_bundle(), loss_type=["cpo"]) == []
    assert names(our_bundle(), loss_type=["cpo", "sigmoid"]) == ["DisplacementGuard"]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_window_of_unpaired_rows_may_lack_one_side(side):
    guard = DisplacementGuard(BETA)
    guard.on_log(arguments(), TrainerState(), TrainerControl(), logs={f"rewards/{side}": -2.0, "loss": 0.3})
    assert guard.windows == 0


def step(callback: SyncReference, number: int, *, every: int = 4, alpha: float = 0.6) -> None:
    state = TrainerState()
    state.global_step = number
    settings = arguments(ref_model_sync_steps=every, ref_model_mixup_alpha=alpha)
    callback.on_step_end(settings, state, TrainerControl())


def test_the_adapters_reference_moves_every_few_steps_only():
    model = our_model()
    bundle = ModelBundle(model, adapters={REFERENCE: add_synced_reference(model, continued=False)})
    callback = SyncReference(bundle)
    for number in (1, 2, 3):
        step(callback, number)
        assert not any(change.any() for change in changes(model, REFERENCE_ADAPTER).values())
    step(callback, 4)
    policy = changes(model, "default")
    for name, change in changes(model, REFERENCE_ADAPTER).items():
        assert (change - 0.6 * policy[name]).norm() <= 1e-6 * policy[name].norm()


def test_a_whole_models_reference_moves_by_alpha():
    """W_ref ← 0.6 W + 0.4 W_ref, element by element, and stays frozen."""
    policy, reference = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    start = [parameter.clone() for parameter in reference.parameters()]
    step(SyncReference(ModelBundle(policy, reference=reference)), 8)
    for moved, source, old in zip(reference.parameters(), policy.parameters(), start, strict=True):
        torch.testing.assert_close(moved, 0.6 * source + 0.4 * old, rtol=1e-5, atol=1e-6)
        assert not moved.requires_grad


def test_checkpointing_is_protected_when_training_begins():
    bundle = our_bundle()
    ProtectCheckpointing(bundle).on_train_begin(
        arguments(activation_checkpointing_kwargs={"use_reentrant": False}), TrainerState(), TrainerControl()
    )
    assert is_checkpointing(bundle.base)
    layer = bundle.base.model.layers[0]
    assert layer._gradient_checkpointing_func.keywords["context_fn"] == bundle.checkpoint_context


def test_reentrant_checkpointing_is_left_to_trainer():
    """Torch's reentrant variant takes no context."""
    bundle = our_bundle()
    bundle.protect_checkpointing({"use_reentrant": True})
    assert not is_checkpointing(bundle.base)


@pytest.mark.parametrize("every", [1, 2])
def test_only_some_layers_are_checkpointed(every: int):
    bundle = our_bundle()
    bundle.protect_checkpointing({"use_reentrant": False, "every_n_layers": every})
    assert sum(layer.gradient_checkpointing for layer in bundle.base.model.layers) == 2 // every
