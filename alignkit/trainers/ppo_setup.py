"""What `PPOTrainer` is handed, turned into policy, critic, reference, rewards and a rollout engine."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.errors import ConfigError, DataError, ModelError
from alignkit.models.adapters import keep_adapters_fp32, reference_adapter
from alignkit.models.bundle import POLICY, REFERENCE, ModelBundle
from alignkit.models.heads import VALUE, add_value_head
from alignkit.models.lora import is_quantized
from alignkit.rollout.continuous import ContinuousEngine
from alignkit.rollout.engine import Endings, RolloutEngine, Sampling
from alignkit.rollout.hf import HFEngine
from alignkit.rollout.mix import RewardMix
from alignkit.rollout.reward import ComponentScores, RewardInputs
from alignkit.rollout.shaping import Overlong, RewardShaping
from alignkit.rollout.sources import make_reward_sources
from alignkit.trainers.data_checks import check_vocabulary, positions_of, row_lengths
from alignkit.trainers.passes import Passes, refuse_data_parallel
from alignkit.trainers.ppo_callbacks import steps_per_rollout
from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.ppo_data import OWN_COLUMNS
from alignkit.trainers.ppo_metrics import check_component_names
from alignkit.trainers.ppo_score import groups_batch
from alignkit.trainers.setup import build_policy

logger = logging.getLogger(__name__)

# Pairs of prompt and completion that a reward adapter scores at once.
REWARD_BATCH = 8
# Tokens whose keys and values are held at once where `rollout_batch_tokens` does not say.
ROLLOUT_TOKENS = 16_384


class ActorCritic(NamedTuple):
    """The roles on the base, and which parameters are the critic's alone: its head, and its adapter if it has one."""

    bundle: ModelBundle
    critic: tuple[nn.Parameter, ...]


def build_actor_critic(
    model: str | Path | PreTrainedModel | PeftModel,
    args: PPOConfig,
    quantization_config: Any,
    peft_config: PeftConfig | None,
) -> ActorCritic:
    """Policy, reference and critic as roles on one base.

    Raises:
        ModelError: a model without adapters, whose reference would be a second copy of it.
    """
    policy = build_policy(model, args, quantization_config, peft_config)
    if not isinstance(policy, PeftModel):
        raise ModelError(
            "PPOTrainer trains an adapter, so that policy, reference, critic and reward share one base: pass "
            "peft_config=LoraConfig(r=16, target_modules='all-linear', task_type='CAUSAL_LM'), or a PeftModel"
        )
    own = policy.active_adapters[0]
    adapters: dict[str, str | None] = {REFERENCE: None if peft_config is not None else reference_adapter(policy)}
    heads: dict[str, str] = {}
    known = set(policy.parameters())
    if args.advantage_estimator == "gae":
        add_value_head(cast(PreTrainedModel, policy.get_base_model()))
        heads[VALUE] = VALUE
        adapters[VALUE] = own
        if args.value_adapter:
            adapters[VALUE] = _add_value_adapter(policy, own)
    critic = tuple(parameter for parameter in policy.parameters() if parameter not in known)
    return ActorCritic(ModelBundle(policy, adapters={POLICY: own, **adapters}, heads=heads), critic)


def _add_value_adapter(policy: PeftModel, own: str) -> str:
    """Give the critic a trainable adapter of its own, shaped as the policy's."""
    if VALUE in policy.peft_config:
        raise ModelError(
            f"the model has an adapter called '{VALUE}' already, perhaps from an earlier trainer: remove it with "
            f"model.delete_adapter('{VALUE}'), or load the model anew"
        )
    known = set(policy.parameters())
    policy.add_adapter(VALUE, copy.deepcopy(policy.peft_config[own]))
    for parameter in policy.parameters():
        if parameter not in known:
            parameter.requires_grad_(True)
    keep_adapters_fp32(policy)
    return VALUE


def build_rewards(
    reward_funcs: Any,
    reward_processing_classes: Any,
    bundle: ModelBundle,
    args: PPOConfig,
    passes: Callable[[], Passes],
) -> RewardMix:
    """Everything that rewards a completion, as one weighted sum; `passes` are those that reward adapters go through.

    Raises:
        ConfigError: no reward, weights that do not match, or a reward called like a metric of its own.
        ModelError: a classifier or reward adapter that cannot be loaded.
    """
    made: list[AdapterReward] = []

    def from_adapter(path: str) -> AdapterReward:
        made.append(AdapterReward(bundle, path, f"reward_{len(made)}", passes))
        return made[-1]

    sources = make_reward_sources(
        reward_funcs,
        reward_processing_classes,
        adapter_source=from_adapter,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    on_error: Any = args.on_reward_error
    rewards = RewardMix(sources, args.reward_weights, on_error, args.reward_timeout_s, args.reward_batch_size)
    check_component_names(rewards.names)
    return rewards


def check_prompts(datasets: Mapping[str, Dataset], model: PreTrainedModel, rewards: RewardMix, args: PPOConfig) -> None:
    """See that the model can read and answer every prompt, and that rewards find the columns that they ask for.

    Raises:
        ConfigError: a function asks for a column that a dataset lacks.
        DataError: a column with the name of an argument of rewards, or a prompt that leaves no room for a completion.
        ModelError: a tokenizer of another model.
    """
    config = model.config.get_text_config()
    most = positions_of(config)
    for name, dataset in datasets.items():
        columns = [column for column in dataset.column_names if column not in OWN_COLUMNS]
        rewards.check_columns(columns, f"the {name} dataset")
        check_vocabulary(dataset, config.vocab_size, name)
        longest = int(np.nanmax(row_lengths(dataset, "prompt_ids")))
        if most is not None and longest + args.max_completion_length > most:
            room = most - args.max_completion_length
            remedy = f"set max_prompt_length={room} to drop longer prompts, or lower" if room > 0 else "lower"
            raise DataError(
                f"{name}: the longest prompt has {longest} tokens, which with max_completion_length="
                f"{args.max_completion_length} is more than the model's {most} positions: {remedy} "
                "max_completion_length."
            )


def fit_to_rollouts(args: PPOConfig, eval_dataset: Any) -> None:
    """Set what rollouts ask of Trainer.

    `save_steps` is rounded up to whole rollouts: between two optimizer steps of one, its episodes are state too. DDP
    does not look for unused parameters: every one has a part in every backward pass, and the search takes each of two
    forward passes (policy and critic) for all there is.

    Raises:
        ConfigError: `save_steps` as a fraction of a run whose length is not known yet.
    """
    check_best_metric(args, eval_dataset)
    args.ddp_find_unused_parameters = False
    steps = steps_per_rollout(args)
    if args.save_strategy == "best" and args.eval_strategy == "steps" and (args.eval_steps or 1) % steps:
        before, args.eval_steps = args.eval_steps, math.ceil((args.eval_steps or 1) / steps) * steps
        logger.warning(
            "eval_steps=%g becomes %d: the best model's checkpoint is made between rollouts", before, args.eval_steps
        )
    if args.save_strategy != "steps" or args.save_steps % steps == 0:
        return
    if args.save_steps < 1:
        raise ConfigError(
            f"save_steps={args.save_steps}: give a number of optimizer steps, a multiple of {steps}, because "
            "checkpoints are made between rollouts"
        )
    rounded = math.ceil(args.save_steps / steps) * steps
    logger.warning(
        "save_steps=%g becomes %d: checkpoints are made between rollouts, every %d optimizer steps",
        args.save_steps,
        rounded,
        steps,
    )
    args.save_steps = rounded
    if args.load_best_model_at_end and args.eval_strategy == "steps" and rounded % (args.eval_steps or 1):
        logger.warning(
            "eval_steps=%g becomes %d too: the best model is one of the checkpoints", args.eval_steps, rounded
        )
        args.eval_steps = rounded


def check_best_metric(args: PPOConfig, eval_dataset: Any) -> None:
    """See that the measure of the best model is one that several evaluation sets have together.

    Raises:
        ConfigError: each of them has its own.
    """
    if args.metric_for_best_model in ("reward", "eval_reward") and isinstance(eval_dataset, Mapping):
        first = next(iter(eval_dataset))
        raise ConfigError(
            f"metric_for_best_model='reward': each of the evaluation sets {list(eval_dataset)} has a reward of its "
            f"own. Choose one: metric_for_best_model='{first}_reward'."
        )


def refuse_unsupported(accelerator: Accelerator, args: PPOConfig) -> None:
    """Refuse what rollouts cannot run under.

    Raises:
        ConfigError: several GPUs in one process, or weights that are spread over processes.
    """
    refuse_data_parallel(args)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ConfigError(
            f"PPO generates with the whole model in every process, and {accelerator.distributed_type.value} spreads "
            "it over processes: use DDP (accelerate launch --multi_gpu) with a quantized base"
        )


def reward_shaping(args: PPOConfig) -> RewardShaping:
    """What happens to a reward before the algorithm sees it."""
    overlong = None
    if args.overlong_buffer_tokens:
        overlong = Overlong(
            max_tokens=args.max_completion_length,
            buffer_tokens=args.overlong_buffer_tokens,
            penalty=args.overlong_penalty,
        )
    clip = None if args.reward_clip is None else (-args.reward_clip, args.reward_clip)
    return RewardShaping(clip_range=clip, missing_eos_penalty=args.missing_eos_penalty or 0.0, overlong=overlong)


def build_engine(bundle: ModelBundle, tokenizer: Any, args: PPOConfig) -> RolloutEngine:
    """The engine that writes completions.

    Raises:
        ConfigError: nothing could end a completion.
        ModelError: a tokenizer of another model, or one that the engine cannot run.
    """
    Endings(bundle.base, tokenizer, sampling_of(args, args.temperature))
    model = cast(PeftModel, bundle.model)
    tokens = args.rollout_batch_tokens or ROLLOUT_TOKENS
    if args.rollout_engine == "continuous":
        return ContinuousEngine(model, tokenizer, max_cache_tokens=tokens)
    is_merged = args.rollout_engine == "merged"
    if is_merged and is_quantized(model):
        raise ConfigError("rollout_engine='merged' needs a 16- or 32-bit base, and this one is quantized: use 'hf'.")
    return HFEngine(model, tokenizer, max_batch_tokens=tokens, merge_adapters=is_merged)


def sampling_of(args: PPOConfig, temperature: float) -> Sampling:
    """How completions are drawn; temperature 0 is greedy."""
    return Sampling(
        max_new_tokens=args.max_completion_length,
        min_new_tokens=args.min_completion_length,
        temperature=temperature,
        stop_strings=tuple(args.stop_strings or ()),
    )


class AdapterReward:
    """A reward adapter on the policy's own base.

    Args:
        bundle: the roles; the adapter becomes one of them.
        path: a folder that `RewardTrainer` saved, or a name on the Hub.
        role: its role's name.
        passes: returns the layout and size of training's forward passes, which are known once there is a trainer.

    Attributes:
        names: one component, the mean of the adapter's heads.
        spread: standard deviation over the heads at the last call, `(B,)`; `None` for a single head.
    """

    def __init__(self, bundle: ModelBundle, path: str, role: str, passes: Callable[[], Passes]) -> None:
        self.bundle, self.role, self.passes = bundle, role, passes
        self.outputs = bundle.add_reward_adapter(path, role=role)
        self.names = (Path(path).name or role,)
        self.spread: Tensor | None = None

    @torch.no_grad()
    def __call__(self, inputs: RewardInputs) -> ComponentScores:
        """Score each completion at its last token."""
        passes = self.passes()
        rewards = passes.memory.fit(lambda: torch.cat(self._values(inputs, passes)))  # (B, K)
        self.spread = rewards.std(dim=1, correction=0) if self.outputs > 1 else None
        values = rewards.mean(dim=1, keepdim=True)
        return ComponentScores(values, torch.ones_like(values, dtype=torch.bool))

    def _values(self, inputs: RewardInputs, passes: Passes) -> list[Tensor]:
        found: list[Tensor] = []
        for start in range(0, len(inputs), REWARD_BATCH):
            part = slice(start, start + REWARD_BATCH)
            batch = groups_batch(inputs.prompt_ids[part], inputs.completion_ids[part])
            for chunk in passes.split({name: tensor.to(self.bundle.base.device) for name, tensor in batch.items()}):
                with passes.precision():
                    layout = passes.lay_out(chunk)
                    found.append(self.bundle.values(layout, layout.last_index, role=self.role).float().cpu())
        return found


def spreads(mix: RewardMix) -> list[Tensor]:
    """How far the heads of each reward adapter disagreed about each completion of the last call, `(B,)` each."""
    adapters = [source for source in mix.sources if isinstance(source, AdapterReward)]
    return [source.spread for source in adapters if source.spread is not None]
