"""How the pairs of a batch are laid out on the rows that a model sees.

Three layouts carry the same tokens to the same losses:

- `prefix_shared`: one row, `[prompt | chosen | rejected]` pair after pair. The positions of `rejected` restart at the
  prompt's end. No padding, no token twice.
- `packed`: one row, `[prompt | chosen] [prompt | rejected]`. For models in which a sequence cannot branch.
- `padded`: one sequence per row, chosen and rejected alternating, padded on the right. What every model understands.

Sequences are numbered `2·i` (chosen of pair `i`) and `2·i + 1` (rejected); losses see `(2·B,)` sums and never learn
which layout produced them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from alignkit.errors import ConfigError, nearest
from alignkit.functional.preference import PairTokens


class Block(NamedTuple):
    """One prefix and the tails that continue it on a packed row, in tokens; no tail sees another tail."""

    start: int
    prefix: int
    tails: tuple[int, ...]


class Pairs(NamedTuple):
    """Token ids of a batch of pairs, without any padding.

    Attributes:
        input_ids: `[prompt | chosen | rejected]` of every pair, `(N,)`.
        lengths: tokens of prompt, chosen and rejected, `(B, 3)`, on the CPU.
    """

    input_ids: Tensor
    lengths: Tensor

    def split(self, pairs_per_part: list[int]) -> Iterator[Pairs]:
        """Cut the batch into consecutive parts of the given numbers of pairs."""
        lengths = self.lengths.split(pairs_per_part)
        tokens = self.input_ids.split([int(part.sum()) for part in lengths])
        return (Pairs(*part) for part in zip(tokens, lengths, strict=True))


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch as one model call sees it, and where its completion tokens are scored.

    Attributes:
        input_ids, position_ids: `(R, T)`.
        attention_mask: boolean `(R, T)`, True = token; `None` on packed rows, which `blocks` describe instead.
        blocks: attention structure of a packed row; empty for `padded`.
        score_index: positions in the flattened `(R · T)` whose hidden state predicts a completion token, `(S,)`.
        targets: those completion tokens, `(S,)`.
        sequence_index: the sequence that each belongs to, `(S,)`, ascending.
        completion_position: its place in its completion, from 0, `(S,)`.
        pair_tokens: completion lengths, `(B,)` each.
    """

    name: str
    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    blocks: tuple[Block, ...]
    score_index: Tensor
    targets: Tensor
    sequence_index: Tensor
    completion_position: Tensor
    pair_tokens: PairTokens

    @property
    def num_sequences(self) -> int:
        """Completions in the batch, two for each pair."""
        return 2 * len(self.pair_tokens.chosen)

    @property
    def tokens(self) -> int:
        """Positions that the model computes, padding included."""
        return self.input_ids.numel()


def prefix_shared(pairs: Pairs, pad_token_id: int) -> Layout:
    """Lay `[prompt | chosen | rejected]` pair after pair on one row. `pad_token_id` is not needed."""
    blocks, positions, score, start = [], [], [], 0
    for prompt, chosen, rejected in pairs.lengths.tolist():
        blocks.append(Block(start, prompt, (chosen, rejected)))
        positions += [torch.arange(prompt + chosen), torch.arange(prompt, prompt + rejected)]
        last_prompt = torch.tensor([start + prompt - 1])
        chosen_start, rejected_start = start + prompt, start + prompt + chosen
        score += [last_prompt, torch.arange(chosen_start, chosen_start + chosen - 1)]
        score += [last_prompt, torch.arange(rejected_start, rejected_start + rejected - 1)]
        start = rejected_start + rejected
    return _assemble("prefix_shared", pairs, pairs.input_ids[None], positions, blocks, score)


def packed(pairs: Pairs, pad_token_id: int) -> Layout:
    """Lay `[prompt | chosen] [prompt | rejected]` one after another on one row. `pad_token_id` is not needed."""
    blocks, positions, score, tokens, start = [], [], [], [], 0
    for sequence, prompt in _sequences(pairs):
        length = sequence.numel()
        blocks.append(Block(start, length, ()))
        positions.append(torch.arange(length))
        score.append(torch.arange(start + prompt - 1, start + length - 1))
        tokens.append(sequence)
        start += length
    return _assemble("packed", pairs, torch.cat(tokens)[None], positions, blocks, score)


def padded(pairs: Pairs, pad_token_id: int) -> Layout:
    """Give every sequence a row of its own, padded on the right with `pad_token_id`."""
    sequences = list(_sequences(pairs))
    width = max(sequence.numel() for sequence, _ in sequences)
    input_ids = pairs.input_ids.new_full((len(sequences), width), pad_token_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool, device=input_ids.device)
    score = []
    for row, (sequence, prompt) in enumerate(sequences):
        length = sequence.numel()
        input_ids[row, :length] = sequence
        mask[row, :length] = True
        score.append(torch.arange(row * width + prompt - 1, row * width + length - 1))
    positions = [torch.arange(width)] * len(sequences)
    return _assemble("padded", pairs, input_ids, positions, [], score, mask)


LAYOUTS: dict[str, Callable[[Pairs, int], Layout]] = {
    "prefix_shared": prefix_shared,
    "packed": packed,
    "padded": padded,
}


def layout_function(name: str) -> Callable[[Pairs, int], Layout]:
    """Return the layout called `name`.

    Raises:
        ConfigError: no such layout.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"layout={name!r} is unknown; choose from {sorted(LAYOUTS)}.{nearest(name, LAYOUTS)}")
    return LAYOUTS[name]


def pair_costs(lengths: Tensor, layout: str) -> Tensor:
    """Positions that each pair costs in `layout` (padding not counted), `(B,)`."""
    prompts = 1 if layout == "prefix_shared" else 2
    return lengths[:, 0] * prompts + lengths[:, 1] + lengths[:, 2]


def token_bounded_chunks(costs: list[int], max_tokens: int | None) -> list[int]:
    """Group consecutive pairs so that each group costs at most `max_tokens`; return the group sizes.

    Groups are about equal, because a small remainder would use the machine badly. A pair that alone exceeds the bound
    forms a group by itself. Order is kept, so chunking changes no result.
    """
    if max_tokens is None:
        return [len(costs)]
    groups = _greedy(costs, max_tokens)
    # The smallest bound that needs no more groups balances them.
    low, high = max(1, sum(costs) // len(groups)), max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_greedy(costs, middle)) <= len(groups):
            high = middle
        else:
            low = middle + 1
    return _greedy(costs, high)


def _greedy(costs: list[int], max_tokens: int) -> list[int]:
    sizes, total = [], 0
    for cost in costs:
        if sizes and total + cost <= max_tokens:
            sizes[-1] += 1
            total += cost
        else:
            sizes.append(1)
            total = cost
    return sizes


def _sequences(pairs: Pairs) -> Iterator[tuple[Tensor, int]]:
    """Yield every `(prompt + completion ids, prompt length)`, chosen and rejected alternating."""
    parts = iter(pairs.input_ids.split(pairs.lengths.flatten().tolist()))
    for prompt, chosen, rejected in zip(parts, parts, parts, strict=True):
        for completion in (chosen, rejected):
            yield torch.cat([prompt, completion]), prompt.numel()


def _assemble(
    name: str,
    pairs: Pairs,
    input_ids: Tensor,
    positions: list[Tensor],
    blocks: list[Block],
    score: list[Tensor],
    attention_mask: Tensor | None = None,
) -> Layout:
    device = input_ids.device
    completion_lengths = pairs.lengths[:, 1:].reshape(-1).cpu()  # (2B,)
    sequence_index = torch.repeat_interleave(torch.arange(completion_lengths.numel()), completion_lengths)
    starts = completion_lengths.cumsum(0) - completion_lengths
    completion_position = torch.arange(sequence_index.numel()) - starts[sequence_index]
    # Completion tokens in sequence order: every part of [prompt | chosen | rejected] but the prompts.
    is_completion = torch.repeat_interleave(
        torch.tensor([False, True, True]).repeat(len(pairs.lengths)), pairs.lengths.flatten().cpu()
    )
    return Layout(
        name=name,
        input_ids=input_ids,
        position_ids=torch.cat(positions).view(input_ids.shape).to(device),
        attention_mask=attention_mask,
        blocks=tuple(blocks),
        score_index=torch.cat(score).to(device),
        targets=pairs.input_ids[is_completion.to(device)],
        sequence_index=sequence_index.to(device),
        completion_position=completion_position.to(device),
        pair_tokens=PairTokens(*pairs.lengths[:, 1:].to(device).unbind(1)),
    )
