"""`RewardTrainer`: Trainer's own loop around the Bradley-Terry loss. Everything here is wiring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from alignkit.data.collate import ID_COLUMNS, DPOCollator
from alignkit.data.layout import Layout
from alignkit.data.prepare import prepare_preferences
from alignkit.data.report import PreparationReport
from alignkit.errors import ConfigError
from alignkit.functional.reward import RewardLoss, bradley_terry
from alignkit.models.bundle import REWARD, ModelBundle
from alignkit.models.heads import SCORE
from alignkit.models.reward_files import save_classifier
from alignkit.trainers.callbacks_engine import engine_callbacks
from alignkit.trainers.checkpointing import KeepsCheckpoints
from alignkit.trainers.config_engine import warn_low_lora_learning_rate
from alignkit.trainers.data_checks import check_evaluation, check_pairs, named_datasets
from alignkit.trainers.guarded_steps import GuardsSteps
from alignkit.trainers.guards import ROW_ID
from alignkit.trainers.longest_batch import Trial, pair_trials
from alignkit.trainers.metrics import Throughput, add_window_metrics
from alignkit.trainers.passes import (
    count_rows,
    passes_of,
    refuse_data_parallel,
    rows_not_repeated,
    share_of_step,
)
from alignkit.trainers.precision import ChoosesPrecision
from alignkit.trainers.progress import use_progress_display
from alignkit.trainers.publishing import PublishesToHub
from alignkit.trainers.recording import begin_record
from alignkit.trainers.reward_config import RewardConfig
from alignkit.trainers.reward_metrics import RewardWindow, ensemble_metrics, reward_metrics, uncertainty_metrics
from alignkit.trainers.reward_setup import check_reward_data, reward_tokenizer
from alignkit.trainers.setup import (
    AnyDataset,
    build_policy,
    check_optimizer,
    each_dataset,
    own_copy,
    short_name,
)

COLUMNS = (*ID_COLUMNS, "margin", "weight", ROW_ID)


class RewardTrainer(PublishesToHub, KeepsCheckpoints, GuardsSteps, ChoosesPrecision, Trainer):
    """A reward model from preferences (Bradley-Terry; arXiv 2203.02155, Eq. 1), with TRL 1.16's constructor.

    The model stays a causal language model with a head `score` beside its output layer, which never runs: a pair's
    prompt is computed once, and rewards are read at the last token of each completion. What is saved is a sequence
    classifier, or a PEFT adapter for one (`alignkit.load_reward_model`).

    Args:
        model: a name, a path, `"demo"`, a causal language model, the folder of a reward adapter to train on, or a
            `PeftModel` that holds one.
        args: options; by default `RewardConfig("<model>-Reward")`.
        data_collator: by default `DPOCollator`. Another one returns the same kind of batch.
        train_dataset: preferences in any format that `prepare_preferences` reads, or token ids. A `margin` column is
            what the difference of rewards should exceed; a `weight` column multiplies a row's loss.
        eval_dataset: the same, or a dict of them.
        processing_class: the tokenizer; by default the model's.
        compute_metrics: gets `predictions = (chosen rewards, rejected rewards)`, `(N, heads)` each.
        callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: as for `Trainer`.
        quantization_config: `alignkit.nf4()`, `alignkit.int8()` or another; for a model given by name.
        peft_config: a new adapter for the model; the head is trained with it in any case.

    Attributes:
        reports: what data preparation kept and dropped, by dataset name.
        bundle: the roles on the base; the reward is one.
        record: what the run is made of, did and measured.

    Raises:
        ConfigError, DataError, ModelError: before any forward pass, with what to change.
    """

    _tag_names = ("alignkit", "reward-trainer")
    loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole optimizer step
    args: RewardConfig
    model: PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase
    train_dataset: Dataset | IterableDataset

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]] | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | Mapping[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        if train_dataset is None:
            raise ConfigError("train_dataset is required: pass a dataset of preferences")
        args = own_copy(RewardConfig(f"{short_name(model)}-Reward") if args is None else args, RewardConfig)
        set_seed(args.seed)
        tokenizer = reward_tokenizer(processing_class, model, args)
        self.reports: dict[str, PreparationReport] = {}
        prepare = partial(self._prepare, tokenizer=tokenizer, args=args)
        prepared: Any = prepare(train_dataset, "train")
        check_reward_data(prepared, args)
        prepared_eval: Any = each_dataset(eval_dataset, prepare, "eval")
        check_evaluation(prepared_eval, args)
        policy = build_policy(model, args, quantization_config, peft_config, reward_heads=args.num_heads)
        check_pairs(named_datasets(prepared, prepared_eval), policy)
        check_optimizer(optimizers[0], policy)
        worn = policy.active_adapters[0] if isinstance(policy, PeftModel) else None
        self.bundle = ModelBundle(policy, adapters={REWARD: worn}, heads={REWARD: SCORE})
        if worn is not None:
            warn_low_lora_learning_rate(args)
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or DPOCollator(),
            train_dataset=prepared,
            eval_dataset=prepared_eval,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        refuse_data_parallel(args)
        self._passes = passes_of(self)
        shown = [reward_metrics, *([ensemble_metrics] if args.num_heads > 1 else [])]
        self._windows = {"train": RewardWindow(*shown), "eval": RewardWindow(*shown, uncertainty_metrics)}
        self._throughput = Throughput()
        for callback in engine_callbacks(self.bundle, args):
            self.add_callback(callback)
        use_progress_display(self)
        self.record = begin_record(self, "reward", train_dataset, eval_dataset, self.reports)
        self.begin_checkpoints({"window/train": self._windows["train"]})
        self.begin_guards()

    # --- data ---

    def _prepare(
        self, dataset: AnyDataset, name: str, *, tokenizer: PreTrainedTokenizerBase, args: RewardConfig
    ) -> Any:
        """Tokenise `dataset` unless it is already; keep the report and say what was dropped."""
        prepared, self.reports[name] = prepare_preferences(
            dataset,
            tokenizer,
            max_length=args.max_length,
            drop_longer=True,
            max_drop_fraction=args.max_drop_fraction,
            num_proc=args.dataset_num_proc,
            name=name,
        )
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)

    def _ready(self, dataset: Any, name: str) -> Any:
        """Bring a dataset that came after construction to the form of those that came with it."""
        if dataset is None or isinstance(dataset, str | Mapping):  # Trainer comes back for each of a dict
            return dataset
        prepared = self._prepare(dataset, name, tokenizer=self.processing_class, args=self.args)
        check_pairs({name: prepared}, self.model)
        return prepared

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as `Trainer` does; a dataset given here may be in any format that the constructor takes."""
        return super().evaluate(self._ready(eval_dataset, "eval"), ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Return `(chosen rewards, rejected rewards)`, each `(N, heads)`, as predictions, and the metrics.

        `alignkit.functional.reward.ensemble` takes mean, minimum and spread over the heads.
        """
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
        """Run a micro-batch in token-bounded chunks. Pairs do not depend on each other: the gradient is the whole's."""
        model.train()
        step = super().training_step
        return self.run_micro_batch(
            self._prepare_inputs(inputs), self._chunks, lambda chunk: step(model, chunk, num_items_in_batch)
        )

    def trials(self) -> list[Trial]:
        """The pairs."""
        return pair_trials(self, self._trial_loss)

    def _trial_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        layout = self._lay_out(inputs)
        return self.bundle.values(layout, layout.last_index, role=REWARD, wrapped=model).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the batch's share of the step's mean loss; with `return_outputs`, rewards `(chosen, rejected)` too."""
        layout = self._lay_out(inputs)
        rewards = self.bundle.values(layout, layout.last_index, role=REWARD, wrapped=model)  # (2B, K)
        chosen, rejected = rewards[0::2], rewards[1::2]
        losses = self._objective(chosen, rejected, inputs).losses
        self.guard.look(inputs, {"reward": torch.cat([chosen, rejected], dim=1), "loss": losses})
        if model.training:
            self._windows["train"].add(chosen, rejected)
            self._throughput.add(len(losses), layout.tokens)
        loss = share_of_step(losses, num_items_in_batch, self.accelerator)
        return (loss, (chosen, rejected)) if return_outputs else loss

    def _objective(self, chosen: Tensor, rejected: Tensor, columns: Mapping[str, Tensor]) -> RewardLoss:
        result = bradley_terry(
            chosen,
            rejected,
            margin=columns.get("margin"),
            label_smoothing=self.args.label_smoothing,
            center_coef=self.args.center_rewards_coefficient or 0.0,
        )
        return result._replace(losses=result.losses * columns["weight"]) if "weight" in columns else result

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor | None]:
        """Return the loss, the rewards `(chosen, rejected)`, `(B, K)` each, and one label per pair (always 1)."""
        inputs = self._prepare_inputs(inputs)
        parts = self.evaluate_in_chunks(partial(self._chunks, inputs), partial(self.compute_loss, model))
        chosen, rejected = (torch.cat(side) for side in zip(*parts, strict=True))
        own = rows_not_repeated(len(chosen), self.accelerator)
        self._windows["eval"].add(chosen[:own], rejected[:own])
        losses = self._objective(chosen, rejected, inputs).losses
        loss = losses[:own].mean() if own else losses.mean()  # the latter is not counted
        if prediction_loss_only:
            return loss, None, None
        return loss, (chosen, rejected), torch.ones(len(chosen), dtype=torch.bool, device=loss.device)

    def _lay_out(self, inputs: Mapping[str, Tensor]) -> Layout:
        return self._passes.lay_out(inputs)

    def _chunks(self, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        return self._passes.split(inputs)

    # --- metrics and files ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's metrics to `logs`, under TRL's names, with `eval_` before those of an evaluation."""
        add_window_metrics(logs, self._windows, self._throughput, self.accelerator)
        super().log(logs, start_time)

    def save_files(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """Write the adapter, or the classifier where a model is trained whole."""
        super().save_files(folder, state_dict)
        if not isinstance(self.model, PeftModel):
            # over the causal language model that Trainer saved, whose output layer means nothing here
            pad = cast(int, self.processing_class.pad_token_id)
            save_classifier(self.model, str(folder), pad_token_id=pad, state_dict=state_dict)
