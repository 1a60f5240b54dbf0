"""How the groups of a batch are laid out on the rows that a model sees.

A group is one prompt and the C completions that continue it: a preference pair (chosen, rejected), the G answers of a
rollout, or a single episode. Three layouts carry the same tokens to the same losses:

- `prefix_shared`: one row, `[prompt | completion | completion ...]` group after group. The positions of every
  completion restart at the prompt's end. What all prompts begin with (a system prompt) stands on the row once, in the
  first group's prompt, and the others continue it. No padding, no token twice.
- `packed`: one row, `[prompt | completion] [prompt | completion] ...`. For models in which a sequence cannot branch.
- `padded`: one sequence per row, a group's completions one after another, padded on the right. What every model
  understands.

Sequences are numbered `C·i + j` (completion `j` of group `i`), so `2·i` is chosen and `2·i + 1` rejected; losses see
`(C·B,)` sums and never learn which layout produced them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from alignkit.errors import ConfigError, nearest
from alignkit.functional.preference import PairTokens

# A start that all prompts of a batch share is laid out once if it has this many tokens: gathering the keys of shorter
# ones costs what computing them again would.
SHARED_START_TOKENS = 8


class Block(NamedTuple):
    """One prefix and the tails that continue it on a packed row, in tokens; no tail sees another tail.

    The prefix itself may continue the first `root` tokens of the row.
    """

    start: int
    prefix: int
    tails: tuple[int, ...]
    root: int = 0


class Groups(NamedTuple):
    """Token ids of a batch of groups, without any padding.

    Attributes:
        input_ids: `[prompt | completion | completion ...]` of every group, `(N,)`.
        lengths: tokens of the prompt and of each completion, `(B, 1 + C)`, on the CPU.
    """

    input_ids: Tensor
    lengths: Tensor

    def split(self, groups_per_part: list[int]) -> Iterator[Groups]:
        """Cut the batch into consecutive parts of the given numbers of groups."""
        lengths = self.lengths.split(groups_per_part)
        tokens = self.input_ids.split([int(part.sum()) for part in lengths])
        return (Groups(*part) for part in zip(tokens, lengths, strict=True))

    def parts(self) -> list[tuple[Tensor, ...]]:
        """The ids of each group's prompt and completions."""
        flat = iter(self.input_ids.split(self.lengths.flatten().tolist()))
        return list(zip(*[flat] * self.lengths.shape[1], strict=True))


Pairs = Groups  # what preference data gives: groups of a chosen and a rejected completion, lengths (B, 3)


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch as one model call sees it, and where its completions are scored.

    Attributes:
        input_ids, position_ids: `(R, T)`.
        attention_mask: boolean `(R, T)`, True = token; `None` on packed rows, which `blocks` describe instead.
        blocks: attention structure of a packed row; empty for `padded`.
        score_index: positions in the flattened `(R · T)` whose hidden state predicts a completion token, `(S,)`.
        targets: those completion tokens, `(S,)`.
        sequence_index: the sequence that each belongs to, `(S,)`, ascending.
        completion_position: its place in its completion, from 0, `(S,)`.
        last_index: positions in the flattened `(R · T)` of each completion's last token, `(C·B,)`: the hidden state
            that has seen the whole sequence, where a reward is read.
        completion_tokens: lengths of the completions, `(B, C)`.
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
    last_index: Tensor
    completion_tokens: Tensor

    @property
    def pair_tokens(self) -> PairTokens:
        """Completion lengths of pairs, `(B,)` each."""
        return PairTokens(*self.completion_tokens.unbind(1))

    @property
    def num_sequences(self) -> int:
        """Completions in the batch, C for each group."""
        return self.completion_tokens.numel()

    @property
    def tokens(self) -> int:
        """Positions that the model computes, padding included."""
        return self.input_ids.numel()


def prefix_shared(groups: Groups, pad_token_id: int) -> Layout:
    """Lay `[prompt | completion | completion ...]` group after group on one row. `pad_token_id` is not needed."""
    blocks, positions, score, last, start = [], [], [], [], 0
    shared = _shared_start(groups)
    for number, (prompt, *completions) in enumerate(groups.lengths.tolist()):
        root = shared if number else 0
        blocks.append(Block(start, prompt - root, tuple(completions), root))
        positions.append(torch.arange(root, prompt))
        ends = list(accumulate(completions, initial=start + prompt - root))
        last_prompt = torch.tensor([ends[0] - 1])
        for begin, end in pairwise(ends):
            positions.append(torch.arange(prompt, prompt + end - begin))
            score += [last_prompt, torch.arange(begin, end - 1)]
            last.append(end - 1)
        start = ends[-1]
    row = groups.input_ids[_first_occurrences(groups, shared)] if shared else groups.input_ids
    return _assemble("prefix_shared", groups, row[None], positions, blocks, score, last)


def _shared_start(groups: Groups) -> int:
    """Tokens that all prompts begin with, 0 where laying them out once does not pay; every prompt keeps its last."""
    longest = int(groups.lengths[:, 0].min()) - 1
    if len(groups.lengths) == 1 or longest < SHARED_START_TOKENS:
        return 0
    starts = groups.lengths.sum(1).cumsum(0) - groups.lengths.sum(1)  # (B,) of the groups
    index = (starts[:, None] + torch.arange(longest)).to(groups.input_ids.device)
    prompts = groups.input_ids[index]  # (B, longest)
    shared = int((prompts == prompts[0]).all(0).cumprod(0).sum())
    return shared if shared >= SHARED_START_TOKENS else 0


def _first_occurrences(groups: Groups, shared: int) -> Tensor:
    """Mark the tokens that stand on the row, `(N,)`: all but the first `shared` of every group after the first."""
    tokens = groups.lengths.sum(1)
    place = torch.arange(len(groups.input_ids)) - torch.repeat_interleave(tokens.cumsum(0) - tokens, tokens)
    place[: tokens[0]] = shared
    return (place >= shared).to(groups.input_ids.device)


def packed(groups: Groups, pad_token_id: int) -> Layout:
    """Lay `[prompt | completion] [prompt | completion] ...` on one row. `pad_token_id` is not needed."""
    blocks, positions, score, last, tokens, start = [], [], [], [], [], 0
    for sequence, prompt in _sequences(groups):
        length = sequence.numel()
        blocks.append(Block(start, length, ()))
        positions.append(torch.arange(length))
        score.append(torch.arange(start + prompt - 1, start + length - 1))
        tokens.append(sequence)
        start += length
        last.append(start - 1)
    return _assemble("packed", groups, torch.cat(tokens)[None], positions, blocks, score, last)


def padded(groups: Groups, pad_token_id: int, multiple: int = 1) -> Layout:
    """Give every sequence a row of its own, padded on the right with `pad_token_id` to a multiple of some tokens."""
    sequences = list(_sequences(groups))
    width = max(sequence.numel() for sequence, _ in sequences)
    width = -(-width // multiple) * multiple
    input_ids = groups.input_ids.new_full((len(sequences), width), pad_token_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool, device=input_ids.device)
    score, last = [], []
    for row, (sequence, prompt) in enumerate(sequences):
        length = sequence.numel()
        input_ids[row, :length] = sequence
        mask[row, :length] = True
        score.append(torch.arange(row * width + prompt - 1, row * width + length - 1))
        last.append(row * width + length - 1)
    positions = [torch.arange(width)] * len(sequences)
    return _assemble("padded", groups, input_ids, positions, [], score, last, mask)


LAYOUTS: dict[str, Callable[[Groups, int], Layout]] = {
    "prefix_shared": prefix_shared,
    "packed": packed,
    "padded": padded,
}


def layout_function(name: str) -> Callable[[Groups, int], Layout]:
    """Return the layout called `name`.

    Raises:
        ConfigError: no such layout.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"layout={name!r} is unknown; choose from {sorted(LAYOUTS)}.{nearest(name, LAYOUTS)}")
    return LAYOUTS[name]


def group_costs(lengths: Tensor, layout: str) -> Tensor:
    """Positions that each group costs in `layout`, `(B,)`, from lengths `(B, 1 + C)`.

    Padding is not counted, and a start that several prompts share is counted for each.
    """
    completions = lengths.shape[1] - 1
    prompts = 1 if layout == "prefix_shared" else completions
    return lengths[:, 0] * prompts + lengths[:, 1:].sum(1)


def token_bounded_chunks(costs: list[int], max_tokens: int | None) -> list[int]:
    """Cut consecutive rows into chunks that cost at most `max_tokens` each; return the chunks' numbers of rows.

    Chunks are about equal, because a small remainder would use the machine badly. A row that alone exceeds the bound
    forms a chunk by itself. Order is kept, so chunking changes no result.
    """
    if max_tokens is None:
        return [len(costs)]
    fewest = len(_greedy(costs, max_tokens))
    # The smallest bound that needs no more chunks balances them.
    low, high = max(1, sum(costs) // fewest), max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_greedy(costs, middle)) <= fewest:
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


def _sequences(groups: Groups) -> Iterator[tuple[Tensor, int]]:
    """Yield every `(prompt + completion ids, prompt length)`, a group's completions one after another."""
    for prompt, *completions in groups.parts():
        for completion in completions:
            yield torch.cat([prompt, completion]), prompt.numel()


def _assemble(
    name: str,
    groups: Groups,
    input_ids: Tensor,
    positions: list[Tensor],
    blocks: list[Block],
    score: list[Tensor],
    last: list[int],
    attention_mask: Tensor | None = None,
) -> Layout:
    device = input_ids.device
    lengths = groups.lengths.cpu()  # (B, 1 + C)
    completion_lengths = lengths[:, 1:].reshape(-1)  # (C·B,)
    sequence_index = torch.repeat_interleave(torch.arange(completion_lengths.numel()), completion_lengths)
    starts = completion_lengths.cumsum(0) - completion_lengths
    completion_position = torch.arange(sequence_index.numel()) - starts[sequence_index]
    # Completion tokens in sequence order: every part of a group but its prompt.
    is_completion = torch.ones_like(lengths, dtype=torch.bool)
    is_completion[:, 0] = False
    is_completion = torch.repeat_interleave(is_completion.flatten(), lengths.flatten())  # (N,)
    return Layout(
        name=name,
        input_ids=input_ids,
        position_ids=torch.cat(positions).view(input_ids.shape).to(device),
        attention_mask=attention_mask,
        blocks=tuple(blocks),
        score_index=torch.cat(score).to(device),
        targets=groups.input_ids[is_completion.to(device)],
        sequence_index=sequence_index.to(device),
        completion_position=completion_position.to(device),
        last_index=torch.tensor(last, device=device),
        completion_tokens=lengths[:, 1:].to(device),
    )
