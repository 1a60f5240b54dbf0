"""Named roles on one frozen base.

`ModelBundle` is the only place that touches PEFT's active adapter, `requires_grad` and the checkpointing context. A
role is an adapter of the base, the base with all adapters off, or, for the reference alone, a separate model; it may
have a scalar head, for a reward or a value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.data.layout import Layout
from alignkit.errors import ModelError
from alignkit.models.attention import ATTENTION_NAME, RowAttention, keep_soft_caps, register_attention
from alignkit.models.heads import SCORE, has_head
from alignkit.models.lora import FUSED_LORA, keep_unpacked
from alignkit.models.reward_adapter import add_reward_adapter
from alignkit.models.scoring import ScoreRequest, TokenScores, install_scoring

POLICY = "policy"
REFERENCE = "reference"
REWARD = "reward"


def enable_checkpointing(model: PreTrainedModel, kwargs: dict[str, Any], **options: Any) -> None:
    """Turn activation checkpointing on, by the name that this release of transformers has for it.

    Args:
        model: where.
        kwargs: of `torch.utils.checkpoint.checkpoint`.
        **options: further ones of transformers, such as `every_n_layers`.
    """
    if Version(transformers.__version__) >= Version("5.23"):
        model.activation_checkpointing_enable(kwargs, **options)
    else:
        model.gradient_checkpointing_enable(kwargs, **options)


class ModelBundle:
    """One base and the roles that live on it.

    Args:
        model: the policy, a `PeftModel` or a model that is trained whole.
        adapters: for a `PeftModel`, the adapter that each role wears; `None` means adapters off. By default the policy
            wears the active adapter and the reference wears none. On a model that is trained whole, roles besides the
            policy wear `None`.
        heads: the scalar head that a role reads, by its name on the base.
        reference: a separate reference model; it is frozen and never wrapped.

    Attributes:
        kernels: attention kernels that ran since the bundle was made.

    Raises:
        ModelError: an adapter or a head that the model lacks, or a reference that is the policy itself.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        adapters: Mapping[str, str | None] | None = None,
        heads: Mapping[str, str] | None = None,
        reference: PreTrainedModel | PeftModel | None = None,
    ) -> None:
        if reference is model:
            raise ModelError("ref_model is the policy itself; leave it out, or pass another model")
        self.model = model
        self.reference = reference
        self.adapters: dict[str, str | None] = {POLICY: None, **(adapters or {})}
        self.heads = dict(heads or {})
        self.kernels: set[str] = set()
        if isinstance(model, PeftModel):
            active = model.active_adapters[0]
            self.adapters = {POLICY: active, REFERENCE: None, **(adapters or {})}
        available = sorted(model.peft_config) if isinstance(model, PeftModel) else []
        unknown = {name for name in self.adapters.values() if name and name not in available}
        if unknown:
            raise ModelError(f"the model has no adapter {sorted(unknown)}; it has {available}")
        missing = {name for name in self.heads.values() if not has_head(self.base, name)}
        if missing:
            raise ModelError(f"the model has no head {sorted(missing)}; add it before the bundle is made")
        self._worn = self.adapters.get(POLICY)  # the adapter that the base wears now
        self._trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        self._closers: list[Callable[[], None]] = []
        for each in (model, *([reference] if reference is not None else [])):
            keep_unpacked(each)
            self._closers.append(install_scoring(each))
        for base in self._bases():
            keep_soft_caps(base)
        if reference is not None:
            reference.requires_grad_(False).eval()

    @property
    def base(self) -> PreTrainedModel:
        """The policy's model without PEFT's wrapper."""
        return self._bases()[0]

    @property
    def attention_implementation(self) -> str:
        """The name under which the base finds its attention function."""
        return self.attention_implementations[0]

    @property
    def attention_implementations(self) -> tuple[str, ...]:
        """The same of the base and, where it is a model of its own, of the reference."""
        return tuple(model.config._attn_implementation or "eager" for model in self._bases())

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
        if name not in self.adapters:
            raise ModelError(f"role {name!r} needs adapters or a separate model")
        with self._wearing(self.adapters[name]):
            yield

    def score(self, layout: Layout, *, wrapped: nn.Module | None = None, **request: Any) -> TokenScores:
        """Score the policy's completion tokens in one forward pass.

        Args:
            layout: the batch.
            wrapped: the module that DDP or FSDP made of the policy; the bare policy by default.
            **request: further fields of `ScoreRequest`, such as heads to read in the same pass.
        """
        return self._call(self.model if wrapped is None else wrapped, layout, request)

    def values(self, layout: Layout, index: Tensor, *, role: str = POLICY, wrapped: nn.Module | None = None) -> Tensor:
        """Read the scalar head of `role` in one forward pass that computes no logits.

        Args:
            layout: the batch.
            index: positions in the flattened `(R · T)` to read at, `(V,)`; for rewards `layout.last_index`.
            role: whose adapter and head.
            wrapped: the module that DDP or FSDP made of the policy; the bare policy by default.

        Returns:
            `(V, K)`, fp32, with gradient to the head and to the adapter below it.

        Raises:
            ModelError: the role has no head.
        """
        if role not in self.heads:
            raise ModelError(f"role {role!r} has no scalar head; roles with one: {sorted(self.heads)}")
        head, none = self.heads[role], layout.targets[:0]
        request = {"index": none, "targets": none, "heads": (head,), "head_index": index}
        with self.role(role):
            return self._call(self.model if wrapped is None else wrapped, layout, request).values[head]

    def add_reward_adapter(self, path: str | Path, *, role: str = REWARD) -> int:
        """Give `role` a reward adapter that `RewardTrainer` saved: frozen, on the base that everybody shares.

        Args:
            path: the folder, or a name on the Hub.
            role: the name of the role, and of the adapter.

        Returns:
            The number of heads: rewards have the shape `(V, heads)`.

        Raises:
            ModelError: no reward adapter, one of another base, or a policy without adapters, which would change the
                reward's base while it trains.
        """
        if not isinstance(self.model, PeftModel):
            raise ModelError("a model that is trained whole cannot share its weights with a reward adapter: use LoRA")
        known = set(self.model.parameters())
        outputs = add_reward_adapter(self.model, path, role, custom_modules=FUSED_LORA)
        self._frozen += [parameter for parameter in self.model.parameters() if parameter not in known]
        self.adapters[role], self.heads[role] = role, SCORE
        self._wear(self._worn)
        return outputs

    @torch.no_grad()
    def score_reference(self, layout: Layout, *, wrapped: nn.Module | None = None, **request: Any) -> TokenScores:
        """Score the reference's completion tokens: a separate model, or the base without the policy's adapter.

        Arguments are those of `score`.

        Raises:
            ModelError: neither exists.
        """
        if self.reference is not None:
            return self._call(self.reference, layout, request)
        with self.role(REFERENCE):
            return self._call(self.model if wrapped is None else wrapped, layout, request)

    def use_row_attention(self) -> None:
        """Route attention of every model through `row_attention`, which packed rows need and other calls ignore."""
        register_attention()
        for model in self._bases():
            model.set_attn_implementation(ATTENTION_NAME)

    def use_own_attention(self, implementations: Sequence[str]) -> None:
        """Give attention back to transformers, for models that cannot run packed rows.

        Args:
            implementations: the earlier `attention_implementations`.
        """
        for model, implementation in zip(self._bases(), implementations, strict=True):
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
        enable_checkpointing(self._bases()[0], arguments, **options)

    def _bases(self) -> list[PreTrainedModel]:
        models: list[Any] = [self.model] if self.reference is None else [self.model, self.reference]
        return [
            cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model for model in models
        ]

    def _call(self, model: nn.Module, layout: Layout, request: Mapping[str, Any]) -> TokenScores:
        try:
            fields = {"index": layout.score_index, "targets": layout.targets, **request}
            return self._forward(model, layout, ScoreRequest(**fields))
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
