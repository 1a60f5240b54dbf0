"""Where memory runs out, the same step is made of smaller passes: the same gradient and metrics, one line of log."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from alignkit.errors import TrainingError
from alignkit.models.out_of_memory import is_out_of_memory
from alignkit.trainers.longest_batch import most_expensive_rows
from alignkit.trainers.memory_guard import MemoryGuard
from tests.guards.guarded_runs import (
    CLOCKS,
    CPU_ERROR,
    FakeMemory,
    Watch,
    equal,
    make_trainer,
    messages,
    rows,
    training_log,
)
from tests.model_factory import tiny_model
from tests.tiny_preferences import assert_close_tensors

RTOL = 1e-6


def assert_same_run(found: Any, found_watch: Watch, expected: Any, expected_watch: Watch, rtol: float = RTOL) -> None:
    """Gradients of every step, and everything that was logged but clocks, agree to rounding.

    After the second step, weights differ by what rounding there has come to.
    """
    assert found_watch.gradients.keys() == expected_watch.gradients.keys()
    for step, gradients in expected_watch.gradients.items():
        wanted: Any = gradients
        mine: Any = found_watch.gradients[step]
        assert None not in gradients.values()
        assert_close_tensors(mine, wanted, rtol=rtol if step < 3 else 1e-4)
    for entry, wanted in zip(training_log(found), training_log(expected), strict=True):
        names = [name for name in wanted if not any(clock in name for clock in CLOCKS)]
        assert len(names) > 5
        assert {name: entry[name] for name in names} == pytest.approx(
            {name: wanted[name] for name in names}, rel=1e-4, abs=1e-5
        )


def is_stage(stage: str, watch: Watch, trainer: Any, kwargs: dict[str, Any], step: int = 2) -> bool:
    """Whether the pass that begins is one of that stage."""
    grad, bundle = torch.is_grad_enabled(), trainer.bundle
    if trainer._passes.layout is None:  # layouts are being tried
        return False
    if stage == "trial":
        return watch.step == 0 and grad
    if stage in ("policy", "backward"):
        return watch.step == step and grad
    if watch.step != step or grad:
        return False
    return (bundle._worn is None) == (stage == "reference")  # else the pass of coefficients


CASES = [
    ("dpo", "policy"),
    ("dpo", "backward"),
    ("dpo", "reference"),
    ("kto", "policy"),
    ("kto", "backward"),
    ("kto", "coefficients"),
    ("reward", "policy"),
    ("reward", "backward"),
    ("ppo", "policy"),
    ("ppo", "backward"),
]


@pytest.mark.parametrize(("kind", "stage"), CASES)
@pytest.mark.parametrize("budget", [None, 4000])
def test_a_step_is_made_again_in_smaller_passes(
    kind: str, stage: str, budget: int | None, tmp_path: Path, caplog: Any
) -> None:
    """Memory ends in the second micro-batch of the second step: both are run again."""
    options: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "max_grad_norm": 0.0,
        "max_tokens_per_forward": budget,
    }
    if kind != "ppo":
        options["train_dataset"] = rows(24, labelled=kind == "kto")
    if stage == "coefficients":  # only a batch that is cut has that pass
        options["max_tokens_per_forward"] = 60
    expected_watch = Watch()
    expected = make_trainer(kind, tmp_path / "expected", [expected_watch], **options)
    expected.train()
    assert not messages(caplog)

    watch = Watch()
    trainer = make_trainer(kind, tmp_path / "found", [watch], **options)
    limit = 35 if stage == "coefficients" else 40
    fake = FakeMemory(
        trainer.bundle.base,
        limit,
        lambda kwargs: watch.micro_batch == 1 and is_stage(stage, watch, trainer, kwargs),
        in_backward=stage == "backward",
    )
    trainer.train()
    assert fake.failures
    assert min(fake.failures) > limit
    now = trainer._passes.max_tokens
    assert now <= max(limit, *fake.failures) // 2 or now <= limit
    was = options["max_tokens_per_forward"]
    assert messages(caplog) == [
        f"out of memory: forward passes hold at most {now} tokens from now on, not "
        f"{'whole micro-batches' if was is None else was}; the gradient is the same. Set max_tokens_per_forward={now} "
        "to begin with that."
    ]
    assert_same_run(trainer, watch, expected, expected_watch)


@pytest.mark.parametrize("kind", ["dpo", "kto", "reward", "ppo"])
@pytest.mark.parametrize("error", [None, CPU_ERROR], ids=["device", "cpu"])
def test_the_longest_batch_is_tried_before_training(
    kind: str, error: Exception | None, tmp_path: Path, caplog: Any
) -> None:
    expected_watch, watch = Watch(), Watch()
    expected = make_trainer(kind, tmp_path / "expected", [expected_watch], max_grad_norm=0.0, max_steps=2)
    expected.train()
    trainer = make_trainer(kind, tmp_path / "found", [watch], max_grad_norm=0.0, max_steps=2)
    steps: list[int] = []

    def training(kwargs: dict[str, Any]) -> bool:
        if torch.is_grad_enabled() and kwargs["input_ids"].numel() > 45:
            steps.append(watch.step)
        return torch.is_grad_enabled()

    fake = FakeMemory(trainer.bundle.base, 45, training, error=error)
    trainer.train()
    assert len(messages(caplog)) == 1
    assert max(fake.failures) > 60
    assert set(steps) == {0}  # all before the first step
    assert trainer._passes.max_tokens <= 45
    assert_same_run(trainer, watch, expected, expected_watch, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "kto", "reward", "ppo"])
def test_the_trial_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    """With dropout, which draws random numbers: bit for bit the run that tries nothing."""
    options: dict[str, Any] = {"max_steps": 3, "disable_dropout": kind == "ppo"}  # PPO has none
    passes: list[int] = []

    def run(folder: Path, tries: bool) -> tuple[Any, Watch]:
        watch = Watch()
        model = tiny_model("llama", attention_dropout=0.0)
        trainer = make_trainer(kind, folder, [watch], **{**options, "model": model})
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout) and kind != "ppo":
                module.p = 0.1
        if not tries:
            trainer.trials = list

        def note(kwargs: dict[str, Any]) -> bool:
            if watch.step == 0 and torch.is_grad_enabled():
                passes.append(kwargs["input_ids"].numel())
            return False

        FakeMemory(trainer.bundle.base, 0, note)
        trainer.train()
        return trainer, watch

    tried, tried_watch = run(tmp_path / "tried", True)
    assert len(passes) == 1
    assert tried._passes.max_tokens is None
    untried, untried_watch = run(tmp_path / "untried", False)
    assert len(passes) == 1
    assert equal(tried_watch.after, untried_watch.after)
    assert equal(tried_watch.gradients, untried_watch.gradients)
    for found, wanted in zip(training_log(tried), training_log(untried), strict=True):
        names = [name for name in wanted if not any(clock in name for clock in CLOCKS)]
        assert {name: found[name] for name in names} == {name: wanted[name] for name in names}


@pytest.mark.parametrize("seed", range(5))
def test_the_trial_takes_the_largest_pass(seed: int) -> None:
    """Whatever rows a micro-batch holds, no chunk of it is much larger than the one that is tried."""
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(1, 60, (30,), generator=generator)
    assert sorted(most_expensive_rows(costs, 4, None)) == sorted(
        costs.sort(descending=True, stable=True).indices[:4].tolist()
    )
    for bound in (40, 70, 100, 500):
        chosen = most_expensive_rows(costs, 4, bound)
        assert chosen[0] == int(costs.argmax())
        assert len(set(chosen)) == len(chosen) <= 4
        total = int(costs[chosen].sum())
        assert total <= max(bound, int(costs.max()))
        left = [cost for row, cost in enumerate(costs.tolist()) if row not in chosen]
        assert len(chosen) == 4 or min(left) + total > bound


def test_one_row_that_does_not_fit_is_an_error_that_says_so(tmp_path: Path) -> None:
    trainer = make_trainer("dpo", tmp_path)
    FakeMemory(trainer.bundle.base, 10, lambda kwargs: torch.is_grad_enabled())
    with pytest.raises(
        TrainingError, match=r"out of memory: one row alone, of \d+ tokens, does not fit \(CUDA out"
    ) as found:
        trainer.train()
    assert "Second line" not in str(found.value)
    assert "Lower max_length, set activation_checkpointing=True" in str(found.value)
    assert trainer.state.global_step == 0
    trainer = make_trainer("ppo", tmp_path / "ppo")
    FakeMemory(trainer.bundle.base, 5, lambda kwargs: torch.is_grad_enabled())
    with pytest.raises(TrainingError, match="Lower max_prompt_length, max_completion_length or num_generations"):
        trainer.train()


def test_a_model_of_which_nothing_fits(tmp_path: Path) -> None:
    trainer = make_trainer("dpo", tmp_path)
    FakeMemory(trainer.bundle.base, 10, lambda kwargs: True)
    with pytest.raises(TrainingError, match="out of memory while layouts were compared on a few short rows"):
        trainer.train()


def test_other_errors_pass_through(tmp_path: Path) -> None:
    trainer = make_trainer("dpo", tmp_path)
    FakeMemory(trainer.bundle.base, 10, lambda kwargs: torch.is_grad_enabled(), error=RuntimeError("size mismatch"))
    with pytest.raises(RuntimeError, match=r"^size mismatch$"):
        trainer.train()


def passes_of(processes: int, kind: DistributedType, max_tokens: int | None = None) -> Any:
    """As much of a run's passes as the guard reads."""
    return SimpleNamespace(
        max_tokens=max_tokens,
        latest=None,
        layout="prefix_shared",
        args=SimpleNamespace(LENGTH_OPTIONS="max_length", max_tokens_per_forward="auto"),
        accelerator=SimpleNamespace(num_processes=processes, distributed_type=kind),
    )


def failing(passes: Any, *lengths: list[int]) -> Any:
    def run() -> None:
        passes.latest = torch.tensor(lengths or [[10, 5, 5], [30, 10, 10]])
        raise torch.OutOfMemoryError("CUDA out of memory.")

    return run


def test_several_processes_do_not_try_again() -> None:
    passes = passes_of(2, DistributedType.MULTI_GPU)
    with pytest.raises(TrainingError, match="leave the others waiting: set max_tokens_per_forward=50 and start again"):
        MemoryGuard(passes).fit(failing(passes))
    passes = passes_of(1, DistributedType.DEEPSPEED)
    with pytest.raises(TrainingError, match="Lower per_device_train_batch_size"):
        MemoryGuard(passes).fit(failing(passes))


def test_a_budget_that_cannot_be_lowered_is_no_endless_loop() -> None:
    """A pass of several rows that fails although each has a pass of its own by now."""
    passes = passes_of(1, DistributedType.NO)
    with pytest.raises(TrainingError, match="one row alone, of 20 tokens, does not fit"):
        MemoryGuard(passes).fit(failing(passes, [10, 5, 5], [8, 2, 2]))
    passes = passes_of(1, DistributedType.NO, 20)
    with pytest.raises(TrainingError, match="one row alone, of 12 tokens, does not fit"):
        MemoryGuard(passes).fit(failing(passes, [8, 2, 2]))


def test_the_budget_is_state() -> None:
    saved = MemoryGuard(passes_of(1, DistributedType.NO, 300)).state_dict()
    passes = passes_of(1, DistributedType.NO, 3072)
    MemoryGuard(passes).load_state_dict(saved)
    assert passes.max_tokens == 300
    passes.args.max_tokens_per_forward = passes.max_tokens = 500  # asked for anew
    MemoryGuard(passes).load_state_dict(saved)
    assert passes.max_tokens == 500


def test_what_an_error_of_memory_is() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(CPU_ERROR)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
    assert not is_out_of_memory(TrainingError("CUDA out of memory"))
