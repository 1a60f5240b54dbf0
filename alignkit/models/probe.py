"""Find the layout that a model really supports, by trying it once.

Some models cannot branch a sequence (recurrent or convolutional state, ALiBi, chunked attention), and some ignore
transformers' attention interface without a word. So the first batch is scored both ways, and a layout is used only if
it gives what the padded one gives.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from alignkit.data.layout import LAYOUTS, SHARED_START_TOKENS, Pairs
from alignkit.errors import ConfigError, ModelError
from alignkit.functional.logprobs import Logits
from alignkit.models.attention import ATTENTION_NAME
from alignkit.models.bundle import ModelBundle
from alignkit.models.out_of_memory import is_out_of_memory
from alignkit.models.scoring import logits_of

logger = logging.getLogger(__name__)

# Largest mean difference per token, in nats, that rounding alone explains. In bf16 a 135M model shows 0.03 to 0.06
# between two right layouts, and 0.3 to 1.9 where attention sees too much.
TOLERANCE_NATS = {torch.float64: 1e-6, torch.float32: 5e-4, torch.bfloat16: 0.15, torch.float16: 2e-2}
# Pairs and tokens per sequence of the probe: enough for every layer to see a branch.
PROBE_PAIRS, PROBE_TOKENS = 2, 96

# Layer kinds (config.layer_types) whose state runs along the row, or whose mask is not about positions in a sequence.
_LINEAR_LAYERS = {"linear_attention", "mamba", "conv", "recurrent", "chunked_attention", "hybrid"}
_STATE_FIELDS = ("mamba_d_state", "ssm_state_size", "state_size", "conv_kernel", "linear_conv_kernel_dim", "alibi")


def cannot_pack(config: PreTrainedConfig) -> str | None:
    """Say why an architecture cannot run packed rows, or return `None` if nothing speaks against trying."""
    text = config.get_text_config().to_dict()
    kinds = _LINEAR_LAYERS & set(text.get("layer_types") or ())
    if kinds:
        return f"it has {', '.join(sorted(kinds))} layers"
    for name in _STATE_FIELDS:
        if text.get(name):
            return f"its configuration has {name}={text[name]!r}"
    return None


def _own_process(value: bool) -> bool:
    return value


def choose_layout(
    bundle: ModelBundle,
    pairs: Pairs,
    wanted: str,
    pad_token_id: int,
    *,
    wrapped: nn.Module | None = None,
    on_any_process: Callable[[bool], bool] = _own_process,
) -> str:
    """Return the layout to use and set the model's attention to suit; log one line if it is not the first choice.

    Args:
        bundle: its policy is probed in gradient-free forward passes.
        pairs: real data, on the model's device; a small part of it is used.
        wanted: a layout's name, or `"auto"` for the first of prefix_shared, packed, padded that agrees with padded.
        pad_token_id: for the padded layout.
        wrapped: the module that DDP or FSDP made of the policy.
        on_any_process: whether its argument is true on any process. Processes probe their own pairs, and must agree:
            under FSDP every forward pass is a collective one.

    Raises:
        ModelError: the padded log-probabilities are not those of the model's own logits, or a layout that was asked for
            by name does not work with this model.
        ConfigError: no such layout.
    """
    if wanted != "auto" and wanted not in LAYOUTS:
        raise ConfigError(f"layout={wanted!r} is unknown; choose from {sorted([*LAYOUTS, 'auto'])}")
    probe = _Probe(bundle, _shorten(pairs), pad_token_id, wrapped)
    with _training(bundle, False):  # two passes under dropout never agree
        return _choose(probe, wanted, on_any_process)


class _Probe(NamedTuple):
    bundle: ModelBundle
    pairs: Pairs
    pad_token_id: int
    wrapped: nn.Module | None

    @torch.no_grad()
    def token_logps(self, layout: str) -> Tensor:
        """Score the pairs with policy and, where it is a model of its own, reference."""
        laid_out = LAYOUTS[layout](self.pairs, self.pad_token_id)
        logps = self.bundle.score(laid_out, wrapped=self.wrapped).logps
        if self.bundle.reference is None:
            return logps
        return torch.cat([logps, self.bundle.score_reference(laid_out).logps])  # it may be of another architecture

    def trained_logps(self, layout: str) -> Tensor:
        """The same in training mode, where attention dropout shows, which packed rows refuse."""
        with torch.random.fork_rng(), _training(self.bundle, True):
            return self.token_logps(layout)


def _choose(probe: _Probe, wanted: str, on_any_process: Callable[[bool], bool]) -> str:
    bundle = probe.bundle
    own = bundle.attention_implementations
    device = probe.pairs.input_ids.device.type
    is_mixed = torch.is_autocast_enabled(device)  # a model that is trained whole: fp32 weights, 16-bit products
    tolerance = TOLERANCE_NATS[torch.get_autocast_dtype(device) if is_mixed else bundle.compute_dtype]
    expected = probe.token_logps("padded")
    _check_head(probe, tolerance)
    if wanted == "padded":
        return wanted
    reason = cannot_pack(bundle.base.config)
    if reason is None:
        bundle.use_row_attention()
        if bundle.attention_implementation != ATTENTION_NAME:
            reason = "its attention does not go through transformers' attention interface"
    if reason is None:
        for name in ("prefix_shared", "packed") if wanted == "auto" else (wanted,):
            reason = _disagreement(partial(probe.token_logps, name), expected, tolerance)
            reason = reason or _disagreement(partial(probe.trained_logps, name), None, tolerance)
            if on_any_process(reason is not None):
                reason = reason or "another process found that it does not agree with padded"
            else:
                if wanted == "auto" and name != "prefix_shared":
                    logger.warning("layout: %s, because prefix_shared does not agree with padded on this model", name)
                return name
    bundle.use_own_attention(own)
    architecture = type(bundle.base).__name__
    if wanted != "auto":
        raise ModelError(f"layout={wanted!r} does not work with {architecture}: {reason}. Set layout='auto'.")
    logger.warning("layout: padded, because %s cannot run packed rows: %s", architecture, reason)
    return "padded"


@contextlib.contextmanager
def _training(bundle: ModelBundle, mode: bool) -> Iterator[None]:
    """Put every module of policy and reference in training or evaluation mode for a while."""
    models = [bundle.model] if bundle.reference is None else [bundle.model, bundle.reference]
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.train(mode)
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _shorten(pairs: Pairs) -> Pairs:
    """A few pairs, each part cut so that the probe costs little; branches, several pairs and a shared start remain."""
    kept: list[Tensor] = []
    for prompt, *completions in pairs.parts()[:PROBE_PAIRS]:
        start = kept[0][:SHARED_START_TOKENS] if kept else prompt[:0]
        kept += [torch.cat([start, prompt[-PROBE_TOKENS:]]), *(ids[:PROBE_TOKENS] for ids in completions)]
    return Pairs(torch.cat(kept), torch.tensor([part.numel() for part in kept]).view(-1, pairs.lengths.shape[1]))


def _disagreement(score: Callable[[], Tensor], expected: Tensor | None, tolerance_nats: float) -> str | None:
    """Say how `score()` fails, or how its result departs from `expected` where that is known."""
    try:
        found = score()
    except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        if is_out_of_memory(error):  # which says nothing about the layout
            raise
        return f"the forward pass fails ({str(error).splitlines()[0]})"
    if expected is None:
        return None
    difference = (found - expected).abs().mean().item()
    return None if difference <= tolerance_nats else f"log-probs differ by {difference:.3g} nats per token"


@torch.no_grad()
def _check_head(probe: _Probe, tolerance_nats: float) -> None:
    """Compare with the model's own logits on the first pair: an unknown scaling of logits would show here.

    Both passes see the same rows, so that hidden states are equal to the bit and rounding is left out.
    """
    bundle = probe.bundle
    first = next(probe.pairs.split([1, len(probe.pairs.lengths) - 1]))
    layout = LAYOUTS["padded"](first, probe.pad_token_id)
    model = bundle.model if probe.wrapped is None else probe.wrapped
    scored = bundle.score(layout, wrapped=probe.wrapped).logps
    inputs = {"attention_mask": layout.attention_mask, "position_ids": layout.position_ids, "use_cache": False}
    logits = model(input_ids=layout.input_ids, **inputs).logits.flatten(0, 1)[layout.score_index].float()
    own = torch.log_softmax(logits, -1).gather(-1, layout.targets[:, None]).squeeze(-1)
    difference = (own - scored).abs().mean().item()
    if difference > tolerance_nats:
        known: Logits = logits_of(bundle.base.config)
        raise ModelError(
            f"{type(bundle.base).__name__} turns hidden states into logits in a way that is not known here: "
            f"log-probs differ by {difference:.3g} nats per token from its own logits (assumed {known})."
        )
