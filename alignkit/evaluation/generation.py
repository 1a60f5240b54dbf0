"""Answers of the policy and of what it started from, side by side."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from alignkit.evaluation.models import PolicyModel, in_parts, progress
from alignkit.evaluation.prompts import HeldOutPrompts, held_out_prompts, seeds_for, shown_text
from alignkit.models.bundle import POLICY, REFERENCE, ModelBundle
from alignkit.rollout.engine import Completion, Sampling
from alignkit.rollout.hf import HFEngine

if TYPE_CHECKING:
    from alignkit.trainers.dpo import DPOTrainer

logger = logging.getLogger(__name__)

_PROMPTS_AT_ONCE = 32  # between two steps of the progress bar


@dataclass(frozen=True, slots=True)
class Answers:
    """One prompt and how the reference and the policy answer it; `reference` is None where there is none."""

    prompt: str
    reference: str | None
    policy: str


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Answers of a policy and of its reference to the same prompts, drawn with the same random numbers.

    Attributes:
        prompts: what was asked.
        policy, reference: completions, those of the first prompt first; `reference` is empty where there is none.
        policy_texts, reference_texts: the same as text, without special tokens.
        each: completions of a prompt.
    """

    prompts: HeldOutPrompts
    policy: list[Completion]
    reference: list[Completion]
    policy_texts: list[str]
    reference_texts: list[str]
    each: int = 1

    def answers(self, count: int | None = None) -> list[Answers]:
        """The first completion of each prompt, for tables and reports."""
        firsts = range(0, len(self.policy), self.each)
        base = self.reference_texts
        return [
            Answers(shown_text(self.prompts.texts[number // self.each]), base[number] if base else None, text)
            for number, text in ((first, self.policy_texts[first]) for first in firsts[:count])
        ]


def side_by_side(
    policy: PolicyModel,
    prompts: Any,
    *,
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    each: int = 1,
    seed: int = 0,
    count: int | None = None,
    split: str = "test",
    quiet: bool = False,
) -> SideBySide:
    """Let a policy and its reference answer the same prompts.

    Args:
        policy: from `load_policy`.
        prompts: as `held_out_prompts` takes them.
        max_new_tokens: length at which answers are cut.
        temperature: 0 is greedy; else tokens are drawn from softmax(logits / temperature).
        each: completions of a prompt.
        seed: of what is drawn; the same seed draws the same answers, whatever the batches.
        count: at most so many prompts.
        split: of a dataset given by name.
        quiet: show no progress.

    Raises:
        DataError: no prompt, or too many that cannot be used.
        TrainingError: logits that are not finite.
    """
    asked = held_out_prompts(policy, prompts, max_new_tokens=max_new_tokens, split=split, count=count)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    seeds = seeds_for(len(asked), each, seed)
    found: dict[str, list[Completion]] = {POLICY: [], REFERENCE: []}
    for role in (POLICY, REFERENCE) if policy.bundle.can_reference else (POLICY,):
        found[role] = generate_in_role(
            policy.bundle, policy.tokenizer, asked.ids, seeds, sampling, role=role, quiet=quiet
        )
    texts = {role: [_text(policy.tokenizer, one.ids) for one in completions] for role, completions in found.items()}
    return SideBySide(asked, found[POLICY], found[REFERENCE], texts[POLICY], texts[REFERENCE], each)


def generate_in_role(
    bundle: ModelBundle,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    role: str = POLICY,
    quiet: bool = False,
) -> list[Completion]:
    """Complete prompts (token ids) in `role`; modes, gradients and random generators stay as they are.

    Raises:
        DataError: a prompt without tokens, or one that leaves no room for an answer.
        ModelError: a role that the model does not have.
    """
    separate = bundle.reference if role == REFERENCE else None
    model: Any = bundle.model if separate is None else separate
    done: list[Completion] = []
    with bundle.role(role) if separate is None else contextlib.nullcontext():
        engine = HFEngine(model, tokenizer)
        parts = list(zip(in_parts(prompts, _PROMPTS_AT_ONCE), in_parts(seeds, _PROMPTS_AT_ONCE), strict=True))
        for some, their_seeds in progress(parts, f"Answers, {role}", quiet=quiet):
            done += engine.generate(some, their_seeds, sampling)
    return done


def compare_answers(
    trainer: DPOTrainer, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 96
) -> list[Answers]:
    """Let reference and policy answer `prompts` greedily.

    The reference is the model that the run started from: adapters off, the frozen copy of an adapter that was trained
    on, or a separate model. (Under `sync_ref_model` it has moved with the policy.) Nothing is asked where weights are
    spread over processes, which `generate` cannot gather: the result is then empty.

    Args:
        trainer: it holds both models and the tokenizer.
        prompts: token ids, such as the `prompt_ids` of held-out rows, so that the format is the one trained on.
        max_new_tokens: length at which answers are cut.
    """
    if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
        logger.warning("No answers are generated: the weights are spread over processes.")
        return []
    tokenizer = _tokenizer(trainer)
    policy = greedy_answers(trainer, prompts, role=POLICY, max_new_tokens=max_new_tokens)
    base = None
    if trainer.bundle.can_reference:
        base = greedy_answers(trainer, prompts, role=REFERENCE, max_new_tokens=max_new_tokens)
    shown = [_text(tokenizer, ids) for ids in prompts]
    return [Answers(prompt, None if base is None else base[i], policy[i]) for i, prompt in enumerate(shown)]


def greedy_answers(
    trainer: DPOTrainer, prompts: Sequence[Sequence[int]], *, role: str = POLICY, max_new_tokens: int = 96
) -> list[str]:
    """Answer `prompts` (token ids) greedily in `role`; modes, gradients and random generators stay as they are.

    Raises:
        DataError: a prompt without tokens, or one that leaves no room for an answer.
        ModelError: a role that the model does not have.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.0)
    tokenizer, seeds = _tokenizer(trainer), [[0]] * len(prompts)
    with trainer.compute_loss_context_manager():
        found = generate_in_role(trainer.bundle, tokenizer, prompts, seeds, sampling, role=role, quiet=True)
    return [_text(tokenizer, completion.ids) for completion in found]


def _tokenizer(trainer: DPOTrainer) -> Any:
    """The trainer's tokenizer, which Trainer types as any processor."""
    return trainer.processing_class


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
