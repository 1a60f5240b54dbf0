"""`PPOTrainer`: rollouts in `get_batch_samples`, everything else is Trainer's own loop. Everything here is wiring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed

from alignkit.data.prompts import prepare_prompts
from alignkit.data.report import PreparationReport
from alignkit.errors import ConfigError
from alignkit.models.bundle import POLICY, REFERENCE
from alignkit.models.heads import VALUE
from alignkit.rollout.collect import Completed, Prompts, Rollout, TokenTable, generate_and_reward
from alignkit.trainers.callbacks_engine import engine_callbacks
from alignkit.trainers.checkpointing import KeepsCheckpoints
from alignkit.trainers.config_engine import warn_low_lora_learning_rate
from alignkit.trainers.data_checks import check_evaluation, check_pairs, named_datasets
from alignkit.trainers.guarded_steps import GuardsSteps
from alignkit.trainers.longest_batch import Trial
from alignkit.trainers.metrics import Throughput, add_window_metrics
from alignkit.trainers.outsiders import behind_rewards
from alignkit.trainers.passes import Batch, passes_of
from alignkit.trainers.pooled import Pooled, PooledWindow
from alignkit.trainers.ppo_callbacks import PPOEvent, SaveBoundaries, call_event, reporting_callbacks, steps_per_rollout
from alignkit.trainers.ppo_collect import collect_rollout
from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.ppo_data import RolloutLoader, RolloutSampler
from alignkit.trainers.ppo_evaluate import greedy_metrics
from alignkit.trainers.ppo_loss import ppo_loss, token_columns
from alignkit.trainers.ppo_ptx import PTX, TEXTS, TextMix, check_ptx, prepare_texts, text_loss
from alignkit.trainers.ppo_score import batch_of, score_episodes, score_tokens
from alignkit.trainers.ppo_setup import (
    build_actor_critic,
    build_engine,
    build_rewards,
    check_prompts,
    fit_to_rollouts,
    refuse_unsupported,
    sampling_of,
)
from alignkit.trainers.ppo_state import (
    PPOState,
    check_between_rollouts,
    check_critic,
    load_value_head,
    save_value_head,
    split_learning_rates,
)
from alignkit.trainers.ppo_trials import ppo_trials
from alignkit.trainers.precision import ChoosesPrecision
from alignkit.trainers.progress import use_progress_display
from alignkit.trainers.publishing import PublishesToHub
from alignkit.trainers.recording import begin_record
from alignkit.trainers.setup import (
    AnyDataset,
    build_tokenizer,
    check_optimizer,
    each_dataset,
    own_copy,
    short_name,
)


class PPOTrainer(PublishesToHub, KeepsCheckpoints, GuardsSteps, ChoosesPrecision, Trainer):
    """Proximal policy optimisation (arXiv 1707.06347; for language models 2203.02155) on one base.

    Policy and critic are trained in Trainer's own loop; the reference is the base without the policy's adapter, or the
    adapter that training started from; rewards are functions, classifiers, or adapters on the same base.

    Args:
        model: a name, a path, `"demo"`, a causal language model, or a `PeftModel` whose adapter is trained on.
        reward_funcs: a function `f(prompts, completions, **columns)`, a sequence classifier or its name, a folder that
            `RewardTrainer` saved, or a list of these; see `make_reward_sources`.
        args: options; by default `PPOConfig("<model>-PPO")`.
        train_dataset: prompts, text or messages, with any columns that reward functions ask for.
        eval_dataset: the same, or a dict of them; `evaluate` completes them greedily.
        processing_class: the tokenizer; by default the model's.
        reward_processing_classes: tokenizers of classifiers that are given as objects.
        callbacks, optimizers: as for `Trainer`; a `PPOCallback` hears of rollouts too.
        quantization_config: `alignkit.nf4()`, `alignkit.int8()` or another; for a model given by name.
        peft_config: a new adapter for the model.
        ptx_dataset: texts whose language-modelling loss is mixed in with weight `ptx_coef`: prompts with completions,
            conversations, or preferences, whose chosen side is taken.

    Attributes:
        reports: what data preparation kept and dropped, by dataset name.
        bundle: the roles on the base.
        rewards: everything that rewards a completion.
        ppo_state: what is carried from rollout to rollout.
        rollout: the latest one.
        record: what the run is made of, did and measured.

    Raises:
        ConfigError, DataError, ModelError: before any forward pass, with what to change.
    """

    _tag_names = ("alignkit", "ppo")
    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole optimizer step
    args: PPOConfig
    model: PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        reward_funcs: Any,
        args: PPOConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | Mapping[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        ptx_dataset: Dataset | list | None = None,
    ) -> None:
        if train_dataset is None:
            raise ConfigError("train_dataset is required: pass a dataset of prompts")
        args = own_copy(PPOConfig(f"{short_name(model)}-PPO") if args is None else args, PPOConfig)
        check_ptx(ptx_dataset, args)
        set_seed(args.seed)
        tokenizer = build_tokenizer(processing_class, model, args)
        self.reports: dict[str, PreparationReport] = {}
        prepare = partial(self._prepare, tokenizer=tokenizer, args=args)
        prepared: Any = prepare(train_dataset, "train")
        prepared_eval: Any = each_dataset(eval_dataset, prepare, "eval")
        check_evaluation(prepared_eval, args)
        texts = None if ptx_dataset is None else self._prepare_texts(ptx_dataset, tokenizer, args)
        self.bundle, self._critic = build_actor_critic(model, args, quantization_config, peft_config)
        self.rewards = build_rewards(reward_funcs, reward_processing_classes, self.bundle, args, lambda: self._passes)
        check_optimizer(optimizers[0], self.bundle.model)
        warn_low_lora_learning_rate(args)
        fit_to_rollouts(args, eval_dataset)
        super().__init__(
            model=self.bundle.model,
            args=args,
            train_dataset=prepared,
            eval_dataset=prepared_eval,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        refuse_unsupported(self.accelerator, args)
        self._passes = passes_of(self)
        self._engine = build_engine(self.bundle, tokenizer, args)
        check_prompts(named_datasets(prepared, prepared_eval), self.bundle.base, self.rewards, args)
        check_pairs({} if texts is None else {TEXTS: texts}, self.bundle.base)
        place = self.accelerator.process_index, self.accelerator.num_processes
        self._sampler = RolloutSampler(len(prepared), args, *place)
        self._texts = None if texts is None else TextMix(texts, args, *place)
        self.rollout: Rollout | None = None
        self.ppo_state = PPOState(args.kl_coef)
        self._minibatch, self._throughput = PooledWindow(), Throughput()  # the former of the optimizer step before
        self._is_stopped = False  # the rest of this rollout's steps is skipped
        own = *engine_callbacks(self.bundle, args), SaveBoundaries(self)
        for callback in (*own, *reporting_callbacks(callbacks or ())):
            self.add_callback(callback)
        use_progress_display(self)
        self.record = begin_record(self, "ppo", train_dataset, eval_dataset, self.reports, self.rewards.names)
        self.begin_checkpoints({"ppo": self.ppo_state}, rewards=self.rewards.sources, texts=texts)
        self.begin_guards(lambda: self._is_stopped, self._begin_minibatch, self._engine)

    # --- data ---

    def _prepare(self, dataset: Any, name: str, *, tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> Any:
        prepared, self.reports[name] = prepare_prompts(
            dataset,
            tokenizer,
            max_prompt_tokens=args.max_prompt_length,
            max_drop_fraction=args.max_drop_fraction,
            num_proc=args.dataset_num_proc,
            name=name,
        )
        return prepared

    def _prepare_texts(self, dataset: Dataset | list, tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> Dataset:
        texts, self.reports[TEXTS] = prepare_texts(dataset, tokenizer, args)
        return texts

    def get_train_dataloader(self) -> DataLoader:
        """Batches of row numbers: what Trainer counts steps by. It is not sharded; the sampler knows its process."""
        return RolloutLoader(self._sampler)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Prompts of one epoch."""
        return len(cast(Dataset, self.train_dataset))

    # --- rollouts ---

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | None]:
        """Return the micro-batches of one optimizer step; before a rollout's first step, collect the rollout."""
        ticks, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step % steps_per_rollout(self.args)
        if step == 0:
            self.rollout = collect_rollout(self, ticks[0]["rows"].tolist())
            self._is_stopped = self.guard.is_resting
        elif self.args.target_approx_kl is not None:
            self._stop_early(self.args.target_approx_kl)
        self._begin_minibatch()
        prompts = self.args.per_device_train_batch_size * num_batches
        first = step % self.args.num_mini_batches * prompts
        parts = range(first, first + prompts, self.args.per_device_train_batch_size)
        rollout = cast(Rollout, self.rollout)
        batches: list[Any] = [
            batch_of(rollout, slice(part, part + self.args.per_device_train_batch_size)) for part in parts
        ]
        tokens: Any = torch.stack([batch["mask"].sum() for batch in batches]).sum().to(device)
        if self._texts is not None and not self._is_warming_up:
            texts = self._texts.batches(self.state.global_step, num_batches)
            batches = [batch | {PTX: of_batch} for batch, of_batch in zip(batches, texts, strict=True)]
        return batches, cast(Tensor, self.accelerator.reduce(tokens, reduction="sum"))

    def complete(self, prompts: Prompts, *, temperature: float) -> Completed:
        """Complete prompts and have the completions rewarded; temperature 0 is greedy."""
        sampling = sampling_of(self.args, temperature)
        return generate_and_reward(prompts, self._engine, sampling, self.processing_class, self.rewards, self.state)

    def score(self, prompts: list[list[int]], completions: list[list[int]]) -> TokenTable:
        """Score completions with policy, reference and critic, in the passes of training; see `score_episodes`."""
        self.model.train()  # as in training, with dropout off: the first importance ratio is then 1 exactly
        passes, wrapped = self._passes, self.model_wrapped
        run = partial(score_episodes, self.bundle, passes, prompts, completions, self.args, wrapped=wrapped)
        return passes.memory.fit(run)

    def trials(self) -> list[Trial]:
        """The longest prompts with the longest completions, and the texts that are mixed in."""
        return ppo_trials(self)

    def _begin_minibatch(self) -> None:
        self._minibatch = PooledWindow()

    def _stop_early(self, target: float) -> None:
        found = self._minibatch.means(self.accelerator)
        self._is_stopped = self._is_stopped or found.get("policy/approxkl_avg", 0.0) > target

    @property
    def _is_warming_up(self) -> bool:
        """Whether the critic trains alone."""
        return self.state.global_step // steps_per_rollout(self.args) < self.args.critic_warmup_rollouts

    def event(self, name: PPOEvent, **kwargs: Any) -> None:
        """Let callbacks hear of an event of PPO."""
        self.control = call_event(self.callback_handler, name, self.args, self.state, self.control, **kwargs)

    # --- one optimizer step ---

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Run a micro-batch in token-bounded chunks; after an early stop, nothing, which leaves gradients None."""
        model.train()
        if self._is_stopped:
            return torch.zeros((), device=self.args.device)
        step = super().training_step
        loss = self.run_micro_batch(
            inputs, self._chunks, lambda chunk: step(model, chunk, num_items_in_batch), self._finish_micro_batch
        )
        if self.accelerator.sync_gradients:  # the minibatch's last micro-batch
            self.ppo_state.window.add({"loss": Pooled("rate", torch.tensor([0.0, 1.0], dtype=torch.float64))})
            self.event("on_minibatch_end", metrics=self._minibatch.figures())
        return loss

    def _chunks(self, inputs: Batch) -> list[Batch]:
        # Episodes come last: only with them has every parameter a gradient, which is when DDP adds up.
        episodes = {name: values for name, values in inputs.items() if name != PTX}
        parts: list[Any] = [inputs[PTX], episodes] if PTX in inputs else [episodes]
        return [chunk for part in parts for chunk in self._passes.split(self._prepare_inputs(part))]

    def _finish_micro_batch(self, loss: Tensor) -> None:
        if self._is_warming_up:  # the value loss reaches the trunk that the critic shares
            for parameter in set(self.model.parameters()).difference(self._critic):
                parameter.grad = None
        # The mean over the steps that were made, whatever a resumed run has forgotten of Trainer's own sum.
        self.ppo_state.window.add({"loss": Pooled("rate", torch.stack([loss, torch.zeros_like(loss)]).double())})

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the chunk's share of the step's mean loss over tokens."""
        layout = self._passes.lay_out(inputs)
        self._throughput.add(layout.num_sequences, layout.tokens)
        processes = self.accelerator.num_processes  # whose gradients are averaged
        if PTX in inputs:
            logps = self.bundle.score(layout, wrapped=model).logps
            return text_loss(logps, inputs, self.args.ptx_coef) * processes
        scores = score_tokens(self.bundle, layout, self.args, wrapped=model)
        columns = token_columns(inputs, layout)
        self.guard.look_at_tokens(layout, columns["mask"], inputs, log_probability=scores.logps, value=scores.values)
        total, metrics = ppo_loss(
            scores,
            columns,
            layout,
            self.args,
            kl_coef=cast(Rollout, self.rollout).kl_coef if self.args.kl_place == "loss" else 0.0,
            policy_weight=0.0 if self._is_warming_up else 1.0,
        )
        self.ppo_state.window.add(metrics)
        self._minibatch.add(metrics)
        count = columns["mask"].sum() if num_items_in_batch is None else num_items_in_batch
        loss = total * (1 if num_items_in_batch is None else processes) / count.clamp(min=1)
        return (loss, scores) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's optimizer, with a learning rate of its own for the critic."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new:
            split_learning_rates(optimizer, self._critic, self.args.value_learning_rate)
        return optimizer

    # --- evaluation, metrics and files ---

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Complete held-out prompts greedily, reward and score them; report reward, KL, lengths and ends."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, Mapping):
            metrics: dict[str, float] = {}
            for name, each in dataset.items():
                metrics |= self.evaluate(each, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if dataset is None:
            raise ConfigError("there are no prompts to evaluate on: pass eval_dataset")
        if not isinstance(dataset, Dataset) or "prompt_ids" not in dataset.column_names:
            dataset = self._prepare(dataset, "eval", tokenizer=self.processing_class, args=self.args)
            check_prompts({"eval": dataset}, self.bundle.base, self.rewards, self.args)
        found = greedy_metrics(self, dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused."""
        raise ConfigError(
            "PPOTrainer predicts nothing: evaluate(dataset) reports how greedy completions are rewarded, and "
            "alignkit.evaluation.rollouts.summarize_rollouts(trainer, dataset) returns them one by one"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's metrics to `logs`."""
        if "loss" in logs:
            logs["episode"] = self._sampler.per_rollout * self.args.num_generations * self._rollouts_begun()
            add_window_metrics(logs, {"train": self.ppo_state.window}, self._throughput, self.accelerator)
        super().log(logs, start_time)

    def _rollouts_begun(self) -> int:
        return -(-self.state.global_step // steps_per_rollout(self.args))

    def check_resumable(self, folder: Path, step: int) -> None:
        """Refuse a checkpoint from the middle of a rollout."""
        check_between_rollouts(folder, step, self.args)

    def can_save_now(self, step: int) -> bool:
        """Whether no rollout is open: its episodes are no part of a checkpoint."""
        return step % steps_per_rollout(self.args) == 0

    def outside_rewards(self) -> dict[str, Any]:
        """Objects behind the reward functions, by name."""
        return behind_rewards(self.rewards.sources)

    def save_files(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """Write the policy's adapter alone; into a checkpoint, the other adapters and the value head too."""
        adapters = None if self.is_saving_checkpoint else [cast(str, self.bundle.adapters[POLICY])]
        cast(PeftModel, self.model).save_pretrained(str(folder), selected_adapters=adapters, state_dict=state_dict)
        if self.is_saving_checkpoint:
            save_value_head(folder, self.bundle)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_critic(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_critic(Path(str(self.state.best_model_checkpoint)))

    def _load_critic(self, folder: Path) -> None:
        """Load the critic, and make trainable again what PEFT froze with every adapter that it loaded."""
        check_critic(folder, self.bundle, has_adapter=self.args.value_adapter)
        if self.args.value_adapter:
            cast(PeftModel, self.model).load_adapter(str(folder / VALUE), cast(str, self.bundle.adapters.get(VALUE)))
        load_value_head(folder, self.bundle)
        with self.bundle.role(REFERENCE):
            pass
