"""Answers of the policy and of what it started from, side by side."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from alignkit.models.bundle import POLICY, REFERENCE
from alignkit.rollout.engine import Sampling
from alignkit.rollout.hf import HFEngine

if TYPE_CHECKING:
    from alignkit.trainers.dpo import DPOTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answers:
    """One prompt and how the reference and the policy answer it; `reference` is None where there is none."""

    prompt: str
    reference: str | None
    policy: str


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
    bundle, tokenizer = trainer.bundle, _tokenizer(trainer)
    separate = bundle.reference if role == REFERENCE else None
    wearing = bundle.role(role) if separate is None else contextlib.nullcontext()
    model: Any = bundle.model if separate is None else separate
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.0)
    with wearing, trainer.compute_loss_context_manager():
        completions = HFEngine(model, tokenizer).generate(prompts, [[0]] * len(prompts), sampling)
    return [_text(tokenizer, completion.ids) for completion in completions]


def _tokenizer(trainer: DPOTrainer) -> Any:
    """The trainer's tokenizer, which Trainer types as any processor."""
    return trainer.processing_class


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
