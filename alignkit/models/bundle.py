"""Named roles on one frozen base.

`ModelBundle` is the only place that touches PEFT's active adapter, `requires_grad` and the checkpointing context. A
role is an adapter of the base, the base with all adapters off, or, for the reference alone, a separate model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from alignkit.data.layout import Layout
from alignkit.errors import ModelError
from alignkit.models.attention import ATTENTION_NAME, RowAttention, register_attention
from alignkit.models.lora import keep_unpacked
from alignkit.models.scoring import ScoreRequest, TokenScores, install_scoring

POLICY = "policy"
REFERENCE = "reference"


class ModelBundle:
    """One base and the roles that live on it.

    Args:
        model: the policy, a `PeftModel` or a model that is trained whole.
        adapters: for a `PeftModel`, the adapter that each role wears; `None` means adapters off. By default the policy
            wears the active adapter and the reference wears none.
        reference: a separate reference model; it is frozen and never wrapped.

    Attributes:
        kernels: attention kernels that ran since the bundle was made.

    Raises:
        ModelError: an adapter that the model lacks, or a reference that is the policy itself.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        adapters: Mapping[str, str | None] | None = None,
        reference: PreTrainedModel | PeftModel | None = None,
    ) -> None:
        if reference is model:
            raise ModelError("ref_model is the policy itself; leave it out, or pass another model")
        self.model = model
        self.reference = reference
        self.adapters = dict(adapters or {})
        self.kernels: set[str] = set()
        if isinstance(model, PeftModel):
            active = model.active_adapters[0]
            self.adapters = {POLICY: active, REFERENCE: None, **self.adapters}
            unknown = {name for name in self.adapters.values() if name and name not in model.peft_config}
            if unknown:
                raise ModelError(f"the model has no adapter {sorted(unknown)}; it has {sorted(model.peft_config)}")
        self._worn = self.adapters.get(POLICY)  # the adapter that the base wears now
        self._trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        self._closers: list[Callable[[], None]] = []
        for each in (model, *([reference] if reference is not None else [])):
            keep_unpacked(each)
            self._closers.append(install_scoring(each))
        if reference is not None:
            reference.requires_grad_(False).eval()

    @property
    def base(self) -> PreTrainedModel:
        """The policy's model without PEFT's wrapper."""
        return self._bases()[0]

    @property
    def attention_implementation(self) -> str:
        """The name under which the base finds its attention function."""
        return self.base.config._attn_implementation or "eager"

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the base's activations, which its input embeddings set."""
        embeddings: Any = self.base.get_input_embeddings()
        return embeddings.weight.dtype

    @property
    def can_reference(self) -> bool:
        """Whether reference log-probabilities can be computed now: adapters to switch off, or a separate model."""
        return self.reference is not None or isinstance(self.model, PeftModel)

    @contextlib.contextmanager
    def role(self, name: str) -> Iterator[None]:
        """Let the base wear the adapter of role `name`; what was worn, and what is trainable, comes back afterwards."""
        if not isinstance(self.model, PeftModel):
            if name != POLICY:
                raise ModelError(f"role {name!r} needs adapters or a separate model")
            yield
            return
        with self._wearing(self.adapters[name]):
            yield

    def score(self, layout: Layout, *, wrapped: nn.Module | None = None, **request: Any) -> TokenScores:
        """Score the policy's completion tokens in one forward pass.

        Args:
            layout: the batch.
            wrapped: the module that DDP or FSDP made of the policy; the bare policy by default.
            **request: further fields of `ScoreRequest`.
        """
        return self._call(self.model if wrapped is None else wrapped, layout, request)

    @torch.no_grad()
    def score_reference(self, layout: Layout, *, wrapped: nn.Module | None = None) -> TokenScores:
        """Score the reference's completion tokens: a separate model, or the base without the policy's adapter.

        Raises:
            ModelError: neither exists.
        """
        if self.reference is not None:
            return self._call(self.reference, layout, {})
        with self.role(REFERENCE):
            return self._call(self.model if wrapped is None else wrapped, layout, {})

    def use_row_attention(self) -> None:
        """Route attention of every model through `row_attention`, which packed rows need and other calls ignore."""
        register_attention()
        for model in self._bases():
            model.set_attn_implementation(ATTENTION_NAME)

    def use_own_attention(self, implementation: str) -> None:
        """Give attention back to transformers' `implementation`, for models that cannot run packed rows."""
        for model in self._bases():
            model.set_attn_implementation(implementation)

    def checkpoint_context(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """`context_fn` for activation checkpointing: recompute under the adapter that the forward pass ran under.

        Without it, a block recomputed after a switch sees another adapter, and gradients are lost without an error.
        """
        return contextlib.nullcontext(), self._wearing(self._worn)

    def protect_checkpointing(self, kwargs: Mapping[str, Any] | None) -> None:
        """Turn checkpointing on again with `checkpoint_context`; call it after Trainer turned it on its own way."""
        if not isinstance(self.model, PeftModel) or (kwargs or {}).get("use_reentrant"):
            return
        arguments = dict(kwargs or {})
        options: dict[str, Any] = {k: arguments.pop(k) for k in ("every_n_layers", "offload") if k in arguments}
        arguments |= {"use_reentrant": False, "context_fn": self.checkpoint_context}
        self._bases()[0].activation_checkpointing_enable(arguments, **options)

    def _bases(self) -> list[PreTrainedModel]:
        models: list[Any] = [self.model] if self.reference is None else [self.model, self.reference]
        return [
            cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model for model in models
        ]

    def _call(self, model: nn.Module, layout: Layout, request: Mapping[str, Any]) -> TokenScores:
        try:
            return self._forward(model, layout, ScoreRequest(layout.score_index, layout.targets, **request))
        finally:
            for close in self._closers:
                close()

    def _forward(self, model: nn.Module, layout: Layout, score: ScoreRequest) -> TokenScores:
        inputs = {"input_ids": layout.input_ids, "position_ids": layout.position_ids, "use_cache": False}
        if not layout.blocks:
            return model(**inputs, attention_mask=layout.attention_mask, score=score)
        row = RowAttention(layout.blocks)
        # Any 4-D mask is passed on untouched; without one, transformers would take the jump in the positions for a new
        # document. Nothing reads its content.
        mask = layout.input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool)
        scores = model(**inputs, attention_mask=mask, row=row, score=score)
        self.kernels |= row.kernels
        return scores

    def _wear(self, adapter: str | None) -> None:
        """Switch adapters without changing what is trainable: PEFT freezes every adapter that is not active."""
        model: Any = self.model
        self._worn = adapter
        if adapter is None:
            model.base_model.disable_adapter_layers()
        else:
            model.base_model.enable_adapter_layers()
            model.set_adapter(adapter)
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    @contextlib.contextmanager
    def _wearing(self, adapter: str | None) -> Iterator[None]:
        worn = self._worn
        if worn == adapter:
            yield
            return
        self._wear(adapter)
        try:
            yield
        finally:
            self._wear(worn)
