"""Layouts against tables written by hand: two pairs, unequal lengths, completions of one token."""

from __future__ import annotations

import random

import pytest
import torch

from alignkit.data.layout import (
    LAYOUTS,
    SHARED_START_TOKENS,
    Block,
    Groups,
    Pairs,
    group_costs,
    layout_function,
    packed,
    padded,
    prefix_shared,
    token_bounded_chunks,
)
from alignkit.errors import ConfigError

PAD = 99
# Pair 0: prompt 10 11 12, chosen 20 21, rejected 30. Pair 1: prompt 13, chosen 22, rejected 31 32 33.
PAIRS = Pairs(torch.tensor([10, 11, 12, 20, 21, 30, 13, 22, 31, 32, 33]), torch.tensor([[3, 2, 1], [1, 1, 3]]))
TARGETS = [20, 21, 30, 22, 31, 32, 33]
SEQUENCE_INDEX = [0, 0, 1, 2, 3, 3, 3]
COMPLETION_POSITION = [0, 1, 0, 0, 0, 1, 2]


def test_prefix_shared_table():
    layout = prefix_shared(PAIRS, PAD)
    assert layout.name == "prefix_shared"
    assert layout.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 13, 22, 31, 32, 33]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 3]]
    assert layout.attention_mask is None
    assert layout.blocks == (Block(0, 3, (2, 1)), Block(6, 1, (1, 3)))
    # The prompt's last position predicts the first token of both completions.
    assert layout.score_index.tolist() == [2, 3, 2, 6, 6, 8, 9]
    assert layout.last_index.tolist() == [4, 5, 7, 10]
    assert layout.tokens == 11


def test_packed_table():
    layout = packed(PAIRS, PAD)
    assert layout.name == "packed"
    assert layout.input_ids.tolist() == [[10, 11, 12, 20, 21, 10, 11, 12, 30, 13, 22, 13, 31, 32, 33]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3]]
    assert layout.attention_mask is None
    assert layout.blocks == (Block(0, 5, ()), Block(5, 4, ()), Block(9, 2, ()), Block(11, 4, ()))
    assert layout.score_index.tolist() == [2, 3, 7, 9, 11, 12, 13]
    assert layout.last_index.tolist() == [4, 8, 10, 14]
    assert layout.tokens == 15


def test_padded_table():
    layout = padded(PAIRS, PAD)
    assert layout.name == "padded"
    assert layout.input_ids.tolist() == [
        [10, 11, 12, 20, 21],
        [10, 11, 12, 30, PAD],
        [13, 22, PAD, PAD, PAD],
        [13, 31, 32, 33, PAD],
    ]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 4
    assert layout.attention_mask.int().tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
    ]
    assert layout.attention_mask.dtype == torch.bool
    assert layout.blocks == ()
    assert layout.score_index.tolist() == [2, 3, 7, 10, 15, 16, 17]
    assert layout.last_index.tolist() == [4, 8, 11, 18]
    assert layout.tokens == 20


def test_padding_to_a_multiple():
    layout = padded(PAIRS, PAD, multiple=4)
    assert layout.input_ids.shape == (4, 8)
    assert layout.input_ids[1].tolist() == [10, 11, 12, 30, PAD, PAD, PAD, PAD]
    assert layout.attention_mask.sum(1).tolist() == [5, 4, 2, 4]
    assert layout.input_ids.flatten()[layout.last_index].tolist() == [21, 30, 22, 33]
    assert padded(PAIRS, PAD, multiple=5).input_ids.shape == (4, 5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_losses_see_does_not_depend_on_the_layout(name):
    layout = LAYOUTS[name](PAIRS, PAD)
    assert layout.targets.tolist() == TARGETS
    assert layout.sequence_index.tolist() == SEQUENCE_INDEX
    assert layout.completion_position.tolist() == COMPLETION_POSITION
    assert layout.pair_tokens.chosen.tolist() == [2, 1]
    assert layout.pair_tokens.rejected.tolist() == [1, 3]
    assert layout.num_sequences == 4


@pytest.mark.parametrize("name", LAYOUTS)
def test_padding_id_inside_a_completion_is_a_token(name):
    """Masks come from lengths: a model whose pad token is its EOS still learns to stop."""
    pairs = Pairs(torch.tensor([10, PAD, 20, PAD, 30, PAD]), torch.tensor([[2, 2, 2]]))
    layout = LAYOUTS[name](pairs, PAD)
    assert layout.targets.tolist() == [20, PAD, 30, PAD]
    if name == "padded":
        assert layout.attention_mask.all()


def test_one_pair_of_single_tokens():
    pairs = Pairs(torch.tensor([7, 8, 9]), torch.tensor([[1, 1, 1]]))
    shared = prefix_shared(pairs, PAD)
    assert shared.position_ids.tolist() == [[0, 1, 1]]
    assert shared.score_index.tolist() == [0, 0]
    assert shared.blocks == (Block(0, 1, (1, 1)),)
    assert packed(pairs, PAD).score_index.tolist() == [0, 2]
    assert padded(pairs, PAD).score_index.tolist() == [0, 2]
    assert padded(pairs, PAD).input_ids.tolist() == [[7, 8], [7, 9]]


def test_costs_count_the_prompt_once_only_where_it_is_shared():
    assert group_costs(PAIRS.lengths, "prefix_shared").tolist() == [6, 5]
    assert group_costs(PAIRS.lengths, "packed").tolist() == [9, 6]
    assert group_costs(PAIRS.lengths, "padded").tolist() == [9, 6]
    for name in ("prefix_shared", "packed"):
        assert LAYOUTS[name](PAIRS, PAD).tokens == group_costs(PAIRS.lengths, name).sum()


# Group 0: prompt 10 11, completions 20 21 22, 30, 40 41. Group 1: prompt 12, completions 23, 31 32, 42.
TRIPLES = Groups(
    torch.tensor([10, 11, 20, 21, 22, 30, 40, 41, 12, 23, 31, 32, 42]), torch.tensor([[2, 3, 1, 2], [1, 1, 2, 1]])
)


def test_groups_of_three_share_one_prompt():
    layout = prefix_shared(TRIPLES, PAD)
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 2, 3, 0, 1, 1, 2, 1]]
    assert layout.blocks == (Block(0, 2, (3, 1, 2)), Block(8, 1, (1, 2, 1)))
    assert layout.score_index.tolist() == [1, 2, 3, 1, 1, 6, 8, 8, 10, 8]
    assert layout.last_index.tolist() == [4, 5, 7, 9, 11, 12]
    assert layout.tokens == group_costs(TRIPLES.lengths, "prefix_shared").sum() == 13


def test_groups_of_three_packed_and_padded():
    on_one_row = packed(TRIPLES, PAD)
    assert on_one_row.input_ids.tolist() == [
        [10, 11, 20, 21, 22, 10, 11, 30, 10, 11, 40, 41, 12, 23, 12, 31, 32, 12, 42]
    ]
    assert on_one_row.last_index.tolist() == [4, 7, 11, 13, 16, 18]
    assert on_one_row.tokens == group_costs(TRIPLES.lengths, "packed").sum() == 19
    on_six_rows = padded(TRIPLES, PAD)
    assert on_six_rows.input_ids[2].tolist() == [10, 11, 40, 41, PAD]
    assert on_six_rows.last_index.tolist() == [4, 7, 13, 16, 22, 26]


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_scored_in_groups_of_three(name):
    layout = LAYOUTS[name](TRIPLES, PAD)
    assert layout.targets.tolist() == [20, 21, 22, 30, 40, 41, 23, 31, 32, 42]
    assert layout.sequence_index.tolist() == [0, 0, 0, 1, 2, 2, 3, 4, 4, 5]
    assert layout.completion_position.tolist() == [0, 1, 2, 0, 0, 1, 0, 0, 1, 0]
    assert layout.completion_tokens.tolist() == [[3, 1, 2], [1, 2, 1]]
    assert layout.num_sequences == 6
    # The last token of a completion is a target too, and the position before it predicts it.
    flat = layout.input_ids.flatten()
    assert flat[layout.last_index].tolist() == [22, 30, 41, 23, 32, 42]


# Three prompts that begin with the same ids: 1 ... n, then 50 51, 50 52 53, and nothing more.
def shared_start(n: int) -> tuple[list[int], Groups]:
    start = list(range(1, n + 1))
    ids = [*start, 50, 51, 60, 61, 70, *start, 50, 52, 53, 62, 71, 72, *start, 63, 73]
    return start, Groups(torch.tensor(ids), torch.tensor([[n + 2, 2, 1], [n + 3, 1, 2], [n, 1, 1]]))


def test_a_shared_start_stands_on_the_row_once():
    n = SHARED_START_TOKENS + 1
    start, groups = shared_start(n)
    layout = prefix_shared(groups, PAD)
    # The third prompt keeps its last token, so one less than all of the start is shared.
    assert layout.input_ids.tolist() == [
        [*start, 50, 51, 60, 61, 70, start[-1], 50, 52, 53, 62, 71, 72, start[-1], 63, 73]
    ]
    first = [*range(n + 2), n + 2, n + 3, n + 2]
    second = [n - 1, n, n + 1, n + 2, n + 3, n + 3, n + 4]
    assert layout.position_ids.tolist() == [[*first, *second, n - 1, n, n]]
    assert layout.blocks == (
        Block(0, n + 2, (2, 1)),
        Block(n + 5, 4, (1, 2), n - 1),
        Block(n + 12, 1, (1, 1), n - 1),
    )
    assert layout.input_ids.flatten()[layout.last_index].tolist() == [61, 70, 62, 72, 63, 73]
    assert layout.input_ids.flatten()[layout.score_index].tolist() == [51, 60, 51, 53, 53, 71, start[-1], start[-1]]
    assert layout.targets.tolist() == packed(groups, PAD).targets.tolist()
    assert layout.tokens == group_costs(groups.lengths, "prefix_shared").sum() - 2 * (n - 1)


@pytest.mark.parametrize("groups_kept", [1, 3])
def test_a_start_is_not_shared_where_that_does_not_pay(groups_kept):
    """One group alone, or a start that is too short."""
    _, groups = shared_start(SHARED_START_TOKENS + (1 if groups_kept == 1 else 0))
    part = next(groups.split([groups_kept, 3 - groups_kept]))
    layout = prefix_shared(part, PAD)
    assert layout.input_ids.tolist() == [part.input_ids.tolist()]
    assert all(block.root == 0 for block in layout.blocks)


@pytest.mark.parametrize("name", LAYOUTS)
def test_single_completions(name):
    """Episodes: a prompt and what was sampled, down to one token."""
    episodes = Groups(torch.tensor([10, 11, 20, 12, 21, 22]), torch.tensor([[2, 1], [1, 2]]))
    layout = LAYOUTS[name](episodes, PAD)
    assert layout.targets.tolist() == [20, 21, 22]
    assert layout.sequence_index.tolist() == [0, 1, 1]
    flat = layout.input_ids.flatten()
    assert flat[layout.last_index].tolist() == [20, 22]
    assert flat[layout.score_index].tolist() == [11, 12, 21]
    assert group_costs(episodes.lengths, name).tolist() == [3, 3]


def test_parts_of_groups():
    assert [[part.tolist() for part in group] for group in TRIPLES.parts()] == [
        [[10, 11], [20, 21, 22], [30], [40, 41]],
        [[12], [23], [31, 32], [42]],
    ]


@pytest.mark.parametrize(
    ("costs", "max_tokens", "sizes"),
    [
        ([5, 3, 4, 9, 1], 8, [1, 2, 1, 1]),  # 9 alone exceeds it; four groups are needed, and 5 | 7 beats 8 | 4
        ([4, 4, 4, 1, 1, 1], 6, [1, 1, 1, 3]),
        ([2] * 6, 9, [3, 3]),  # not 4 and 2
        ([4, 4], 8, [2]),  # the bound itself is allowed
        ([5, 3, 4, 9, 1], 13, [3, 2]),
        ([5, 3, 4, 9, 1], 1000, [5]),
        ([5, 3, 4, 9, 1], 1, [1, 1, 1, 1, 1]),
        ([5, 3, 4, 9, 1], None, [5]),
        ([7], 3, [1]),
    ],
)
def test_token_bounded_chunks(costs, max_tokens, sizes):
    assert token_bounded_chunks(costs, max_tokens) == sizes


@pytest.mark.parametrize("seed", range(30))
def test_chunks_keep_the_bound_and_are_as_few_as_can_be(seed):
    draw = random.Random(seed)
    costs = [draw.randint(1, 20) for _ in range(draw.randint(1, 12))]
    bound = draw.randint(1, 60)
    sizes = token_bounded_chunks(costs, bound)
    assert sum(sizes) == len(costs)
    rest = iter(costs)
    groups = [[next(rest) for _ in range(size)] for size in sizes]
    assert all(sum(group) <= bound or len(group) == 1 for group in groups)
    fewest, room = 0, 0
    for cost in costs:  # filling each group in turn needs the fewest
        fewest, room = (fewest, room - cost) if cost <= room else (fewest + 1, bound - cost)
    assert len(groups) == fewest


def test_split_cuts_between_pairs():
    first, second = PAIRS.split([1, 1])
    assert first.input_ids.tolist() == [10, 11, 12, 20, 21, 30]
    assert first.lengths.tolist() == [[3, 2, 1]]
    assert second.input_ids.tolist() == [13, 22, 31, 32, 33]
    assert second.lengths.tolist() == [[1, 1, 3]]
    assert prefix_shared(second, PAD).score_index.tolist() == [0, 0, 2, 3]


def test_unknown_layout_names_the_nearest():
    with pytest.raises(ConfigError, match=r"prefix_share.*Did you mean 'prefix_shared'"):
        layout_function("prefix_share")
    assert layout_function("packed") is packed
