"""Prefix-shared rows give what padded rows with eager attention give, on every kernel, in every dtype."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

import alignkit
from alignkit.data.collate import DPOCollator, pairs_of
from alignkit.data.layout import LAYOUTS, Pairs
from alignkit.models.bundle import ModelBundle
from tests.benchmarks.gpu.card import FAILURES, as_turing, described
from tests.benchmarks.gpu.shapes import PAD, adapted, small_model, token_rows, word_tokenizer

# Branches, a prompt of one token, completions of one token, lengths around the kernels' block sizes.
LENGTHS = [(37, 20, 31), (5, 64, 1), (128, 7, 90), (1, 3, 2), (63, 65, 129)]
VOCABULARY = 512
WINDOW = 16  # tokens
SLIDING = {"sliding_window": WINDOW}
GEMMA = {
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 10.0,
    "query_pre_attn_scalar": 64,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
# In 16 bits the error against fp32 may be this many times that of the padded batch in the same dtype; beside it stands
# what is allowed in any case. fp32 has the second alone. Mean nats per token, and relative to the gradient's norm.
TIMES_PADDED = 2.0
FLOOR = {torch.float32: (1e-4, 2e-4), torch.bfloat16: (1e-3, 5e-3), torch.float16: (1e-3, 5e-3)}


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel to check; `is_turing` lets the library believe in a card without bf16 and flash attention."""

    name: str
    architecture: str
    dtype: torch.dtype
    kernel: str
    is_turing: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("flash for variable lengths, bf16", "llama", torch.bfloat16, "varlen"),
    Case("the same with fp16", "llama", torch.float16, "varlen"),
    Case("the same with a sliding window, bf16", "mistral", torch.bfloat16, "varlen", overrides=SLIDING),
    Case("the same with heads of 128, bf16", "qwen3", torch.bfloat16, "varlen", overrides={"head_dim": 128}),
    Case("SDPA, fp32", "llama", torch.float32, "sdpa"),
    Case("products with a sliding window, fp32", "mistral", torch.float32, "products", overrides=SLIDING),
    Case("SDPA as on Turing, fp16", "llama", torch.float16, "sdpa", is_turing=True),
    Case(
        "products with a sliding window as on Turing, fp16", "mistral", torch.float16, "products", True, SLIDING
    ),
    Case("flex with soft-caps, fp32", "gemma2", torch.float32, "flex", overrides=GEMMA),
    Case("flex with soft-caps, bf16", "gemma2", torch.bfloat16, "flex", overrides=GEMMA),
    Case("flex with soft-caps as on Turing, fp16", "gemma2", torch.float16, "flex", True, GEMMA),
)  # fmt: skip


class Scored(NamedTuple):
    """Token log-probabilities `(S,)`, gradients by LoRA tensor, and the kernels that ran."""

    logps: Tensor
    gradients: dict[str, Tensor]
    kernels: set[str]


@dataclass(slots=True)
class Outcome:
    """A case's errors against fp32, what was allowed, and whether it passed; without `kernels` nothing was compared."""

    name: str
    passed: bool
    kernels: str = ""
    logps_error: float = 0.0
    logps_allowed: float = 0.0
    gradient_error: float = 0.0
    gradient_allowed: float = 0.0
    note: str = ""


def run(device: torch.device) -> list[dict[str, Any]]:
    """Check every case on `device`; on a CPU every row runs as plain products, in fp32 and bf16."""
    outcomes = []
    for case in CASES:
        if device.type == "cpu" and case.dtype == torch.float16:
            outcomes.append(Outcome(case.name, True, note="skipped: fp16 is for GPUs"))
            continue
        try:
            outcomes.append(_check(case, device))
        except FAILURES as error:
            outcomes.append(Outcome(case.name, False, note=described(error)))
    outcomes.append(_scaled_steps(device))
    return [asdict(outcome) for outcome in outcomes]


def table(outcomes: list[dict[str, Any]]) -> str:
    """Outcomes as markdown."""
    lines = ["| case | kernel | log-prob error (allowed) | gradient error (allowed) | |", "|---|---|---|---|---|"]
    for each in outcomes:
        verdict = each["note"] or ("equal" if each["passed"] else "DIFFERENT")
        if not each["kernels"]:
            lines.append(f"| {each['name']} | | | | {verdict} |")
            continue
        lines.append(
            f"| {each['name']} | {each['kernels']} | {each['logps_error']:.2g} ({each['logps_allowed']:.2g}) "
            f"| {each['gradient_error']:.2g} ({each['gradient_allowed']:.2g}) | {verdict} |"
        )
    return "\n".join(lines)


def _check(case: Case, device: torch.device) -> Outcome:
    batch = DPOCollator()(token_rows(LENGTHS, VOCABULARY))
    pairs = Pairs(batch["input_ids"].to(device), pairs_of(batch).lengths)
    narrow = small_model(case.architecture, case.dtype, device, **case.overrides)
    wide = small_model(case.architecture, torch.float32, device, **case.overrides)
    wide.load_state_dict({name: tensor.float() for name, tensor in narrow.state_dict().items()})
    truth = _score(adapted(wide), pairs, "padded")
    bundle = adapted(narrow)
    padded = _score(bundle, pairs, "padded")
    with as_turing() if case.is_turing else contextlib.nullcontext():
        shared = _score(bundle, pairs, "prefix_shared")
    wanted = case.kernel if device.type == "cuda" else "products"
    logps_floor, gradient_floor = FLOOR[case.dtype]
    times = 0.0 if case.dtype == torch.float32 else TIMES_PADDED
    outcome = Outcome(
        case.name,
        False,
        ", ".join(sorted(shared.kernels)),
        _logps_error(shared, truth),
        logps_floor + times * _logps_error(padded, truth),
        _gradient_error(shared, truth),
        gradient_floor + times * _gradient_error(padded, truth),
    )
    if shared.kernels != {wanted}:
        outcome.note = f"the kernel should be {wanted}"
    outcome.passed = (
        not outcome.note
        and outcome.logps_error <= outcome.logps_allowed
        and outcome.gradient_error <= outcome.gradient_allowed
    )
    return outcome


def _score(bundle: ModelBundle, pairs: Pairs, layout: str) -> Scored:
    if layout == "padded":
        bundle.use_own_attention(["eager"])
    else:
        bundle.use_row_attention()
    bundle.model.zero_grad()
    logps = bundle.score(LAYOUTS[layout](pairs, PAD)).logps
    # Every token with another weight, of both signs, so that no two errors cancel.
    weights = torch.cos(torch.arange(len(logps), device=logps.device))
    (logps * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in bundle.model.named_parameters() if p.grad is not None}
    return Scored(logps.detach().float(), gradients, set(bundle.kernels))


def _logps_error(found: Scored, truth: Scored) -> float:
    return (found.logps - truth.logps).abs().mean().item()


def _gradient_error(found: Scored, truth: Scored) -> float:
    """Norm of the difference over the norm, all LoRA tensors together; different tensors count as infinite."""
    if found.gradients.keys() != truth.gradients.keys():
        return float("inf")
    difference = sum(((found.gradients[name] - g).float() ** 2).sum().item() for name, g in truth.gradients.items())
    return (difference / sum((g.float() ** 2).sum().item() for g in truth.gradients.values())) ** 0.5


def _scaled_steps(device: torch.device) -> Outcome:
    """Train in fp16 as a Turing card does: after the scaler has settled, gradients are finite and adapters move."""
    name = "fp16 steps with a gradient scaler"
    if device.type != "cuda":
        return Outcome(name, True, note="skipped: it needs CUDA")
    model = small_model("llama", torch.float16, device)
    with tempfile.TemporaryDirectory() as folder, as_turing():
        args = alignkit.DPOConfig(
            folder, fp16=True, bf16=False, max_steps=8, per_device_train_batch_size=len(LENGTHS), logging_steps=1,
            learning_rate=1e-3, lr_scheduler_type="constant", report_to=[], save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = alignkit.DPOTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_list(token_rows(LENGTHS, VOCABULARY)),
            processing_class=word_tokenizer(VOCABULARY),
            peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        try:
            trainer.train()
        except FAILURES as error:
            return Outcome(name, False, note=described(error))
    norms = [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]
    moved = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    good = norms[-1] < float("inf") and all(bool(p.isfinite().all()) for p in moved) and any(p.any() for p in moved)
    kernels = ", ".join(sorted(trainer.bundle.kernels))
    return Outcome(name, good, kernels, note="" if good else f"gradient norms {norms}")
