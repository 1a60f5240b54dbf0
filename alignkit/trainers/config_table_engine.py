"""What each option that all trainers share with TRL's means here: as in TRL, different, or refused.

A trainer's own table adds its own options. Together they name every field, so a release of transformers or TRL that
adds an option makes a test fail until somebody has decided what it means. The refusals are also what the validation
reads: an option cannot be refused in the documentation and accepted in the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from alignkit.trainers.config_rules import Refusal


@dataclass(frozen=True, slots=True)
class Table:
    """Every option of a configuration, by how it compares with TRL's of the same name.

    Attributes:
        as_trl: means what it means in TRL.
        differences: field, and how it differs.
        refused: field, and which values are accepted, and why no others.
        own: fields that TRL does not have.
    """

    as_trl: frozenset[str]
    differences: Mapping[str, str]
    refused: Mapping[str, Refusal]
    own: tuple[str, ...]

    def describe(self, field: str) -> str:
        """Say in one line how `field` behaves here: `"as TRL"`, how it differs, or why it is refused.

        Raises:
            KeyError: if the option is in none of the tables.
        """
        if field in self.as_trl:
            return "as TRL"
        if field in self.refused:
            accepted = " or ".join(repr(value) for value in self.refused[field].accepted)
            return f"only {accepted}: {self.refused[field].reason}"
        return self.differences[field]


ENGINE_REFUSED: dict[str, Refusal] = {
    "pad_token": Refusal((None,), "set `tokenizer.pad_token` and pass the tokenizer as `processing_class`"),
    "use_liger_kernel": Refusal(
        (False,), "it replaces the forward pass that alignkit already runs without full logits; leave it False"
    ),
    "liger_kernel_config": Refusal((None,), "Liger kernels are not used, so their configuration is never read"),
    "auto_find_batch_size": Refusal(
        (False,), "memory is bounded by `max_tokens_per_forward`, which leaves the batch, and so the result, unchanged"
    ),
    "neftune_noise_alpha": Refusal(
        (None,), "its noise depends on the padded length and would reach the base that all roles share; leave it None"
    ),
    "label_smoothing_factor": Refusal(
        (0.0,), "it smooths the cross-entropy over tokens, which is not computed; `label_smoothing` smooths preferences"
    ),
    "label_names": Refusal((None,), "batches hold preference pairs, not label tensors; leave it None"),
    "train_sampling_strategy": Refusal(
        ("random", "sequential"),
        "a pair has no single length to group by, and grouping saves nothing where no token is padding; use 'random' "
        "or 'sequential'",
    ),
    "length_column_name": Refusal(("length",), "rows are not grouped by length, so the column is never read"),
    "use_cache": Refusal((False,), "a key/value cache serves generation; training would fill it for nothing"),
    "bf16_full_eval": Refusal((False,), "it rounds the adapters in place; they are kept in fp32, always"),
    "fp16_full_eval": Refusal((False,), "it rounds the adapters in place; they are kept in fp32, always"),
    "average_tokens_across_devices": Refusal(
        (True,), "the loss is a mean over pairs, not over tokens, on any number of devices; leave it True"
    ),
    "parallelism_config": Refusal(
        (None,), "tensor, context and sequence parallelism split a pair across devices; use DDP, FSDP or DeepSpeed"
    ),
}

ENGINE_DIFFERENCES: dict[str, str] = {
    "bf16": "None follows the device: bf16 where it is native, fp16 on CUDA without it, else off (TRL: always on)",
    "fp16": "switched on by `bf16=None` on a CUDA device without native bf16; an explicit value is kept",
    "use_cpu": "switched on where there is no accelerator (TRL: bf16 is an error there until it is set)",
    "logging_nan_inf_filter": "False: a loss that is not a number is never logged as 0",
    "pad_to_multiple_of": "a number needs `layout='padded'`; 'auto' is None, as it is in TRL outside Neuron",
    "gradient_checkpointing": "the same as `activation_checkpointing`, accepted without a warning",
    "gradient_checkpointing_kwargs": "the same as `activation_checkpointing_kwargs`, accepted without a warning",
    "activation_checkpointing_kwargs": "an error without `activation_checkpointing`",
    "resume_from_checkpoint": "`train()` reads it when called without an argument",
    "eval_steps": "an error unless `eval_strategy='steps'`",
    "eval_delay": "an error without an `eval_strategy`",
    "logging_steps": "10, as in TRL; an error if neither logging nor evaluation counts steps",
    "save_steps": "an error unless `save_strategy='steps'`",
    "save_total_limit": "an error if nothing is saved",
    "optim_args": "an error with an optimizer that does not read it",
    "optim_target_modules": "an error without a GaLore or APOLLO optimizer",
    "push_to_hub": "publishes as `alignkit.publish` does: no repository before the first push, never whole checkpoints",
    "hub_strategy": "'every_save' or 'end': whole checkpoints never go up; an error without `push_to_hub`",
    "hub_private_repo": "None makes a new repository private (TRL: public)",
    "hub_always_push": "an error without `push_to_hub`",
    "dataloader_pin_memory": "switched off on a CPU, where there is nothing to pin for",
    "dataloader_persistent_workers": "an error without `dataloader_num_workers`",
    "dataloader_multiprocessing_context": "an error without `dataloader_num_workers`",
}

ENGINE_OWN: tuple[str, ...] = (
    "layout",
    "max_tokens_per_forward",
    "max_drop_fraction",
    "weights_only_resume",
    "max_skipped_steps",
)

ENGINE_AS_TRL: frozenset[str] = frozenset(
    {
        # the model and its data
        "model_init_kwargs",
        "trust_remote_code",
        "disable_dropout",
        "dataset_num_proc",
        "remove_unused_columns",
        "activation_offloading",
        # optimisation
        "per_device_train_batch_size",
        "num_train_epochs",
        "max_steps",
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "optim",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "gradient_accumulation_steps",
        "max_grad_norm",
        # precision, memory and speed
        "tf32",
        "activation_checkpointing",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "torch_empty_cache_steps",
        # logging
        "logging_strategy",
        "logging_first_step",
        "log_on_each_node",
        "include_num_input_tokens_seen",
        "log_level",
        "log_level_replica",
        "disable_tqdm",
        "report_to",
        "run_name",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "debug",
        "skip_memory_metrics",
        # evaluation
        "eval_strategy",
        "per_device_eval_batch_size",
        "prediction_loss_only",
        "eval_on_start",
        "eval_do_concat_batches",
        "eval_use_gather_object",
        "eval_accumulation_steps",
        "include_for_metrics",
        "batch_eval_metrics",
        # checkpoints and the Hub
        "output_dir",
        "save_only_model",
        "save_strategy",
        "save_on_each_node",
        "enable_jit_checkpoint",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        "ignore_data_skip",
        "restore_callback_states_from_checkpoint",
        "hub_token",
        "hub_model_id",
        "hub_revision",
        # seeds, devices and data loading
        "full_determinism",
        "seed",
        "data_seed",
        "accelerator_config",
        "dataloader_drop_last",
        "dataloader_num_workers",
        "dataloader_prefetch_factor",
        "dataloader_in_order",
        # several processes
        "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
        "ddp_backend",
        "ddp_timeout",
        "fsdp",
        "fsdp_config",
        "deepspeed",
        "local_rank",
        # for the reader's own scripts: neither Trainer nor TRL reads them
        "do_train",
        "do_eval",
        "do_predict",
    }
)
