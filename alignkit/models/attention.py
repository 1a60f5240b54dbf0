"""Attention over packed pairs, through transformers' public attention interface.

Models reach this module under the name `ATTENTION_NAME` once `register_attention()` ran. A forward pass that carries
no `blocks` (generation, a plain call) takes transformers' own SDPA path.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alignkit.data.layout import Block
from alignkit.models import attention_cuda
from alignkit.models.attention_products import Call, call_biases, causal_products

ATTENTION_NAME = "alignkit"


class RowAttention:
    """The attention plan of one packed row, handed to the model as a keyword and read by every layer.

    Args:
        blocks: the row's structure, in order and without gaps.

    Attributes:
        calls: the causal calls that the blocks amount to.
        kernels: names of the kernels that really ran, for logs and tests.
    """

    def __init__(self, blocks: tuple[Block, ...]):
        self.blocks = blocks
        self.calls = tuple(call for block in blocks for call in _calls(block))
        self.kernels: set[str] = set()
        self._tiles = tuple(tile for call in self.calls for tile in call.tiles())
        self._biases: dict[tuple[int | None, torch.dtype], list[Tensor]] = {}
        self._varlen: attention_cuda.VarlenPlan | None = None
        self._flex: dict[int | None, attention_cuda.BlockMask] = {}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attend: q `(Hq, T, D)`, k and v `(Hk, T, D)` in, `(T, Hq, D)` out; the kernel follows device and dtype."""
        if query.device.type != "cuda":
            kernel = "products"
        elif softcap is not None:
            kernel = "flex"
        elif query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= (8, 0):
            kernel = "varlen"
        else:  # Turing, or fp32: SDPA's kernels have no sliding window
            kernel = "sdpa" if window is None else "products"
        self.kernels.add(kernel)
        if kernel == "varlen":
            self._varlen = self._varlen or attention_cuda.varlen_plan(self.calls, query.device)
            return attention_cuda.varlen_attention(query, key, value, self._varlen, scale, window)
        if kernel == "flex":
            if window not in self._flex:
                self._flex[window] = attention_cuda.flex_mask(self.blocks, query.device, window)
            return attention_cuda.flex_rows(query, key, value, self._flex[window], scale, softcap)
        if kernel == "sdpa":
            return attention_cuda.sdpa_attention(query, key, value, self.calls, scale)
        key_of_biases = (window, query.dtype)
        if key_of_biases not in self._biases:
            group = query.shape[0] // key.shape[0]
            self._biases[key_of_biases] = call_biases(self._tiles, group, window, query.dtype, query.device)
        return causal_products(query, key, value, self._tiles, scale, window, softcap, self._biases[key_of_biases])


def _calls(block: Block) -> Iterator[Call]:
    """The first tail goes with its prefix into one plain causal call; each further tail is a call of its own."""
    root = ((0, block.root),) if block.root else ()
    end = block.start + block.prefix + sum(block.tails[:1])
    yield Call((block.start, end), (*root, (block.start, end)))
    for tail in block.tails[1:]:
        yield Call((end, end + tail), (*root, (block.start, block.start + block.prefix), (end, end + tail)))
        end += tail


def keep_soft_caps(model: PreTrainedModel) -> None:
    """Take a model off SDPA where that leaves the soft cap of its attention out, as transformers 5.20 does."""
    text = model.config.get_text_config()
    capped = text.to_dict().get("attn_logit_softcapping") is not None
    if capped and "sdpa" in (model.config._attn_implementation, text._attn_implementation):
        model.set_attn_implementation("eager")


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    row: RowAttention | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention function in transformers' form: `(1, heads, T, D)` in, `(1, T, heads, D)` out.

    Raises:
        ValueError: attention dropout, sinks or position biases, which a packed row would drop in silence.
    """
    if row is None and kwargs.get("softcap") is not None:
        return _capped_attention(query, key, value, attention_mask, scaling, kwargs["softcap"]), None
    if row is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError("attention dropout is not supported on packed rows: set disable_dropout=True")
    unsupported = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if unsupported:
        raise ValueError(f"attention with {unsupported} is not supported on packed rows: set layout='padded'")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast, rotary embeddings leave queries and keys in fp32 beside 16-bit values.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = row(query[0], key[0], value[0], scale, kwargs.get("sliding_window"), kwargs.get("softcap"))
    return out.unsqueeze(0), None


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    """Plain attention with soft-capped scores, which SDPA lacks: padded batches and generation, `(R, heads, T, D)`."""
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh((query @ key.transpose(-1, -2)).float() * scale / softcap)
    if mask is None:  # transformers leaves a purely causal mask out
        n, m = scores.shape[-2:]
        mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
    probs = torch.softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), dim=-1).to(value.dtype)
    return (probs @ value).transpose(1, 2).contiguous()


def register_attention() -> None:
    """Make `ATTENTION_NAME` known to transformers; repeating it does no harm."""
    AttentionInterface.register(ATTENTION_NAME, row_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
