"""Do two models say the same? The divergence of their next tokens, position by position, on a few texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedTokenizerBase

from alignkit.errors import DataError

# Short, and of several kinds: prose, numbers, code, another language.
CHECK_EXCHANGES = (
    ("What is the capital of France, and what is it known for?", "It is Paris, known for the Eiffel Tower."),
    ("Is 17 * 24 more than 400? Explain.", "Yes: 17 * 24 = 408, and 408 - 400 = 8."),
    ("Write a function that reverses a list.", "def reverse(items):\n    return items[::-1]\n"),
    ("Wie komme ich zum Bahnhof?", "Gehen Sie geradeaus und dann die zweite Straße links."),
    ("My neighbour is loud at night. What can I do?", "Talk to them first, calmly, and say when it disturbs you."),
)
MAX_TOKENS = 256  # of one text

_HALF = (torch.bfloat16, torch.float16)
# Operations whose arguments must be of one dtype. Elsewhere torch promotes to fp32 by itself.
_ONE_DTYPE = {
    F.linear,
    F.layer_norm,
    F.rms_norm,
    F.conv1d,
    F.scaled_dot_product_attention,
    torch.matmul,
    torch.bmm,
    torch.addmm,
    torch.baddbmm,
    Tensor.matmul,
    Tensor.__matmul__,
}


class Agreement(NamedTuple):
    """How far one model's next-token distributions are from another's.

    Attributes:
        tokens: positions compared.
        mean_kl: KL(first ‖ second), mean over positions, in nats.
        max_kl: the same at the worst position.
        same_top: share of positions where both find the same token the most likely.
    """

    tokens: int
    mean_kl: float
    max_kl: float
    same_top: float


def check_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return short conversations in the tokenizer's own template, without what the tokenizer itself puts before."""
    return [_rendered(tokenizer, question, answer) for question, answer in CHECK_EXCHANGES]


def check_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of `texts`, each cut to `MAX_TOKENS`.

    Raises:
        DataError: no text has a token.
    """
    rows = [list(tokenizer(text, add_special_tokens=True)["input_ids"])[:MAX_TOKENS] for text in texts]
    rows = [row for row in rows if row]
    if not rows:
        raise DataError("there is no text to compare the models on: give some with at least one token")
    return rows


def _rendered(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> str:
    if tokenizer.chat_template is None:
        return f"{question}\n{answer}"
    messages = [{"role": "user", "content": question}]
    prompt: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The tokenizer adds its own beginning, as the template may have done.
    begin = str(tokenizer.bos_token or "")
    return (prompt.removeprefix(begin) if begin and tokenizer("")["input_ids"] else prompt) + answer


class Fp32Arithmetic(TorchFunctionMode):
    """Within it, a model of 16-bit weights computes in fp32, at the cost of one weight's fp32 copy at a time.

    16-bit arithmetic makes two models that are the same on paper differ by some thousandths of a nat per token, which
    would hide what is looked for: what became of the weights.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            return _to_fp32(func(*args, **kwargs))
        if func in _ONE_DTYPE:
            args, kwargs = tuple(map(_to_fp32, args)), {name: _to_fp32(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _to_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value


@torch.inference_mode()
def next_token_logps(model: torch.nn.Module, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the log-probabilities of each position's next token, `(T, V)` fp32 on the CPU for each of `rows`.

    Weights are as they are, the arithmetic is fp32.
    """
    device = next(model.parameters()).device
    found = []
    for row in rows:
        with Fp32Arithmetic():
            logits = model(input_ids=torch.tensor([list(row)], device=device), use_cache=False).logits[0]
        found.append(torch.log_softmax(logits.float(), dim=-1).cpu())
    return found


def compare(first: Sequence[Tensor], second: Sequence[Tensor]) -> Agreement:
    """Compare what `next_token_logps` found for two models on the same rows.

    Where one has more tokens than the other (padding of the embedding), the common ones count, normalised again.
    """
    kls, same = [], []
    for one, other in zip(first, second, strict=True):
        size = min(one.shape[-1], other.shape[-1])
        one, other = (logps[..., :size].log_softmax(dim=-1) for logps in (one, other))
        kls.append((one.exp() * (one - other)).sum(dim=-1))
        same.append(one.argmax(dim=-1) == other.argmax(dim=-1))
    kl, agree = torch.cat(kls), torch.cat(same)
    return Agreement(len(kl), max(0.0, float(kl.mean())), float(kl.max()), float(agree.float().mean()))
