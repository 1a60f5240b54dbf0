"""Token log-probabilities and scalar heads out of a causal language model's own forward pass, without its logits.

`install_scoring(model)` adds forward hooks, PyTorch's public way in. A call that carries `score=ScoreRequest(...)`
then returns `TokenScores` instead of logits: the output layer's input is caught on its way, the layer itself is given
nothing to do, and log-probabilities and scalars are taken at the requested positions alone. All of it happens inside
`model(...)`, where DDP and FSDP expect everything that is trained. Any other call is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from alignkit.errors import ModelError
from alignkit.functional.logprobs import (
    Logits,
    TokenStatistics,
    frozen_head_logps,
    frozen_head_logps_entropy,
    log_sum_square_probs,
    recomputed_head_logps,
    recomputed_head_logps_entropy,
    token_statistics,
)
from alignkit.models.lora import dense_weight

Scored = TypeVar("Scored")

# Diagnostics of a forward pass are taken on at most this many completion tokens, evenly spaced.
STATISTICS_TOKENS = 128


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What to score in one forward pass.

    Attributes:
        index: positions in the flattened `(R · T)` batch whose hidden state predicts a target, `(S,)`. With none of
            them the model's output layer never runs.
        targets: token ids, `(S,)`.
        statistics: positions within `index` to take diagnostics at, `(M,)`; `None` for no diagnostics.
        square_sums: also return `log Σ p²` per target, for WPO's weights.
        temperature: of the distribution that the targets were drawn from.
        entropies: also return the entropy of that distribution per target, with gradient.
        heads: names of scalar heads (`alignkit.models.heads`) to read.
        head_index: positions in the flattened `(R · T)` batch to read them at, `(V,)`; `None` for none.
    """

    index: Tensor
    targets: Tensor
    statistics: Tensor | None = None
    square_sums: bool = False
    temperature: float = 1.0
    entropies: bool = False
    heads: tuple[str, ...] = ()
    head_index: Tensor | None = None


@dataclass(slots=True)
class TokenScores:
    """What was asked for.

    Attributes:
        logps: log-probability of each target, `(S,)`, with gradient.
        statistics: diagnostics, `(M,)` each.
        square_sums: `log Σ p²`, `(S,)`.
        entropies: in nats, `(S,)`, with gradient.
        values: by head, its scalars at each position, fp32 `(V, K)`, with gradient.
    """

    logps: Tensor
    statistics: TokenStatistics | None = None
    square_sums: Tensor | None = None
    entropies: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)


def logits_of(config: PreTrainedConfig) -> Logits:
    """Read how an architecture scales and caps its logits from its configuration."""
    values = config.get_text_config().to_dict()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if values.get(name) is not None:
            scale = float(values[name])
    if values.get("logits_scaling") is not None:
        factor = float(values["logits_scaling"])
        scale = factor if values["model_type"] == "hyperclovax" else 1 / factor
    return Logits(scale, values.get("final_logit_softcapping"))


class _Scoring:
    """The hooks' shared state: the open request and the hidden states that the output layer was about to be given."""

    def __init__(self, base: PreTrainedModel, head: Any, logits: Logits):
        self.base, self.head, self.logits = base, head, logits
        self.request: ScoreRequest | None = None
        self.hidden: Tensor | None = None

    def open(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.request, self.hidden = kwargs.pop("score", None), None
        return args, kwargs

    def close(self) -> None:
        """Forget the request, also after an interrupt: `generate` never passes `open`, and would be diverted."""
        self.request = self.hidden = None

    def divert(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.request is None:
            return None
        self.hidden = args[0]  # (R, T, H)
        return (args[0][:, :0],)

    def score(self, module: nn.Module, args: tuple, output: Any) -> Any:
        request, hidden = self.request, self.hidden
        if request is None:
            return None
        self.close()
        if hidden is None:
            raise ModelError(f"{type(module).__name__} never called its output head, so nothing can be scored")
        flat = hidden.reshape(-1, hidden.shape[-1])  # (R · T, H)
        scores = self._token_scores(flat, request)
        if request.head_index is not None:
            at_heads = flat[request.head_index]  # (V, H)
            scores.values = {name: self.base.get_submodule(name)(at_heads) for name in request.heads}
        return scores

    def _token_scores(self, flat: Tensor, request: ScoreRequest) -> TokenScores:
        if not request.targets.numel():
            return TokenScores(flat.new_zeros(0, dtype=torch.promote_types(flat.dtype, torch.float32)))
        rows = flat[request.index]  # (S, H)
        logits = self.logits._replace(temperature=request.temperature)
        if request.entropies:
            both = self._scored(rows, request.targets, logits, frozen_head_logps_entropy, recomputed_head_logps_entropy)
            scores = TokenScores(both.logps, entropies=both.entropy)
        else:
            scores = TokenScores(self._scored(rows, request.targets, logits, frozen_head_logps, recomputed_head_logps))
        if request.statistics is not None:
            few = request.statistics
            scores.statistics = token_statistics(rows[few], self._project, request.targets[few], logits)
        if request.square_sums:
            scores.square_sums = log_sum_square_probs(rows, self._project, logits)
        return scores

    def _scored(
        self,
        rows: Tensor,
        targets: Tensor,
        logits: Logits,
        frozen: Callable[..., Scored],
        recomputed: Callable[..., Scored],
    ) -> Scored:
        """Score with the function for heads that stay as they are, or the one for heads that are trained or adapted."""
        is_adapted = isinstance(self.head, BaseTunerLayer | AuxiliaryTrainingWrapper)  # also if frozen or off
        if is_adapted or any(parameter.requires_grad for parameter in self.head.parameters()):
            return recomputed(rows, self._project, targets, logits)
        return frozen(rows, dense_weight(self.head), self.head.bias, targets, logits)

    def _project(self, rows: Tensor) -> Tensor:
        """The head on `(n, H)` rows, called without hooks so that it does not divert itself."""
        return self.head.forward(rows)


def install_scoring(model: PreTrainedModel | PeftModel) -> Callable[[], None]:
    """Let `model(..., score=ScoreRequest(...))` return `TokenScores`; `model` is a causal LM or a PeftModel of one.

    Returns:
        A function to call when a scoring call has ended, however it ended.

    Raises:
        ModelError: the model has no output head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output head; a causal language model is needed")
    base = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
    scoring = _Scoring(base, head, logits_of(model.config))
    model.register_forward_pre_hook(scoring.open, with_kwargs=True)
    head.register_forward_pre_hook(scoring.divert)
    model.register_forward_hook(scoring.score)
    return scoring.close


def even_sample(count: int, at_most: int, device: torch.device) -> Tensor:
    """Return at most `at_most` indices spread evenly over `range(count)`."""
    stride = max(1, -(-count // at_most))
    return torch.arange(0, count, stride, device=device)
