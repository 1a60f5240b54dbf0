"""Answers of the policy and of what it started from, side by side."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from alignkit.errors import ModelError
from alignkit.models.bundle import POLICY, REFERENCE

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
    trainer: DPOTrainer, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 96, batch_size: int = 8
) -> list[Answers]:
    """Let reference and policy answer `prompts` greedily.

    The reference is the model that the run started from: adapters off, the frozen copy of an adapter that was trained
    on, or a separate model. (Under `sync_ref_model` it has moved with the policy.) Nothing is asked where weights are
    spread over processes, which `generate` cannot gather: the result is then empty.

    Args:
        trainer: it holds both models and the tokenizer.
        prompts: token ids, such as the `prompt_ids` of held-out rows, so that the format is the one trained on.
        max_new_tokens: length at which answers are cut.
        batch_size: prompts that are answered together.
    """
    if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
        logger.warning("No answers are generated: the weights are spread over processes.")
        return []
    tokenizer = _tokenizer(trainer)
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    policy = greedy_answers(trainer, prompts, role=POLICY, **options)
    base = greedy_answers(trainer, prompts, role=REFERENCE, **options) if trainer.bundle.can_reference else None
    shown = [_text(tokenizer, ids) for ids in prompts]
    return [Answers(prompt, None if base is None else base[i], policy[i]) for i, prompt in enumerate(shown)]


def greedy_answers(
    trainer: DPOTrainer,
    prompts: Sequence[Sequence[int]],
    *,
    role: str = POLICY,
    max_new_tokens: int = 96,
    batch_size: int = 8,
) -> list[str]:
    """Answer `prompts` (token ids) greedily in `role`; modes, gradients and random generators stay as they are.

    Raises:
        ModelError: a prompt without tokens, or a role that the model does not have.
    """
    if not all(prompts):
        raise ModelError(f"prompt {next(i for i, ids in enumerate(prompts) if not ids)} has no tokens")
    bundle, tokenizer = trainer.bundle, _tokenizer(trainer)
    separate = bundle.reference if role == REFERENCE else None
    model = bundle.model if separate is None else separate
    wearing = bundle.role(role) if separate is None else contextlib.nullcontext()
    answers: list[str] = []
    with wearing, _evaluating(model), torch.no_grad(), trainer.compute_loss_context_manager():
        for start in range(0, len(prompts), batch_size):
            ids, mask = _left_padded(prompts[start : start + batch_size], tokenizer.pad_token_id, trainer.args.device)
            settings = _greedy(bundle.base, tokenizer, max_new_tokens)
            # PeftModel is typed as a plain module, which has no `generate`.
            generate: Any = model.generate
            output = generate(input_ids=ids, attention_mask=mask, generation_config=settings)  # (B, T + new)
            answers += [_text(tokenizer, row) for row in output[:, ids.shape[1] :].tolist()]
    return answers


def _tokenizer(trainer: DPOTrainer) -> Any:
    """The trainer's tokenizer, which Trainer types as any processor."""
    return trainer.processing_class


def _greedy(base: PreTrainedModel, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    own = base.generation_config.eos_token_id if base.generation_config is not None else None
    stops = {
        token for token in [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id] if token is not None
    }
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        # Set to their neutral values: a checkpoint's own sampling options would be merged in, with a warning each.
        temperature=1.0,
        top_k=50,
        top_p=1.0,
    )


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask, each `(B, T)`, with every prompt's end in the last column."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        model.eval()  # hooks may have changed a mode meanwhile
        for module in training:
            module.training = True


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
