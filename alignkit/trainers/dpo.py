"""`DPOTrainer`: Trainer's own loop around a preference loss. Everything here is wiring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from alignkit.data.collate import EXTRA_COLUMNS, ID_COLUMNS, DPOCollator, add_columns
from alignkit.data.layout import Layout
from alignkit.data.prepare import prepare_preferences
from alignkit.data.report import PreparationReport
from alignkit.errors import ConfigError
from alignkit.functional.preference import LOSSES, PairLogps, PairTokens, PreferenceLoss
from alignkit.models.scoring import STATISTICS_TOKENS, TokenScores, even_sample
from alignkit.trainers.callbacks import dpo_callbacks, moving_reference
from alignkit.trainers.checkpointing import KeepsCheckpoints
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.config_engine import warn_low_lora_learning_rate
from alignkit.trainers.data_checks import check_evaluation, check_pairs, named_datasets
from alignkit.trainers.guarded_steps import GuardsSteps
from alignkit.trainers.longest_batch import Trial, pair_trials
from alignkit.trainers.metrics import (
    MetricWindow,
    Throughput,
    add_batch_metrics,
    add_token_metrics,
    add_window_metrics,
)
from alignkit.trainers.objective import Objective
from alignkit.trainers.passes import (
    Batch,
    count_rows,
    passes_of,
    rows_not_repeated,
    share_of_step,
)
from alignkit.trainers.precision import ChoosesPrecision
from alignkit.trainers.progress import use_progress_display
from alignkit.trainers.publishing import PublishesToHub
from alignkit.trainers.recording import begin_record
from alignkit.trainers.reference_cache import with_reference_logps
from alignkit.trainers.setup import (
    AnyDataset,
    build_bundle,
    build_policy,
    build_tokenizer,
    check_dataset,
    check_devices,
    check_optimizer,
    each_dataset,
    own_copy,
    remove_reference,
    short_name,
)


class DPOTrainer(PublishesToHub, KeepsCheckpoints, GuardsSteps, ChoosesPrecision, Trainer):
    """Direct preference optimization (arXiv 2305.18290) and its relatives, with TRL 1.16's constructor.

    Args:
        model: a name, a path, `"demo"`, a causal language model, or a `PeftModel` whose adapter is trained on.
        ref_model: a separate reference. By default the reference is the policy as it was: adapters off, or a frozen
            copy of the adapter that training continues from, or a copy of a model that is trained whole.
        args: options; by default `DPOConfig("<model>-DPO")`.
        data_collator: by default `DPOCollator`. Another one returns the same kind of batch.
        train_dataset: preferences in any format that `prepare_preferences` reads, or token ids.
        eval_dataset: the same, or a dict of them.
        processing_class: the tokenizer; by default the model's.
        compute_metrics: gets `predictions = (chosen rewards, rejected rewards)`.
        callbacks, optimizers: as for `Trainer`.
        quantization_config: `alignkit.nf4()`, `alignkit.int8()` or another; for a model given by name.
        peft_config: a new adapter for the model.

    Attributes:
        reports: what data preparation kept and dropped, by dataset name.
        bundle: the roles on the base.
        record: what the run is made of, did and measured.

    Raises:
        ConfigError, DataError, ModelError: before any forward pass, with what to change.
    """

    _tag_names = ("alignkit", "dpo")
    loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole optimizer step
    args: DPOConfig
    model: PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        ref_model: str | Path | PreTrainedModel | PeftModel | None = None,
        args: DPOConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]] | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | Mapping[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        if train_dataset is None:
            raise ConfigError("train_dataset is required: pass a dataset of preferences")
        args = own_copy(DPOConfig(f"{short_name(model)}-DPO") if args is None else args, DPOConfig)
        set_seed(args.seed)
        tokenizer = build_tokenizer(processing_class, model, args)
        self.reports: dict[str, PreparationReport] = {}
        prepare = partial(self._prepare, tokenizer=tokenizer, args=args)
        prepared: Any = prepare(train_dataset, "train")
        check_dataset(prepared, args)
        prepared_eval: Any = each_dataset(eval_dataset, prepare, "eval")
        check_evaluation(prepared_eval, args)
        policy = build_policy(model, args, quantization_config, peft_config)
        check_pairs(named_datasets(prepared, prepared_eval), policy)
        check_optimizer(optimizers[0], policy)
        self.bundle = build_bundle(policy, ref_model, args, is_new_adapter=peft_config is not None)
        if isinstance(policy, PeftModel):
            warn_low_lora_learning_rate(args)
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or DPOCollator(args.max_length),
            train_dataset=prepared,
            eval_dataset=prepared_eval,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_devices(args, self.accelerator.distributed_type, has_reference=self.bundle.reference is not None)
        self.objective = Objective.from_config(args, self._average_kl)
        self._passes = passes_of(self)
        self._windows = {"train": MetricWindow(), "eval": MetricWindow()}
        self._throughput = Throughput()
        if self.bundle.reference is not None:
            self.accelerator.prepare_model(self.bundle.reference, evaluation_mode=True)
        for callback in dpo_callbacks(self.bundle, args, args.beta):
            self.add_callback(callback)
        use_progress_display(self)
        method = "kto" if self.objective.is_unpaired else "dpo"
        self.record = begin_record(self, method, train_dataset, eval_dataset, self.reports)
        self.begin_checkpoints({"window/train": self._windows["train"]}, moving_reference(self.bundle, args))
        self.begin_guards()
        if args.precompute_ref_log_probs:
            self.train_dataset = with_reference_logps(self, self.train_dataset, "train")
            self.eval_dataset = each_dataset(self.eval_dataset, partial(with_reference_logps, self), "eval")

    # --- data ---

    def _prepare(self, dataset: AnyDataset, name: str, *, tokenizer: PreTrainedTokenizerBase, args: DPOConfig) -> Any:
        """Tokenise `dataset` unless it is already; keep the report and say what was dropped."""
        prepared, report = prepare_preferences(
            dataset,
            tokenizer,
            max_length=args.max_length,
            unpaired=any(LOSSES[loss].unpaired for loss in args.loss_type),
            max_drop_fraction=args.max_drop_fraction,
            num_proc=args.dataset_num_proc,
            name=name,
        )
        self.reports[name] = report
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*ID_COLUMNS, *EXTRA_COLUMNS]

    def _ready(self, dataset: Any, name: str) -> Any:
        """Bring a dataset that came after construction to the form of those that came with it."""
        if dataset is None or isinstance(dataset, str):
            return dataset
        prepared = self._prepare(dataset, name, tokenizer=self.processing_class, args=self.args)
        check_pairs({name: prepared}, self.model)
        return with_reference_logps(self, prepared, name) if self.args.precompute_ref_log_probs else prepared

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as `Trainer` does; a dataset given here may be in any format that the constructor takes."""
        # Trainer comes back here for each of a dict
        ready: Any = eval_dataset if isinstance(eval_dataset, Mapping) else self._ready(eval_dataset, "eval")
        return super().evaluate(ready, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Return `(chosen rewards, rejected rewards)`, each `(N,)`, as predictions, and the metrics."""
        output = super().predict(self._ready(test_dataset, "test"), ignore_keys, metric_key_prefix)
        means = self._windows["eval"].means(self.accelerator)
        (output.metrics or {}).update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    # --- one step ---

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | None]:
        """Take the micro-batches of one optimizer step, and count their pairs over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, count_rows(batches, self.accelerator, device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Run a micro-batch in token-bounded chunks, with the gradient of the whole.

        A row's gradient does not depend on the other rows, unless the loss couples them. Then log-probabilities of all
        chunks come first, the loss's derivative with respect to them second, and the chunks' backward passes last.
        """
        model.train()
        step = super().training_step
        return self.run_micro_batch(
            self._prepare_inputs(inputs),
            partial(self._chunks, model),
            lambda chunk: step(model, chunk, num_items_in_batch),
        )

    def trials(self) -> list[Trial]:
        """The pairs."""
        return pair_trials(self, self._trial_loss)

    def _trial_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        layout = self._lay_out(inputs)
        scores = self.bundle.score(layout, wrapped=model, square_sums=self.objective.use_weighting)
        self._reference_logps(model, layout, inputs)
        return scores.logps.sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the batch's share of the step's mean loss; with `return_outputs`, the `PreferenceLoss` besides."""
        layout = self._lay_out(inputs)
        few = even_sample(len(layout.targets), STATISTICS_TOKENS, layout.targets.device)
        weighted = self.objective.use_weighting
        scores = self.bundle.score(layout, wrapped=model, statistics=few, square_sums=weighted)
        features = self.objective.features(scores, layout)
        if "coefficients" in inputs:  # a chunk of a coupled batch: its rows' losses are known, their slopes are given
            result = PreferenceLoss(inputs["losses"], inputs["chosen_rewards"], inputs["rejected_rewards"])
            slopes = (features * inputs["coefficients"]).sum(1)
            losses = result.losses + slopes - slopes.detach()
        else:
            reference = self._reference_logps(model, layout, inputs)
            pair_weights = self.objective.weights(scores, layout)
            result = self.objective(features, reference, layout.pair_tokens, inputs, pair_weights)
            losses = result.losses
        rewards = torch.stack([result.chosen_rewards, result.rejected_rewards], dim=1)
        self.guard.look(inputs, {"log-probability": features, "reward": rewards, "loss": losses})
        self._record(model, inputs, layout, scores, few, result, PairLogps(*features.detach()[:, :2].unbind(1)))
        loss = share_of_step(losses, num_items_in_batch, self.accelerator)
        return (loss, result) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor | None]:
        """Return the loss, the rewards `(chosen, rejected)`, and one label per pair (always 1: chosen is better)."""
        inputs = self._prepare_inputs(inputs)
        rows = len(inputs["lengths"])
        own = rows_not_repeated(rows, self.accelerator)
        inputs["is_own"] = torch.arange(rows, device=self.args.device) < own
        parts = self.evaluate_in_chunks(
            partial(self._chunks, model, inputs), partial(self.compute_loss, model), self._windows["eval"]
        )
        result = PreferenceLoss(*map(torch.cat, zip(*parts, strict=True)))
        loss = (result.losses[:own] if own else result.losses).mean()  # the latter is not counted
        if prediction_loss_only:
            return loss, None, None
        labels = inputs.get("label", torch.ones_like(result.losses, dtype=torch.bool))
        return loss, (result.chosen_rewards, result.rejected_rewards), labels

    def _average_kl(self, kl: Tensor) -> Tensor:
        """KTO's KL estimate over all processes; it is a metric too."""
        kl = cast(Tensor, self.accelerator.reduce(kl, reduction="mean"))
        self._windows["train" if self.model.training else "eval"].add("kl", kl.clamp(min=0))
        return kl

    def _is_on_any_process(self, value: bool) -> bool:
        count: Any = torch.tensor(int(value), device=self.args.device)
        return bool(self.accelerator.reduce(count, reduction="sum"))

    def _lay_out(self, inputs: Mapping[str, Tensor]) -> Layout:
        return self._passes.lay_out(inputs)

    def reference_logps(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The reference's log-probabilities of a collated batch, `(B, 2)`, computed whatever columns it has."""

        def run() -> Tensor:
            layouts = [self._lay_out(chunk) for chunk in self._passes.split(dict(inputs))]
            features = [self.objective.features(self._score_reference(self.model, each), each) for each in layouts]
            return torch.cat(features)[:, :2]

        with self.compute_loss_context_manager():  # the precision of training
            return self._passes.memory.fit(run)

    def _score_reference(self, model: nn.Module, layout: Layout) -> TokenScores:
        if self.bundle.can_reference:
            return self.bundle.score_reference(layout, wrapped=model)
        with torch.no_grad():  # a model that is trained whole, before its first step
            return self.bundle.score(layout, wrapped=model)

    def _reference_logps(self, model: nn.Module, layout: Layout, inputs: Mapping[str, Tensor]) -> PairLogps | None:
        if not self.objective.needs_reference:
            return None
        if "ref_chosen_logps" in inputs:
            return PairLogps(inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
        features = self.objective.features(self._score_reference(model, layout), layout)
        return PairLogps(features[:, 0], features[:, 1])

    # --- chunks ---

    def _chunks(self, model: nn.Module, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Cut a micro-batch into token-bounded chunks that `compute_loss` can take one by one."""
        chunks = self._passes.split(inputs)
        if len(chunks) > 1 and self.objective.couples_rows:
            self._add_coefficients(model, inputs, chunks)
        return chunks

    @torch.no_grad()
    def _add_coefficients(self, model: nn.Module, inputs: dict[str, Tensor], chunks: list[dict[str, Tensor]]) -> None:
        """Give each chunk its rows' part of the batch's result, and the summed loss's derivative by its features."""
        features, references, weights = [], [], []
        for chunk in chunks:
            layout = self._lay_out(chunk)
            scores = self.bundle.score(layout, wrapped=model, square_sums=self.objective.use_weighting)
            features.append(self.objective.features(scores, layout))
            references.append(self._reference_logps(model, layout, chunk))
            weights.append(self.objective.weights(scores, layout))
        reference = None if references[0] is None else PairLogps(*map(torch.cat, zip(*references, strict=True)))
        pair_weights = None if weights[0] is None else torch.cat(weights)
        tokens = PairTokens(*inputs["lengths"][:, 1:].unbind(1))
        slopes, result = self.objective.slopes(torch.cat(features), reference, tokens, inputs, pair_weights)
        add_columns(chunks, {"coefficients": slopes, **result._asdict()})

    # --- metrics and files ---

    def _record(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        layout: Layout,
        scores: TokenScores,
        few: Tensor,
        result: PreferenceLoss,
        policy: PairLogps,
    ) -> None:
        window = self._windows["train" if model.training else "eval"]
        label = inputs["label"] if self.objective.is_unpaired else None
        own = inputs.get("is_own", torch.ones_like(result.losses, dtype=torch.bool))  # (B,), see `prediction_step`
        add_batch_metrics(window, result, policy, label, own)
        add_token_metrics(window, scores, layout.sequence_index[few], label, own)
        if model.training:
            self._throughput.add(len(result.losses), layout.tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's metrics to `logs`, under TRL's names, with `eval_` before those of an evaluation."""
        add_window_metrics(logs, self._windows, self._throughput, self.accelerator)
        super().log(logs, start_time)

    @property
    def states_hold_reference(self) -> bool:
        """Whether `sync_ref_model` moves the reference."""
        return self.args.sync_ref_model

    @property
    def computes_reference(self) -> bool:
        """Whether `precompute_ref_log_probs` did."""
        return self.args.precompute_ref_log_probs

    def save_files(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """Write the policy; a reference adapter only into checkpoints, and only if it moves."""
        super().save_files(folder, state_dict)
        if not (self.args.sync_ref_model and self.is_saving_checkpoint):
            remove_reference(folder, self.bundle)
