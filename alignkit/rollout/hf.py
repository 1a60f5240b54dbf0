"""The default rollout engine: a short decode loop over the model itself, with transformers' key-value cache.

Every prompt is run once and its cache is handed to all of its completions; completions that have ended leave the
batch; nothing but token ids is stored.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from alignkit.errors import ConfigError, TrainingError
from alignkit.models.attention import keep_soft_caps
from alignkit.models.lora import is_4bit, merged_copies
from alignkit.models.out_of_memory import is_out_of_memory, release_memory
from alignkit.models.probe import cannot_pack
from alignkit.rollout.cache import Prefilled, can_join, join_caches
from alignkit.rollout.engine import Completion, Endings, Sampling, check_request, draw_tokens, token_uniforms

logger = logging.getLogger(__name__)


class HFEngine:
    """Complete prompts with a transformers model, in the state that it is in: adapter, dtype, device.

    The model comes back as it was: the mode of every module, gradients, random generators. Models whose state cannot
    be handed on like a key-value cache (recurrent layers) are run by transformers' `generate`, prompt by prompt length.

    Args:
        model: a causal language model, or a `PeftModel` of one.
        tokenizer: names EOS and decodes for stop strings.
        max_batch_tokens: bounds the cache of a batch: completions × (longest prompt + `max_new_tokens`). A prompt whose
            completions do not fit together is run once for each part of them. It falls where memory runs out: the
            batch is then written in halves, with the same tokens, for every completion draws from its own seed.
        merge_adapters: generate with merged copies of the adapted weights (see `merged_copies`), about a fifth faster
            on a CPU, for the memory of one copy of them. 4-bit bases are never merged.

    Raises:
        ConfigError: a bound below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: Any,
        *,
        max_batch_tokens: int = 16_384,
        merge_adapters: bool = False,
    ) -> None:
        if max_batch_tokens < 1:
            raise ConfigError(f"max_batch_tokens={max_batch_tokens} must be at least 1")
        self.model = base_of(model)
        keep_soft_caps(self.model)
        self.tokenizer = tokenizer
        self.max_batch_tokens = max_batch_tokens
        self.merge_adapters = merge_adapters
        self._is_recurrent = cannot_pack(self.model.config) is not None or not can_join(self.model.config)
        known = inspect.signature(self.model.forward).parameters
        self._takes_positions = "position_ids" in known
        self._takes_logits_to_keep = "logits_to_keep" in known

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[Completion]:
        """Complete every prompt once for each of its seeds; see `RolloutEngine.generate`.

        Raises:
            DataError: a prompt that is empty, too long, or not of this model's vocabulary.
            ConfigError: prompts and seeds that do not match, or nothing that could end a completion.
            TrainingError: logits that are not finite, or not enough memory for a single completion.
        """
        check_request(self.model, prompts, seeds, sampling)
        before = self.max_batch_tokens
        endings = Endings(self.model, self.tokenizer, sampling)
        done: list[Completion | None] = [None] * sum(map(len, seeds))
        merging = merged_copies(self.model) if self.merge_adapters else contextlib.nullcontext()
        with evaluating(self.model), merging:
            for batch in _batches(prompts, seeds, sampling, self.max_batch_tokens, equal_lengths=self._is_recurrent):
                for place, completion in zip(batch.places, self._write(batch, sampling, endings), strict=True):
                    done[place] = completion
        if self.max_batch_tokens != before:
            logger.warning(
                "out of memory: completions are written in batches of at most %d tokens from now on, not %d; they stay "
                "the same. Set rollout_batch_tokens=%d to begin with that.",
                self.max_batch_tokens,
                before,
                self.max_batch_tokens,
            )
        return [completion for completion in done if completion is not None]

    def state_dict(self) -> dict[str, Any]:
        """Return what memory was found to hold."""
        return {"max_batch_tokens": self.max_batch_tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Write no larger batches than `state_dict` says."""
        self.max_batch_tokens = min(self.max_batch_tokens, state_dict["max_batch_tokens"])

    def _write(self, batch: _Batch, sampling: Sampling, endings: Endings) -> list[Completion]:
        """Complete one batch; where memory runs out, its halves."""
        tokens = len(batch.rows) * (len(batch.prompts[0]) + sampling.max_new_tokens)
        if len(batch.rows) == 1 or tokens <= self.max_batch_tokens:
            run = self._run_whole if self._is_recurrent else self._run
            try:
                return run(batch, sampling, endings)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch.rows) == 1:
                    raise TrainingError(
                        f"out of memory: one completion alone, of {tokens} tokens with its prompt, cannot be written "
                        f"({error}). Lower max_completion_length or max_prompt_length, or load the base in 4 bits "
                        "(quantization_config=alignkit.nf4())."
                    ) from None
            release_memory()
            self.max_batch_tokens = min(self.max_batch_tokens, tokens) // 2
        return [completion for half in batch.halves() for completion in self._write(half, sampling, endings)]

    def _run(self, batch: _Batch, sampling: Sampling, endings: Endings) -> list[Completion]:
        """Complete one batch with the decode loop."""
        device = self.model.device
        lengths = [len(batch.prompts[row]) for row in batch.rows]
        longest = max(lengths)
        is_padded = min(lengths) < longest
        logits, cache = self._prefill(batch, sampling.max_new_tokens)  # (R, V)
        length = torch.tensor(lengths, device=device)  # (R,)
        # True from the prompt's first token to the last one to come.
        columns = torch.arange(longest + sampling.max_new_tokens, device=device)
        mask = (columns >= longest - length[:, None]).long()  # (R, T + new)
        uniforms = token_uniforms(batch.seeds, sampling.max_new_tokens).to(device)
        written = [Completion([], False) for _ in batch.rows]
        alive = list(range(len(written)))
        for step in range(sampling.max_new_tokens):
            tokens = _draw(logits, uniforms[:, step], step, sampling, endings)  # (R,)
            for row, token in zip(alive, tokens.tolist(), strict=True):
                written[row].ids.append(token)
                written[row] = written[row]._replace(finished=endings.reached(written[row].ids))
            kept = [place for place, row in enumerate(alive) if not written[row].finished]
            if not kept or step + 1 == sampling.max_new_tokens:
                break
            if len(kept) < len(alive):
                alive = [alive[place] for place in kept]
                index = torch.tensor(kept, device=device)
                cache.batch_select_indices(index)
                tokens, mask, length, uniforms = (t[index] for t in (tokens, mask, length, uniforms))
            seen = mask[:, : longest + step + 1] if is_padded else None
            logits = self._logits(tokens[:, None], (length + step)[:, None], seen, cache)
        return written

    def _prefill(self, batch: _Batch, room: int) -> tuple[Tensor, DynamicCache]:
        """Run every prompt once, those of similar length together; return a row per completion."""
        device = self.model.device
        rows = torch.tensor(batch.rows)
        parts: list[Prefilled] = []
        logits: list[Tensor] = []
        for begin, end in _similar([len(prompt) for prompt in batch.prompts]):
            ids, mask = left_padded(batch.prompts[begin:end], device)  # (P, T)
            cache = DynamicCache(config=self.model.config)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            is_padded = len(batch.prompts[end - 1]) < len(batch.prompts[begin])
            last = self._logits(ids, positions, mask if is_padded else None, cache)  # (P, V)
            places = ((rows >= begin) & (rows < end)).nonzero().squeeze(-1)
            parts.append(Prefilled(cache, (rows[places] - begin).to(device), places.to(device)))
            logits.append(last[parts[-1].rows])
        # Completions lie in the order of their prompts, so the parts' rows follow one another.
        return torch.cat(logits), join_caches(parts, self.model.config, len(batch.prompts[0]), room)

    def _logits(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: DynamicCache) -> Tensor:
        """The logits after the last token of every row, `(R, V)`; the cache takes the tokens in."""
        extra: dict[str, Any] = {"position_ids": positions} if self._takes_positions else {}
        if self._takes_logits_to_keep:
            # An index, not 1: the head copies its whole weight for each row of a slice, which is not contiguous.
            extra["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=ids.device)
        return self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra).logits[
            :, -1
        ]

    def _run_whole(self, batch: _Batch, sampling: Sampling, endings: Endings) -> list[Completion]:
        """Complete one batch of equally long prompts with transformers' `generate`, drawing the tokens ourselves."""
        ids, mask = left_padded([batch.prompts[row] for row in batch.rows], self.model.device)
        uniforms = token_uniforms(batch.seeds, sampling.max_new_tokens).to(ids.device)
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=list(endings.eos_ids), pad_token_id=0
        )
        # PreTrainedModel has `generate` only beside its heads.
        model: Any = self.model
        with _without_generation_config(self.model):
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([_Drawing(uniforms, ids.shape[1], sampling, endings)]),
                stopping_criteria=StoppingCriteriaList([_Stopping(ids.shape[1], endings)]),
            )
        return [endings.cut(row) for row in output[:, ids.shape[1] :].tolist()]


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model without PEFT's wrapper; its layers keep their adapters."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    evaluate(model)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate(model: nn.Module) -> None:
    """Put `model` into evaluation mode, but for bitsandbytes' 4-bit layers.

    The mode changes nothing in those, save that on a CPU their first pass in evaluation mode repacks the weight, and no
    gradient passes it from then on.
    """
    model.eval()
    for module in model.modules():
        if is_4bit(module):
            module.training = True


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask (1 where there is a token), each `(P, T)`, with every prompt's end in the last column."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


class _Batch(NamedTuple):
    """Completions that are written together."""

    prompts: list[Sequence[int]]
    rows: list[int]  # of each completion, its prompt's number in `prompts`
    seeds: list[int]
    places: list[int]  # of each completion, its place in the result

    def halves(self) -> tuple[_Batch, _Batch]:
        """The first and the second half of the completions, with the prompts of each."""
        middle = len(self.rows) // 2
        first, second = self.rows[:middle], self.rows[middle:]
        return (
            _Batch(self.prompts[: first[-1] + 1], first, self.seeds[:middle], self.places[:middle]),
            _Batch(
                self.prompts[second[0] :],
                [row - second[0] for row in second],
                self.seeds[middle:],
                self.places[middle:],
            ),
        )


def _batches(
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    max_tokens: int,
    *,
    equal_lengths: bool,
) -> Iterable[_Batch]:
    """Cut a request into batches of prompts of similar length, the longest first: memory runs out at once or never."""
    first_place = [0]
    for of_prompt in seeds:
        first_place.append(first_place[-1] + len(of_prompt))
    batch, longest = _Batch([], [], [], []), 0
    for number in sorted(range(len(prompts)), key=lambda number: (-len(prompts[number]), number)):
        length = len(prompts[number])
        if batch.rows and equal_lengths and length != longest:
            yield batch
            batch = _Batch([], [], [], [])
        if not batch.rows:
            longest = length
        room = max(1, max_tokens // (longest + sampling.max_new_tokens))
        left = list(zip(seeds[number], range(first_place[number], first_place[number + 1]), strict=True))
        # Completions of one prompt stay together where they fit into a batch at all.
        if batch.rows and len(batch.rows) + len(left) > room:
            yield batch
            batch, longest = _Batch([], [], [], []), length
            room = max(1, max_tokens // (longest + sampling.max_new_tokens))
        while left:
            part, left = left[:room], left[room:]
            batch.prompts.append(prompts[number])
            batch.rows.extend([len(batch.prompts) - 1] * len(part))
            batch.seeds.extend(seed for seed, _ in part)
            batch.places.extend(place for _, place in part)
            if left:
                yield batch
                batch = _Batch([], [], [], [])
    if batch.rows:
        yield batch


def _similar(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut falling lengths into ranges `[begin, end)` in which padding is at most a quarter of every row."""
    begin = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or lengths[end] < 0.75 * lengths[begin]:
            yield begin, end
            begin = end


def _draw(logits: Tensor, uniforms: Tensor, step: int, sampling: Sampling, endings: Endings) -> Tensor:
    """Draw the token number `step` of every completion."""
    if step < sampling.min_new_tokens and endings.eos_ids:
        logits[:, list(endings.eos_ids)] = -torch.inf
    return draw_tokens(logits, uniforms, sampling.temperature)


class _Drawing(LogitsProcessor):
    """Leaves `generate` no choice but the token that we draw."""

    def __init__(self, uniforms: Tensor, prompt_tokens: int, sampling: Sampling, endings: Endings) -> None:
        self.uniforms, self.prompt_tokens, self.sampling, self.endings = uniforms, prompt_tokens, sampling, endings

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (R, T), (R, V)
        step = input_ids.shape[1] - self.prompt_tokens
        tokens = _draw(scores, self.uniforms[:, step], step, self.sampling, self.endings)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


class _Stopping(StoppingCriteria):
    """Tells `generate` which completions have ended."""

    def __init__(self, prompt_tokens: int, endings: Endings) -> None:
        self.prompt_tokens, self.endings = prompt_tokens, endings

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # (R, T)
        ends = [self.endings.reached(ids) for ids in input_ids[:, self.prompt_tokens :].tolist()]
        return torch.tensor(ends, device=input_ids.device)


@contextlib.contextmanager
def _without_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Set a checkpoint's own sampling options aside: `generate` merges them into whatever it is given."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
