"""What a rollout engine is, and what every engine shares: how a token is drawn and where a completion ends.

`RolloutEngine.generate` turns prompts into completions; how and where it does so is the engine's affair. All engines
draw by inverse CDF from the random numbers of the completion's own seed, so that a completion is a function of its
prompt, the weights and its seed, up to the rounding of the model's forward pass: what else is in the batch, how batches
are sorted or how processes share the work does not change it, and neither does the engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.errors import ConfigError, DataError, ModelError, TrainingError

# Probabilities become whole numbers of 2⁻⁴⁶, finer than any fp32 rounding error, whose sums do not depend on the order
# of summation: the same draw on every device.
_UNITS = 2.0**46
# Tokens decoded beyond a stop string's bytes: what some tokenizers strip at the start of a text is never looked at.
_SPARE_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_new_tokens: a completion is cut at this many tokens.
        temperature: tokens follow softmax(logits / temperature); 0 takes the most probable one.
        min_new_tokens: no completion ends before; EOS has probability 0 until then.
        stop_strings: a completion ends with the token that completes one of them, which stays in it.

    Raises:
        ConfigError: a value out of its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    min_new_tokens: int = 0
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: a completion needs at least 1 token")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens={self.min_new_tokens} must lie between 0 and max_new_tokens={self.max_new_tokens}"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if isinstance(self.stop_strings, str):
            raise ConfigError(f"stop_strings={self.stop_strings!r} is one string: write ({self.stop_strings!r},)")
        if not all(self.stop_strings):
            raise ConfigError("stop_strings holds an empty string, which would stop every completion at once")


class Completion(NamedTuple):
    """One completion: its token ids, EOS included, and whether it ended (by EOS or a stop string) or was cut."""

    ids: list[int]
    finished: bool


class RolloutEngine(Protocol):
    """Anything that completes prompts."""

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[Completion]:
        """Complete every prompt once for each of its seeds.

        Args:
            prompts: token ids, without padding.
            seeds: for each prompt one integer per completion; G seeds make G completions.
            sampling: how tokens are drawn.

        Returns:
            The completions of the first prompt in the order of its seeds, then those of the second, and so on.
        """
        ...


def token_uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Return the random numbers of completions, `(len(seeds), count)` in [0, 1), one per token, in float64.

    They come from a generator of each seed's own; the global one is not touched. A longer `count` continues a shorter.
    """
    generator = torch.Generator()
    return torch.stack(
        [torch.rand(count, generator=generator.manual_seed(seed), dtype=torch.float64) for seed in seeds]
    )


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Draw one token per row: the first whose cumulative probability exceeds the row's random number.

    With p = softmax(logits / temperature) and u uniform on [0, 1), the token min{i : p₁ + … + pᵢ > u} has the
    distribution p (inverse transform sampling). Tokens of probability 0 are never drawn. Temperature 0 is the arg max.

    Args:
        logits: `(R, V)` of any dtype.
        uniforms: `(R,)`, float64, on the same device.
        temperature: at least 0.

    Returns:
        Token ids `(R,)`.

    Raises:
        TrainingError: logits that are NaN, infinite, or all −∞.
    """
    logits = logits.float()
    largest, best = logits.max(dim=-1)
    if not bool(largest.isfinite().all()):  # NaN wins every comparison
        raise TrainingError("the model's logits are not finite, so no token can be drawn: its weights have diverged")
    if temperature == 0:
        return best
    probs = torch.softmax((logits - largest[:, None]) / temperature, dim=-1)  # (R, V)
    cdf = (probs.double() * _UNITS).long().cumsum(dim=-1)
    threshold = (uniforms * cdf[:, -1]).long()  # below the total, because u ≤ 1 − 2⁻⁵³
    return torch.searchsorted(cdf, threshold[:, None], right=True).squeeze(-1)


class Endings:
    """Where completions end: at EOS, or at the token that completes a stop string.

    Args:
        model: its generation config names end-of-sequence tokens.
        tokenizer: it names one too, and decodes.
        sampling: the stop strings, and the length before which nothing ends.

    Attributes:
        eos_ids: every token that ends a sequence, sorted.

    Raises:
        ConfigError: nothing could ever end a completion.
        ModelError: an end-of-sequence token outside the model's vocabulary.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, sampling: Sampling) -> None:
        own = None if model.generation_config is None else model.generation_config.eos_token_id
        named = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
        self.eos_ids = tuple(sorted({token for token in named if token is not None}))
        if not self.eos_ids and not sampling.stop_strings:
            raise ConfigError(
                "Neither the tokenizer nor the model's generation config has an end-of-sequence token, so no "
                "completion would ever end. Set tokenizer.eos_token, or give stop_strings."
            )
        vocab_size = model.config.get_text_config().vocab_size
        if self.eos_ids and self.eos_ids[-1] >= vocab_size:
            raise ModelError(
                f"The end-of-sequence token {self.eos_ids[-1]} is outside the model's vocabulary of {vocab_size} "
                "tokens. Use the tokenizer that belongs to the model."
            )
        self._tokenizer, self._sampling = tokenizer, sampling
        self._tail = _SPARE_TOKENS + max((len(text.encode()) for text in sampling.stop_strings), default=0)

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether the completion `ids` ends with its last token."""
        if len(ids) < self._sampling.min_new_tokens:
            return False
        if ids[-1] in self.eos_ids:
            return True
        return bool(self._sampling.stop_strings) and self._completes_stop_string(ids[-self._tail :])

    def cut(self, ids: Sequence[int]) -> Completion:
        """End a sequence that went on for too long at its first end, or at `max_new_tokens`."""
        for count in range(1, min(len(ids), self._sampling.max_new_tokens) + 1):
            if self.reached(ids[:count]):
                return Completion(list(ids[:count]), True)
        return Completion(list(ids[: self._sampling.max_new_tokens]), False)

    def _completes_stop_string(self, tail: Sequence[int]) -> bool:
        text = self._text(tail)
        found = [string for string in self._sampling.stop_strings if string in text]
        if not found:
            return False
        before = self._text(tail[:-1])
        return any(text.rfind(string) > before.rfind(string) for string in found)

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_request(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
) -> None:
    """Look a request over before any of it runs.

    Raises:
        DataError: a prompt that is empty, too long for the model, or holds ids outside its vocabulary.
        ConfigError: not the same number of prompts and lists of seeds, or a prompt without seeds.
    """
    if len(seeds) != len(prompts):
        raise ConfigError(f"{len(prompts)} prompts came with {len(seeds)} lists of seeds: each prompt needs its own")
    config = model.config.get_text_config()
    values = config.to_dict()
    positions = values.get("max_position_embeddings") or values.get("n_positions")
    for number, ids in enumerate(prompts):
        if not seeds[number]:
            raise ConfigError(f"prompt {number} has no seeds: give one for each completion")
        if not ids:
            raise DataError(f"prompt {number} has no tokens: remove it, or start it with the tokenizer's BOS token")
        if not 0 <= min(ids) <= max(ids) < config.vocab_size:
            raise DataError(
                f"prompt {number} holds token ids from {min(ids)} to {max(ids)}, but the model's vocabulary has "
                f"{config.vocab_size} tokens. Tokenize with the tokenizer that belongs to the model."
            )
        if positions is not None and len(ids) + sampling.max_new_tokens > positions:
            raise DataError(
                f"prompt {number} has {len(ids)} tokens, which with max_new_tokens={sampling.max_new_tokens} is more "
                f"than the model's {positions} positions. Shorten or drop the prompt, or lower max_new_tokens."
            )
