"""How the micro-batches of a run become forward passes: layout, token-bounded chunks, one gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.fsdp import StateDictType

from alignkit.data.collate import pairs_of, split_batch
from alignkit.data.layout import Layout, group_costs, layout_function, padded, token_bounded_chunks
from alignkit.errors import ConfigError
from alignkit.models.bundle import ModelBundle
from alignkit.models.probe import choose_layout
from alignkit.trainers.budget import forward_budget_tokens
from alignkit.trainers.config_engine import EngineConfig
from alignkit.trainers.memory_guard import MemoryGuard

Batch = dict[str, Tensor]


class Passes:
    """The layout of a run's forward passes, chosen on its first batch, and their size.

    Args:
        bundle: what the batches go through.
        args: the run's `layout` and `pad_to_multiple_of`.
        pad_token_id: for the padded layout.
        max_tokens: most tokens of one pass; `None` for whole micro-batches.
        precision: the context that training's forward passes run in.
        wrapped: the module that DDP or FSDP has made of the policy by now.
        accelerator: through which processes agree on the layout.

    Attributes:
        memory: runs passes that may take too much memory, and lowers `max_tokens` where they do.
        latest: lengths of the groups of the latest pass, `(B, 1 + C)`.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        args: EngineConfig,
        pad_token_id: int,
        max_tokens: int | None,
        precision: Callable[[], contextlib.AbstractContextManager],
        wrapped: Callable[[], nn.Module],
        accelerator: Accelerator,
    ) -> None:
        self.bundle, self.args, self.pad_token_id = bundle, args, pad_token_id
        self.max_tokens, self.precision = max_tokens, precision
        self.wrapped, self.accelerator = wrapped, accelerator
        self.layout: str | None = None
        self.latest: Tensor | None = None
        self.memory = MemoryGuard(self)

    def lay_out(self, inputs: Mapping[str, Tensor]) -> Layout:
        """Lay a collated batch out; the first one decides how."""
        groups = pairs_of(inputs)
        self.latest = groups.lengths
        if self.layout is None:
            with self.precision():
                self.layout = choose_layout(
                    self.bundle,
                    groups,
                    self.args.layout,
                    self.pad_token_id,
                    wrapped=self.wrapped(),
                    on_any_process=self._on_any_process,
                )
        multiple: Any = self.args.pad_to_multiple_of  # a number by now, or None
        if self.layout == "padded" and multiple is not None:
            return padded(groups, self.pad_token_id, multiple)
        return layout_function(self.layout)(groups, self.pad_token_id)

    def split(self, inputs: Batch) -> list[Batch]:
        """Cut a collated batch into chunks that one forward pass may hold."""
        if self.max_tokens is None:
            return [inputs]
        layout = self.lay_out(inputs).name  # what a group costs depends on it
        sizes = token_bounded_chunks(group_costs(inputs["lengths"], layout).tolist(), self.max_tokens)
        return [inputs] if len(sizes) == 1 else split_batch(inputs, sizes)

    def _on_any_process(self, value: bool) -> bool:
        count: Any = torch.tensor(int(value), device=self.args.device)
        return bool(self.accelerator.reduce(count, reduction="sum"))


def passes_of(trainer: Any) -> Passes:
    """The passes of a trainer that has a `bundle`, once its own Trainer is made.

    Raises:
        ConfigError: a budget that the devices do not allow, or FSDP that saves weights in shards.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if trainer.is_fsdp_enabled:
        refuse_sharded_saves(accelerator.state.fsdp_plugin.state_dict_type)
    return Passes(
        trainer.bundle,
        args,
        trainer.processing_class.pad_token_id,
        forward_budget_tokens(trainer.bundle.base, args, accelerator.distributed_type),
        trainer.compute_loss_context_manager,
        lambda: trainer.model_wrapped,
        accelerator,
    )


def accumulate(
    step: Callable[[Batch], Tensor],
    chunks: Sequence[Batch],
    model: nn.Module,
    accelerator: Accelerator,
    args: EngineConfig,
) -> Tensor:
    """Sum `step`, a forward and a backward pass, over the chunks of a micro-batch.

    Gradients add up; processes bring theirs together with the last chunk alone.
    """
    loss = torch.zeros((), device=args.device)
    for chunk in chunks:
        syncing = contextlib.nullcontext() if chunk is chunks[-1] else accelerator.no_sync(model)
        with syncing, _offloading(args):
            loss += step(chunk)
    return loss


def _offloading(args: EngineConfig) -> contextlib.AbstractContextManager:
    pin = args.device.type == "cuda"
    return save_on_cpu(pin_memory=pin) if args.activation_offloading else contextlib.nullcontext()


def count_rows(batches: Iterable[Mapping[str, Tensor]], accelerator: Accelerator, device: torch.device) -> Tensor:
    """Rows of an optimizer step's micro-batches, over all processes."""
    rows: Any = torch.tensor(sum(len(batch["lengths"]) for batch in batches), device=device)
    return cast(Tensor, accelerator.reduce(rows, reduction="sum"))


def rows_not_repeated(rows: int, accelerator: Accelerator) -> int:
    """How many of the rows of this process's evaluation batch count.

    Where the last batches of all processes would differ in size, accelerate fills them up with rows that were there
    before; Trainer takes those out of the predictions, and so must whatever else is measured.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return min(max(state.remainder - accelerator.process_index * rows, 0), rows)


def share_of_step(losses: Tensor, rows_in_step: Tensor | None, accelerator: Accelerator) -> Tensor:
    """A chunk's share of the mean loss over an optimizer step's rows, whatever its micro-batches hold.

    Args:
        losses: of the chunk's rows, `(B,)`.
        rows_in_step: over all processes; `None` for the plain mean of `losses`.
        accelerator: DDP and FSDP average gradients over its processes; the mean over the step's rows wants their sum.
    """
    if rows_in_step is None:
        return losses.mean()
    return losses.sum() * accelerator.num_processes / rows_in_step


def accelerator_arguments(arguments: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Switch autocast off for adapters.

    A frozen base already has the compute dtype and adapters are cast by their own layers: autocast would only cast
    again. Its gradient scaler, which fp16 needs, stays.
    """
    if isinstance(model, PeftModel):
        arguments["kwargs_handlers"].append(AutocastKwargs(enabled=False))
    return arguments


def refuse_sharded_saves(state_dict_type: StateDictType) -> None:
    """Refuse FSDP's saves in shards: neither an adapter nor a model lies in what Trainer makes of them.

    torch reads them by unpickling, too, so that a checkpoint could run anything.

    Raises:
        ConfigError: that is how FSDP would save, as accelerate has it do by default.
    """
    if state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ConfigError(
            f"FSDP would save weights as {state_dict_type.name}: shards that nothing but FSDP can load, and no "
            "adapter. Set fsdp_state_dict_type: FULL_STATE_DICT in accelerate's configuration, as "
            "recipes/accelerate/fsdp2.yaml does."
        )


def refuse_data_parallel(args: EngineConfig) -> None:
    """Refuse several GPUs in one process.

    Raises:
        ConfigError: Trainer would use DataParallel.
    """
    if args.n_gpu > 1:
        raise ConfigError(
            "several GPUs are visible to one process, which would mean DataParallel. Start one process per GPU "
            "with `accelerate launch`, or show one GPU with CUDA_VISIBLE_DEVICES."
        )
