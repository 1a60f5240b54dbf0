"""What must be equal or stay as it was in PPO, on any device, and what must run at all."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.generation.continuous_batching import cache as paged

from alignkit.rollout.continuous import ContinuousEngine
from alignkit.rollout.engine import Sampling
from alignkit.rollout.hf import HFEngine
from alignkit.trainers.ppo_callbacks import steps_per_rollout
from tests.benchmarks.gpu import ppo_rewards
from tests.benchmarks.gpu.card import FAILURES, as_turing, described, free, quiet
from tests.benchmarks.gpu.ppo_models import Model, episodes, policy, trainer_for
from tests.benchmarks.gpu.shapes import adapted, has_bitsandbytes
from tests.ppo_factory import WatchedTrainer, scaling_on_a_cpu, weights
from tests.tiny_preferences import character_tokenizer

UPDATES = 20
PAGE_TOKENS = 64
CACHE_TOKENS = 4096
# What generation may take besides its cache: activations, cuBLAS. Left alone, its cache would take the whole card.
WORKSPACE_BYTES = 256 * 2**20
NO_BITSANDBYTES = "skipped: bitsandbytes is not installed"


@dataclass(slots=True)
class Outcome:
    """What a check found; `passed` is `None` where it could not be made."""

    name: str
    passed: bool | None
    found: str = ""
    note: str = ""


Check = Callable[[torch.device, Path], list[Outcome]]


def run(device: torch.device) -> list[dict[str, Any]]:
    """Make every check on `device`; one that fails with an error is reported with it."""
    outcomes: list[Outcome] = []
    for name, check in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                with quiet():
                    outcomes += check(device, Path(folder))
            except FAILURES as error:
                outcomes.append(Outcome(name, False, note=described(error)))
        free(device)
    return [asdict(outcome) for outcome in outcomes]


def table(outcomes: list[dict[str, Any]]) -> str:
    """Outcomes as markdown."""
    lines = ["| check | found | |", "|---|---|---|"]
    for each in outcomes:
        verdict = each["note"] or ("holds" if each["passed"] else "DOES NOT HOLD")
        lines.append(f"| {each['name']} | {each['found']} | {verdict} |")
    return "\n".join(lines)


# --- the first importance ratio ---

RATIOS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "bf16 in passes of 300 tokens": (torch.bfloat16, {"max_tokens_per_forward": 300, "activation_checkpointing": True}),
    "bf16, a critic of its own": (torch.bfloat16, {"value_adapter": True, "activation_checkpointing": True}),
}


def first_ratios(device: torch.device, folder: Path) -> list[Outcome]:
    """A rollout scored and trained on in the same passes gives the same numbers, bit for bit."""
    found = []
    for name, (dtype, options) in RATIOS.items():
        trainer = trainer_for(folder, policy(dtype, device), num_ppo_epochs=2, max_steps=4, **options)
        trainer.train()
        found.append(ratio_outcome(name, trainer))
    return found


def ratio_outcome(name: str, trainer: WatchedTrainer) -> Outcome:
    """Compare what a rollout's first step was trained with and what the rollout says."""
    apart: dict[bool, list[Tensor]] = {True: [], False: []}
    for scores, columns, step in trainer.seen:
        is_first = step % steps_per_rollout(trainer.args) == 0
        apart[is_first].append((scores.logps - columns["old_logps"]).detach().abs())
        if scores.values is not None:
            apart[is_first].append((scores.values - columns["old_values"]).detach().abs())
    first, later = (torch.cat(apart[is_first]).max().item() for is_first in (True, False))
    kernels = ", ".join(sorted(trainer.bundle.kernels))
    found = f"largest difference {first:g} ({later:.2g} after a step); {trainer._passes.layout} rows, {kernels}"
    # That later steps differ shows that the comparison sees a difference.
    return Outcome(f"first importance ratio is 1: {name}", first == 0 and later > 0, found)


# --- generation ---


def alone_and_together(device: torch.device, folder: Path) -> list[Outcome]:
    """A completion does not depend on what else is in the batch; in 16 bits rounding may move a draw."""
    same: dict[torch.dtype, int] = {}
    prompts, _ = episodes()
    for dtype in (torch.float32, torch.bfloat16):
        engine = HFEngine(adapted(policy(dtype, device)).model, character_tokenizer())
        sampling = Sampling(max_new_tokens=24)
        together = engine.generate(prompts, [[number] for number in range(len(prompts))], sampling)
        alone = [engine.generate([prompt], [[number]], sampling)[0] for number, prompt in enumerate(prompts)]
        same[dtype] = sum(one == other for one, other in zip(together, alone, strict=True))
    found = f"{same[torch.float32]} of {len(prompts)} the same in fp32, {same[torch.bfloat16]} in bf16"
    return [Outcome("completions alone and in a batch (fp32)", same[torch.float32] == len(prompts), found)]


def continuous_batching(device: torch.device, folder: Path) -> list[Outcome]:
    """The same completions as the decode loop's, out of a cache of the size that was asked for; then updates on it."""
    bundle = adapted(policy(torch.float32, device))
    bundle.use_row_attention()
    tokenizer, sampling = character_tokenizer(), Sampling(max_new_tokens=24)
    prompts, _ = episodes()
    seeds = [[2 * number, 2 * number + 1] for number in range(len(prompts))]
    expected = HFEngine(bundle.model, tokenizer).generate(prompts, seeds, sampling)
    engine = ContinuousEngine(bundle.model, tokenizer, max_cache_tokens=CACHE_TOKENS, page_tokens=PAGE_TOKENS)
    free(device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with _noted_caches() as caches:
        completions = engine.generate(prompts, seeds, sampling)
    taken = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else 0
    config = bundle.base.config
    cache_bytes = CACHE_TOKENS * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    pages = [made.num_blocks for made in caches]
    same = sum(one == other for one, other in zip(completions, expected, strict=True))
    is_within = pages == [CACHE_TOKENS // PAGE_TOKENS] and taken <= cache_bytes + WORKSPACE_BYTES
    found = f"{same} of {len(expected)} as by the decode loop; pages {pages}, {taken / 2**20:.0f} MiB taken"
    trainer = trainer_for(
        folder, policy(torch.bfloat16, device), num_ppo_epochs=2, max_steps=4, rollout_engine="continuous",
        rollout_batch_tokens=CACHE_TOKENS,
    )  # fmt: skip
    trainer.train()
    return [
        Outcome("continuous batching within its budget (fp32)", same == len(expected) and is_within, found),
        ratio_outcome("bf16, continuous batching", trainer),
    ]


@contextlib.contextmanager
def _noted_caches() -> Iterator[list[Any]]:
    """Every paged cache that is made."""
    made: list[Any] = []
    original = paged.PagedAttentionCache.__init__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(self)

    with mock.patch.object(paged.PagedAttentionCache, "__init__", noted):
        yield made


# --- what training must leave alone ---


def four_roles(device: torch.device, folder: Path) -> list[Outcome]:
    """Policy, reference, critic and reward adapter on one base."""
    base = ppo_rewards.save_base(folder / "base")
    reward = ppo_rewards.save_reward(base, folder / "reward")
    trainer = trainer_for(
        folder, str(base), str(reward), dtype=torch.bfloat16, device=device, value_adapter=True, **TWENTY
    )
    return _trained("four roles", trainer)


def continued_adapter(device: torch.device, folder: Path) -> list[Outcome]:
    """The reference is the adapter that training started from."""
    base = ppo_rewards.save_base(folder / "base")
    start = ppo_rewards.save_policy(base, folder / "start")
    trainer = trainer_for(folder, str(start), dtype=torch.bfloat16, device=device, peft_config=None, **TWENTY)
    return _trained("training continued from an adapter", trainer)[:2]  # its reward is a function


TWENTY: dict[str, Any] = {"num_ppo_epochs": 1, "max_steps": UPDATES}


def _trained(name: str, trainer: WatchedTrainer) -> list[Outcome]:
    """Train; compare the reference, every weight that is not trained, and the rewards with what they were."""
    prompts, completions = episodes()
    inputs = ppo_rewards.reward_inputs(prompts, completions)
    before, rewards = trainer.score(prompts, completions), trainer.rewards(inputs).totals
    frozen, start = frozen_weights(trainer), weights(trainer)
    trainer.train()
    after = trainer.score(prompts, completions)
    moved = (after.logps - before.logps).abs().max().item()
    is_moved = moved > 0 and all(not torch.equal(now, start[name]) for name, now in weights(trainer).items())
    same = [name for name, now in frozen_weights(trainer).items() if torch.equal(now, frozen[name])]
    totals = f"{trainer.state.global_step} updates"
    return [
        Outcome(
            f"reference log-probs, {name}",
            torch.equal(after.ref_logps, before.ref_logps) and is_moved,
            f"after {totals} largest difference {(after.ref_logps - before.ref_logps).abs().max().item():g}; "
            f"the policy's {moved:.2g}",
        ),
        Outcome(
            f"weights that are not trained, {name}",
            len(same) == len(frozen) and is_moved,
            f"after {totals} {len(same)} of {len(frozen)} tensors bit-identical, all {len(start)} trained ones moved",
        ),
        Outcome(
            f"rewards of given completions, {name}",
            torch.equal(trainer.rewards(inputs).totals, rewards) and rewards.unique().numel() > 1,
            f"after {totals} from {rewards.min().item():.3g} to {rewards.max().item():.3g}",
        ),
    ]


def frozen_weights(trainer: WatchedTrainer) -> dict[str, Tensor]:
    """Copies of every parameter that is not trained, and of every buffer."""
    parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    return parameters | {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}


# --- precisions of small cards ---


def four_bit(device: torch.device, folder: Path) -> list[Outcome]:
    """A base in NF4 generates and trains, and stays as it is."""
    if not has_bitsandbytes():
        return [Outcome("4-bit base", None, note=NO_BITSANDBYTES)]
    model = policy(torch.bfloat16, device, Model.NF4)
    trainer = trainer_for(folder, model, num_ppo_epochs=2, max_steps=6, activation_checkpointing=True)
    frozen, start = frozen_weights(trainer), weights(trainer)
    trainer.train()
    norms = [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]
    assert trainer.rollout is not None
    lengths = [len(completion.ids) for completion in trainer.rollout.completions]
    same = [name for name, now in frozen_weights(trainer).items() if torch.equal(now, frozen[name])]
    moved = [name for name, now in weights(trainer).items() if not torch.equal(now, start[name])]
    packed = sum(tensor.dtype == torch.uint8 for tensor in frozen.values())
    passed = packed > 0 and len(same) == len(frozen) and len(moved) == len(start) and min(norms) > 0
    found = f"{packed} packed tensors, {len(same)} of {len(frozen)} frozen tensors bit-identical, "
    found += f"{len(moved)} of {len(start)} trained ones moved; completions of {min(lengths)} to {max(lengths)} tokens"
    return [Outcome("4-bit base generates and trains", passed, found), ratio_outcome("4-bit base, bf16", trainer)]


def scaled_steps(device: torch.device, folder: Path) -> list[Outcome]:
    """fp16 with a gradient scaler, as on a Turing card, and rollouts whose steps end early over approximate KL.

    On a CPU the scaler multiplies losses of fp32: what it does with steps that are not made is the same.
    """
    is_cuda = device.type == "cuda"
    dtype = torch.float16 if is_cuda else torch.float32
    steps = _Steps()
    with as_turing() if is_cuda else scaling_on_a_cpu():
        trainer = trainer_for(
            folder,
            policy(dtype, device),
            num_ppo_epochs=4,
            max_steps=24,
            target_approx_kl=1e-7,
            callbacks=[steps],
            learning_rate=1e-3,
        )
        trainer.train()
    scaler = trainer.accelerator.scaler
    assert scaler is not None  # without one this checks nothing
    skipped = [number for number, has_gradients in enumerate(steps.had_gradients) if not has_gradients]
    kept = [torch.equal(steps.sums[number], steps.sums[number - 1]) for number in skipped]
    is_finite = all(bool(weight.isfinite().all()) for weight in weights(trainer).values())
    passed = 0 < len(skipped) < len(steps.sums) == 24 and all(kept) and is_finite and scaler.get_scale() > 0
    found = f"{len(skipped)} of {len(steps.sums)} steps skipped, {sum(kept)} of them without a trace; "
    found += f"scale {scaler.get_scale():g}"
    name = "fp16" if is_cuda else "fp32 under a scaler"
    return [
        Outcome(f"early stop with a gradient scaler, {name}", passed, found),
        ratio_outcome(f"{name}, as on Turing" if is_cuda else name, trainer),
    ]


class _Steps(TrainerCallback):
    """Whether each step had gradients, and the trained weights after it, summed up."""

    def __init__(self) -> None:
        self.had_gradients: list[bool] = []
        self.sums: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.had_gradients.append(any(p.grad is not None for p in model.parameters()))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trained = [p.detach().double() for p in model.parameters() if p.requires_grad]
        self.sums.append(torch.stack([p.sum() for p in trained] + [p.abs().sum() for p in trained]).cpu())


def reward_scores(device: torch.device, folder: Path) -> list[Outcome]:
    """The reward adapter on the policy's base says what a sequence classifier with the adapter says."""
    base = ppo_rewards.save_base(folder / "base")
    reward = ppo_rewards.save_reward(base, folder / "reward")
    found = []
    for precision in ppo_rewards.precisions(device):
        name = f"reward adapter and sequence classifier, {precision.name}"
        if precision.is_4bit and not has_bitsandbytes():
            found.append(Outcome(name, None, note=NO_BITSANDBYTES))
            continue
        compared = ppo_rewards.compare(base, reward, precision, device, folder)
        text = f"error {compared.error:.2g} (allowed {compared.allowed:.2g}) of a deviation of {compared.spread:.2g}"
        found.append(Outcome(name, compared.error <= compared.allowed, text))
    return found


CHECKS: dict[str, Check] = {
    "first importance ratio is 1": first_ratios,
    "completions alone and in a batch": alone_and_together,
    "continuous batching": continuous_batching,
    "four roles": four_roles,
    "training continued from an adapter": continued_adapter,
    "reward adapter and sequence classifier": reward_scores,
    "4-bit base": four_bit,
    "early stop with a gradient scaler": scaled_steps,
}
