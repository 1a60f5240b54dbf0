"""Key-value caches for the decode loop: prompts that ran apart become one batch, with room for what is to come.

transformers' cache grows by concatenation, which copies all of it for every token. Here the room is there from the
start and each token is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class Prefilled(NamedTuple):
    """The cache of prompts that ran together, and the completions that start from it."""

    cache: DynamicCache
    rows: Tensor  # (R',): of each of its completions, the prompt's row in `cache`
    places: Tensor  # (R',): of each of its completions, the row in the joined cache


class RoomyLayer(DynamicLayer):
    """A full-attention layer over buffers `(R, heads, capacity, D)`, of which the first `length` positions are used."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._buffers = keys, values
        self._show(length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new states `(R, heads, n, D)`; return all, `(R, heads, length + n, D)`."""
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = states
        return self._show(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        keys, values = self._buffers
        self._buffers = keys[indices], values[indices]
        self._show(self.get_seq_length())

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
        return self.keys, self.values


def can_join(config: PreTrainedConfig) -> bool:
    """Whether all that a model of this kind caches are keys and values by position, of all or of the latest ones."""
    return {type(layer) for layer in DynamicCache(config=config).layers} <= {DynamicLayer, DynamicSlidingWindowLayer}


def join_caches(parts: Sequence[Prefilled], config: PreTrainedConfig, tokens: int, room: int) -> DynamicCache:
    """Make one cache with a row per completion out of the caches of their prompts.

    Args:
        parts: together they name every row of the result once; prompts end in the last column of their cache.
        config: the model's.
        tokens: length of the longest prompt; shorter ones are filled up on the left.
        room: tokens that will be added.
    """
    joined = DynamicCache(config=config)
    count = sum(len(part.places) for part in parts)
    for number, layer in enumerate(joined.layers):
        first: Any = parts[0].cache.layers[number]
        if not first.is_initialized:
            continue  # it reads another layer's keys and values
        is_sliding = isinstance(layer, DynamicSlidingWindowLayer)
        keys, values = (
            _joined([(part, states(part.cache.layers[number])) for part in parts], count, 0 if is_sliding else room)
            for states in (lambda layer: layer.keys, lambda layer: layer.values)
        )
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values, layer.cumulative_length = keys, values, tokens
        else:
            joined.layers[number] = RoomyLayer(keys, values, tokens)
    return joined


def _joined(parts: list[tuple[Prefilled, Tensor]], count: int, room: int) -> Tensor:
    """Stack `(P, heads, n, D)` of every part to `(count, heads, longest n + room, D)`, prompts ending side by side."""
    longest = max(states.shape[-2] for _, states in parts)
    _, heads, _, width = parts[0][1].shape
    joined = parts[0][1].new_zeros(count, heads, longest + room, width)
    for part, states in parts:
        joined[part.places, :, longest - states.shape[-2] : longest] = states[part.rows]
    return joined
