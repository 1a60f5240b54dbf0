"""Attention over packed rows: every kernel against plain attention under a mask written position by position."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, Gemma3Config, Gemma3ForConditionalGeneration

from alignkit.data.layout import Block
from alignkit.models import attention_cuda
from alignkit.models.attention import (
    ATTENTION_NAME,
    RowAttention,
    keep_soft_caps,
    register_attention,
    row_attention,
)
from alignkit.models.attention_products import causal_products
from tests.model_factory import tiny_config

CPU = torch.device("cpu")
ROWS = {
    "plain": (Block(0, 5, ()),),
    "one tail": (Block(0, 3, (4,)), Block(7, 1, (1,))),
    "pairs": (Block(0, 4, (3, 5)), Block(12, 1, (1, 2)), Block(16, 6, (1, 1))),
    "three tails": (Block(0, 2, (3, 1, 4)), Block(10, 3, ()), Block(13, 1, (2, 2, 2))),
    "root": (Block(0, 4, (2, 1)), Block(7, 2, (3, 2), 3), Block(14, 1, (), 3), Block(15, 1, (1, 1, 2), 2)),
}
WINDOWS = (None, 3, 1)
CAPS = (None, 2.0)
SCALE = 0.7


def tokens_of(blocks: tuple[Block, ...]) -> int:
    return sum(block.prefix + sum(block.tails) for block in blocks)


def dense_mask(blocks: tuple[Block, ...], window: int | None) -> Tensor:
    """True where query position `i` of the row may see key position `j`: the definition, one entry at a time."""
    places = []  # (block, tail or None for the prefix, position in its sequence) of every position on the row
    for number, block in enumerate(blocks):
        begin = block.root + block.prefix
        places += [(number, None, position) for position in range(block.root, begin)]
        for tail, length in enumerate(block.tails):
            places += [(number, tail, begin + position) for position in range(length)]
    mask = torch.zeros(len(places), len(places), dtype=torch.bool)
    for i, (block, tail, position) in enumerate(places):
        for j, (other_block, other_tail, other_position) in enumerate(places):
            related = (block == other_block and other_tail in (None, tail)) or j < blocks[block].root
            distance = position - other_position
            mask[i, j] = related and distance >= 0 and (window is None or distance < window)
    return mask


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Softmax attention as textbooks have it, `(T, Hq, D)`."""
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = query @ key.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    probs = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
    return (probs @ value).transpose(0, 1)


def operands(tokens: int, heads: int = 4, kv_heads: int = 2, size: int = 3, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(count, tokens, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


def with_gradients(function, tensors: list[Tensor]) -> list[Tensor]:
    out = function(*tensors)
    direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), tensors)]


def assert_all_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def test_dense_mask_by_hand():
    """`[p p | a | b b]`, window 2: the definition that everything below relies on."""
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert dense_mask((Block(0, 2, (1, 2)),), None).int().tolist() == expected
    expected[2][0] = expected[3][0] = expected[4][0] = expected[4][1] = 0
    assert dense_mask((Block(0, 2, (1, 2)),), 2).int().tolist() == expected


def test_dense_mask_of_a_shared_start_by_hand():
    """`[r p | a] [q | b]`, where q continues r: both sequences begin with it."""
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 0, 0, 1, 1],
    ]
    blocks = (Block(0, 2, (1,)), Block(3, 1, (1,), 1))
    assert dense_mask(blocks, None).int().tolist() == expected
    expected[2][0] = expected[4][0] = 0
    assert dense_mask(blocks, 2).int().tolist() == expected


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("row", ROWS)
def test_products_equal_plain_attention(row, window, softcap):
    blocks = ROWS[row]
    mask, calls = dense_mask(blocks, window), RowAttention(blocks).calls
    for heads, kv_heads in ((4, 2), (4, 4), (3, 1)):
        tensors = operands(tokens_of(blocks), heads, kv_heads)
        expected = with_gradients(lambda q, k, v: plain_attention(q, k, v, mask, SCALE, softcap), tensors)
        found = with_gradients(lambda q, k, v: causal_products(q, k, v, calls, SCALE, window, softcap), tensors)
        assert found[0].shape == (tokens_of(blocks), heads, 3)
        assert_all_close(found, expected, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("window", [None, 8])
def test_products_in_lower_precision(dtype, tolerance, window, softcap):
    """Longer rows than above, several equal in length, in the dtypes of training."""
    blocks = (Block(0, 30, (20, 17)), Block(67, 20, (20, 17), 10), Block(124, 5, (40, 1)))
    calls, mask = RowAttention(blocks).calls, dense_mask(blocks, window)
    tensors = operands(tokens_of(blocks), size=16, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    scale = 0.25
    expected = with_gradients(lambda q, k, v: plain_attention(q, k, v, mask, scale, softcap), exact)
    found = with_gradients(lambda q, k, v: causal_products(q, k, v, calls, scale, window, softcap), tensors)
    assert all(tensor.dtype == dtype for tensor in found)
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() / other.norm() < tolerance


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (2, 1.5)])
def test_products_gradcheck(window, softcap):
    blocks = (Block(0, 2, (1, 2)), Block(5, 1, (1, 1, 1), 1))
    calls = RowAttention(blocks).calls
    tensors = operands(tokens_of(blocks), heads=2, kv_heads=1, size=2)
    assert torch.autograd.gradcheck(lambda q, k, v: causal_products(q, k, v, calls, SCALE, window, softcap), tensors)


def test_products_take_transposed_projections():
    """Models hand over views `(heads, T, D)` of `(T, heads, D)`; values may be wider than keys."""
    blocks = ROWS["pairs"]
    tokens = tokens_of(blocks)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(tokens, heads, size, generator=generator, dtype=torch.float64).transpose(0, 1).requires_grad_()
        for heads, size in ((4, 3), (2, 3), (2, 5))
    )
    calls, mask = RowAttention(blocks).calls, dense_mask(blocks, None)
    expected = with_gradients(lambda *t: plain_attention(*t, mask, SCALE, None), [query, key, value])
    found = with_gradients(lambda *t: causal_products(*t, calls, SCALE), [query, key, value])
    assert found[0].shape == (tokens, 4, 5)
    assert_all_close(found, expected, 1e-10)


@pytest.mark.parametrize("row", ROWS)
def test_calls_cover_the_row_in_order(row):
    """What every kernel assumes: query ranges end to end, each call's last query is its last key."""
    calls = RowAttention(ROWS[row]).calls
    ends = [0]
    for (begin, end), keys in calls:
        assert begin == ends[-1]
        assert keys[-1][1] == end
        ends.append(end)
    assert ends[-1] == tokens_of(ROWS[row])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("row", ROWS)
def test_varlen_plan(row, window):
    """Carry the plan out in plain tensors, by flash attention's documented rules, and compare."""
    blocks = ROWS[row]
    query, key, value = operands(tokens_of(blocks))
    plan = attention_cuda.varlen_plan(RowAttention(blocks).calls, CPU)
    queries, keys = plan.query_offsets.tolist(), plan.key_offsets.tolist()
    assert plan.query_offsets.dtype == plan.key_offsets.dtype == torch.int32
    assert queries[0] == keys[0] == 0
    assert queries[-1] == tokens_of(blocks)
    assert keys[-1] == len(plan.key_index)
    assert plan.max_queries == max(b - a for a, b in itertools.pairwise(queries))
    assert plan.max_keys == max(b - a for a, b in itertools.pairwise(keys))
    left = -1 if window is None else window - 1  # flash attention's window: keys to the left that are still seen
    parts = []
    for call in range(len(queries) - 1):
        q = query[:, queries[call] : queries[call + 1]]
        index = plan.key_index[keys[call] : keys[call + 1]]
        n, m = q.shape[1], len(index)
        place = torch.arange(m - n, m)[:, None] - torch.arange(m)[None]
        seen = (place >= 0) & ((place <= left) if left >= 0 else True)
        parts.append(plain_attention(q, key[:, index], value[:, index], seen, SCALE, None))
    expected = plain_attention(query, key, value, dense_mask(blocks, window), SCALE, None)
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-10, atol=1e-10)


def test_varlen_plan_by_hand():
    plan = attention_cuda.varlen_plan(RowAttention((Block(0, 2, (1, 2)), Block(5, 1, (1, 1)))).calls, CPU)
    assert plan.key_index.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 5, 7]
    assert plan.query_offsets.tolist() == [0, 3, 5, 7, 8]
    assert plan.key_offsets.tolist() == [0, 3, 7, 9, 11]
    assert (plan.max_queries, plan.max_keys) == (3, 4)


def test_varlen_plan_of_a_shared_start_by_hand():
    plan = attention_cuda.varlen_plan(RowAttention((Block(0, 2, (1,)), Block(3, 1, (1, 2), 2))).calls, CPU)
    assert plan.key_index.tolist() == [0, 1, 2, 0, 1, 3, 4, 0, 1, 3, 5, 6]
    assert plan.query_offsets.tolist() == [0, 3, 5, 7]
    assert plan.key_offsets.tolist() == [0, 3, 7, 12]
    assert (plan.max_queries, plan.max_keys) == (3, 5)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("row", ROWS)
def test_flex_mask_mod_is_the_dense_mask(row, window):
    blocks = ROWS[row]
    mask = attention_cuda.row_index(blocks, CPU).visible(window)
    positions = torch.arange(tokens_of(blocks))
    zero = torch.tensor(0)
    assert torch.equal(mask(zero, zero, positions[:, None], positions[None]), dense_mask(blocks, window))


@pytest.mark.parametrize("row", ROWS)
def test_sdpa_equals_plain_attention(row):
    blocks = ROWS[row]
    calls, mask = RowAttention(blocks).calls, dense_mask(blocks, None)
    tensors = operands(tokens_of(blocks))
    expected = with_gradients(lambda q, k, v: plain_attention(q, k, v, mask, SCALE, None), tensors)
    found = with_gradients(lambda q, k, v: attention_cuda.sdpa_attention(q, k, v, calls, SCALE), tensors)
    assert_all_close(found, expected, 1e-10)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("window", WINDOWS)
def test_flex_forward_equals_plain_attention(window, softcap):
    blocks = ROWS["root"]
    # Flex attention has no backward pass on a CPU and refuses tensors that want one.
    query, key, value = (t.detach() for t in operands(tokens_of(blocks), size=16, dtype=torch.float32))
    mask = attention_cuda.flex_mask(blocks, CPU, window)
    with torch.no_grad():
        found = attention_cuda.flex_rows(query, key, value, mask, SCALE, softcap)
        expected = plain_attention(query, key, value, dense_mask(blocks, window), SCALE, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 2.0)])
def test_row_attention_names_its_kernel(window, softcap):
    row = RowAttention(ROWS["pairs"])
    assert row.kernels == set()
    query, key, value = operands(tokens_of(ROWS["pairs"]))
    found = row(query, key, value, SCALE, window, softcap)
    assert row.kernels == {"products"}
    expected = plain_attention(query, key, value, dense_mask(ROWS["pairs"], window), SCALE, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


class Layer(torch.nn.Module):
    """What transformers' attention functions read from the layer that calls them."""

    is_causal = True
    num_key_value_groups = 2


def test_interface_takes_the_default_scale_and_the_window_from_the_model():
    row = RowAttention(ROWS["pairs"])
    query, key, value = (tensor[None] for tensor in operands(tokens_of(ROWS["pairs"])))
    out, weights = row_attention(Layer(), query, key, value, None, row=row, sliding_window=3)
    assert weights is None
    expected = plain_attention(query[0], key[0], value[0], dense_mask(ROWS["pairs"], 3), 3**-0.5, None)
    torch.testing.assert_close(out[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dropout": 0.1}, "attention dropout is not supported on packed rows: set disable_dropout=True"),
        ({"s_aux": torch.zeros(4)}, r"attention with \['s_aux'\] is not supported on packed rows"),
        ({"position_bias": torch.zeros(4)}, r"attention with \['position_bias'\] is not supported"),
    ],
)
def test_what_a_packed_row_would_drop_is_refused(keywords, message):
    query, key, value = (tensor[None] for tensor in operands(5))
    with pytest.raises(ValueError, match=message):
        row_attention(Layer(), query, key, value, None, row=RowAttention(ROWS["plain"]), **keywords)


@pytest.mark.parametrize("with_mask", [True, False])
def test_capped_attention_of_plain_calls(with_mask):
    """Padded batches and generation of Gemma 2: queries may be fewer than keys."""
    query, key, value = (tensor[None] for tensor in operands(5))
    query = query[:, :, 3:]
    causal = torch.ones(2, 5, dtype=torch.bool).tril(3)
    mask = causal[None, None] if with_mask else None
    out, _ = row_attention(Layer(), query, key, value, mask, scaling=SCALE, softcap=2.0)
    expected = plain_attention(query[0], key[0], value[0], causal, SCALE, 2.0)
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_registering_twice_does_no_harm():
    register_attention()
    register_attention()
    assert AttentionInterface()[ATTENTION_NAME] is row_attention


@pytest.mark.parametrize("attention", ["sdpa", {"": "eager", "text_config": "sdpa"}, {"": "sdpa"}])
def test_a_text_model_within_another_leaves_sdpa_if_its_scores_are_capped(attention):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tiny_config("gemma3_text", attn_logit_softcapping=2.0).to_dict()
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28}))
    model.set_attn_implementation(attention)
    assert model.config.text_config._attn_implementation == "sdpa"
    keep_soft_caps(model)
    assert model.config.text_config._attn_implementation == "eager"
