"""A rollout engine on transformers' continuous batching: a paged cache in which a new prompt takes over the room that
an ended completion leaves.

It pays where completions differ much in length and the device is fast; on a CPU `HFEngine` is the faster one. Left
alone, continuous batching sizes its cache by the whole card, which training needs too, so that its size is a required
argument here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

from alignkit.errors import ConfigError, ModelError, TrainingError
from alignkit.models.lora import is_quantized
from alignkit.models.probe import cannot_pack
from alignkit.rollout.engine import Completion, Endings, Sampling, check_request, draw_tokens, token_uniforms
from alignkit.rollout.hf import base_of, evaluate, evaluating

# Seconds between looks at whether the thread that generates is still alive.
_POLL_SECONDS = 1.0


class ContinuousEngine:
    """Complete prompts by continuous batching, in the state that the model is in.

    The prompt of several completions is run once. Stop strings are applied afterwards, because continuous batching
    knows only end tokens: what follows them is generated and thrown away.

    Args:
        model: a causal language model of attention layers alone, or a `PeftModel` of one.
        tokenizer: names EOS and decodes for stop strings.
        max_cache_tokens: positions that the cache holds, over all completions that are under way.
        max_batch_tokens: tokens that one forward pass takes in.
        page_tokens: the cache is handed out in pages of this size.
        attention: attention implementation during generation, `"sdpa"` or one of transformers' flash kernels.

    Raises:
        ConfigError: a bound below 1, or a cache that is smaller than a page.
        ModelError: a model that cannot run this way.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: Any,
        *,
        max_cache_tokens: int,
        max_batch_tokens: int = 1024,
        page_tokens: int = 64,
        attention: str = "sdpa",
    ) -> None:
        if max_batch_tokens < 1:
            raise ConfigError(f"max_batch_tokens={max_batch_tokens} must be at least 1")
        if page_tokens < 4:
            raise ConfigError(f"page_tokens={page_tokens} must be at least 4")
        if max_cache_tokens < page_tokens:
            raise ConfigError(f"max_cache_tokens={max_cache_tokens} is less than one page of {page_tokens} tokens")
        self.model = base_of(model)
        _check_model(self.model, attention)
        self.tokenizer, self.attention = tokenizer, attention
        self.max_cache_tokens, self.max_batch_tokens, self.page_tokens = max_cache_tokens, max_batch_tokens, page_tokens

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[Completion]:
        """Complete every prompt once for each of its seeds; see `RolloutEngine.generate`.

        Raises:
            DataError: a prompt that is empty, too long, or not of this model's vocabulary.
            ConfigError: prompts and seeds that do not match, nothing that could end a completion, or a cache too small
                for one completion.
            TrainingError: generation failed, for instance over logits that are not finite.
        """
        check_request(self.model, prompts, seeds, sampling)
        if not prompts:
            return []
        endings = Endings(self.model, self.tokenizer, sampling)
        needed = max(map(len, prompts)) + sampling.max_new_tokens
        if -(-needed // self.page_tokens) * self.page_tokens > self.max_cache_tokens:
            raise ConfigError(
                f"max_cache_tokens={self.max_cache_tokens} cannot hold one completion of {needed} tokens in pages of "
                f"{self.page_tokens}. Raise it, or lower max_new_tokens."
            )
        names = [name for number, of_prompt in enumerate(seeds) for name in _names(number, len(of_prompt))]
        starts = {name: len(prompts[int(name.split("_")[0])]) for name in names}
        uniforms = token_uniforms([seed for of_prompt in seeds for seed in of_prompt], sampling.max_new_tokens)
        drawing = _Drawing(uniforms.to(self.model.device), names, starts, sampling, endings)
        # Continuous batching seeds the global generators of every device.
        generators = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
        with evaluating(self.model), generators, self._own_attention(), self._manager(drawing, endings) as manager:
            for number, ids in enumerate(prompts):
                manager.num_return_sequences = len(seeds[number])
                manager.add_request(
                    list(ids), f"{number}", max_new_tokens=sampling.max_new_tokens, eos_token_id=list(endings.eos_ids)
                )
            found = _results(manager, len(names))
        return [endings.cut(found[name]) for name in names]

    @contextlib.contextmanager
    def _manager(self, drawing: _Drawing, endings: Endings) -> Iterator[Any]:
        # transformers types this mixin's methods for a narrower class than PreTrainedModel.
        model: Any = self.model
        manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=list(endings.eos_ids) or [-1]),
            ContinuousBatchingConfig(
                page_size=self.page_tokens,
                num_blocks=self.max_cache_tokens // self.page_tokens,
                max_batch_tokens=self.max_batch_tokens,
                max_requests_per_batch=self.max_batch_tokens,
                # Captured graphs and overlapped steps leave no room for a look at the logits between two tokens.
                use_cuda_graph=False,
                use_async_batching=False,
                auto_switch_to_flash=False,
            ),
        )
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([drawing]))
        manager.logit_processor.tensors_required = 1
        evaluate(model)  # the manager put every module into evaluation mode
        manager.start()
        try:
            yield manager
        finally:
            manager.stop(block=True, hard_stop=True)
            manager.destroy()

    @contextlib.contextmanager
    def _own_attention(self) -> Iterator[None]:
        """Continuous batching knows transformers' attention implementations only."""
        before = self.model.config._attn_implementation or "eager"
        self.model.set_attn_implementation(self.attention)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)


class _Drawing(ContinuousBatchingLogitsProcessor):
    """Leaves continuous batching no choice but the token that we draw.

    Args:
        uniforms: `(B, N)`, one number per completion and token.
        names: request names of the B completions.
        starts: prompt length of each request.
        sampling, endings: how tokens are drawn, and which of them end a completion.
    """

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(
        self, uniforms: Tensor, names: list[str], starts: dict[str, int], sampling: Sampling, endings: Endings
    ) -> None:
        self.uniforms, self.starts, self.sampling, self.endings = uniforms, starts, sampling, endings
        self.rows = {name: row for row, name in enumerate(names)}

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """For each request that gets a token, the place of its random number in the flattened table."""
        places = []
        for request in requests_with_new_token:
            state = request.state
            # A request that was put out of the cache starts anew with what it has written as part of its prompt.
            step = len(state.initial_tokens) + len(state.generated_tokens) - self.starts[state.request_id]
            places.append(self.rows[state.request_id] * self.sampling.max_new_tokens + step)
        return torch.tensor(places, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:  # (R, V), (at least R,)
        places = tensor_arg[: scores.shape[0]].long()
        if self.sampling.min_new_tokens and self.endings.eos_ids:
            early = places % self.sampling.max_new_tokens < self.sampling.min_new_tokens  # (R,)
            is_end = torch.zeros_like(scores[0], dtype=torch.bool)
            is_end[list(self.endings.eos_ids)] = True
            scores = scores.masked_fill(early[:, None] & is_end, -torch.inf)
        tokens = draw_tokens(scores, self.uniforms.flatten()[places], self.sampling.temperature)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


def _names(number: int, count: int) -> list[str]:
    """The names that continuous batching gives to the `count` completions of prompt `number`."""
    return [f"{number}__child#{child}" for child in range(count - 1)] + [f"{number}"]


def _results(manager: Any, count: int) -> dict[str, list[int]]:
    """Wait for `count` completions; return their ids by request name."""
    found: dict[str, list[int]] = {}
    while len(found) < count:
        result = manager.get_result(timeout=_POLL_SECONDS)
        if result is None:
            if not manager.is_running():
                raise TrainingError(f"continuous batching stopped after {len(found)} of {count} completions")
            continue
        if result.error is not None:
            raise TrainingError(f"continuous batching failed: {result.error}")
        if result.is_finished():
            found[result.request_id] = result.generated_tokens
    return found


def _check_model(model: PreTrainedModel, attention: str) -> None:
    config = model.config.get_text_config()
    reason = cannot_pack(config)
    if reason is None and not model._supports_attention_backend:
        reason = "its attention does not go through transformers' attention interface"
    if reason is None and attention == "sdpa" and config.to_dict().get("attn_logit_softcapping") is not None:
        reason = "its attention caps its scores, which SDPA cannot do: pass a flash implementation that can, or"
    if reason is None and model.device.type == "cpu" and is_quantized(model):
        reason = "its 4-bit layers run on a CPU"
    if reason is not None:
        raise ModelError(
            f"{type(model).__name__} cannot generate by continuous batching, because {reason}; use the 'hf' engine."
        )
