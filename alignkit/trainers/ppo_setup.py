"""What `PPOTrainer` is handed, turned into policy, critic, reference, rewards and a rollout engine."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.data.collate import pairs_of
from alignkit.data.layout import layout_function
from alignkit.data.report import PreparationReport
from alignkit.errors import ConfigError, ModelError
from alignkit.models.adapters import keep_adapters_fp32, reference_adapter
from alignkit.models.bundle import POLICY, REFERENCE, ModelBundle
from alignkit.models.heads import VALUE, add_value_head
from alignkit.rollout.continuous import ContinuousEngine
from alignkit.rollout.engine import Endings, RolloutEngine, Sampling, check_request
from alignkit.rollout.hf import HFEngine
from alignkit.rollout.mix import RewardMix
from alignkit.rollout.reward import ComponentScores, RewardInputs
from alignkit.rollout.shaping import Overlong, RewardShaping
from alignkit.rollout.sources import make_reward_sources
from alignkit.trainers.passes import refuse_data_parallel
from alignkit.trainers.ppo_callbacks import steps_per_rollout
from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.ppo_data import OWN_COLUMNS
from alignkit.trainers.ppo_metrics import check_component_names
from alignkit.trainers.ppo_ptx import TEXTS
from alignkit.trainers.ppo_score import groups_batch
from alignkit.trainers.setup import build_policy, each_dataset

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
    train_dataset: Dataset,
    eval_dataset: Dataset | Mapping[str, Dataset] | None,
) -> RewardMix:
    """Everything that rewards a completion, as one weighted sum.

    Raises:
        ConfigError: weights that do not match, or a function that asks for a column that a dataset lacks.
        DataError: a column that has the name of an argument of rewards.
        ModelError: a classifier or reward adapter that cannot be loaded.
    """
    made: list[AdapterReward] = []

    def from_adapter(path: str) -> AdapterReward:
        made.append(AdapterReward(bundle, path, f"reward_{len(made)}"))
        return made[-1]

    sources = make_reward_sources(
        reward_funcs,
        reward_processing_classes,
        adapter_source=from_adapter,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    on_error: Any = args.on_reward_error
    mix = RewardMix(sources, args.reward_weights, on_error, args.reward_timeout_s, args.reward_batch_size)

    def check(dataset: Dataset, name: str) -> None:
        mix.check_columns([column for column in dataset.column_names if column not in OWN_COLUMNS], name)

    check(train_dataset, "train_dataset")
    each_dataset(eval_dataset, check, "eval_dataset")
    check_component_names(mix.names)
    return mix


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


def build_engine(
    bundle: ModelBundle, tokenizer: Any, args: PPOConfig, reports: Mapping[str, PreparationReport]
) -> RolloutEngine:
    """The engine that writes completions; `reports` tell of the prompts that it will be given.

    Raises:
        ConfigError: nothing could end a completion.
        DataError: a prompt that leaves the model no room for a completion.
        ModelError: a tokenizer of another model, or one that the engine cannot run.
    """
    sampling = sampling_of(args, args.temperature)
    Endings(bundle.base, tokenizer, sampling)
    longest = max(max(report.token_lengths["prompt"]) for name, report in reports.items() if name != TEXTS)
    check_request(bundle.base, [[0] * longest], [[0]], sampling)
    model = cast(PeftModel, bundle.model)
    tokens = args.rollout_batch_tokens or ROLLOUT_TOKENS
    if args.rollout_engine == "hf":
        return HFEngine(model, tokenizer, max_batch_tokens=tokens)
    return ContinuousEngine(model, tokenizer, max_cache_tokens=tokens)


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

    Attributes:
        names: one component, the mean of the adapter's heads.
        spread: standard deviation over the heads at the last call, `(B,)`; `None` for a single head.
    """

    def __init__(self, bundle: ModelBundle, path: str, role: str) -> None:
        self.bundle, self.role = bundle, role
        self.outputs = bundle.add_reward_adapter(path, role=role)
        self.names = (Path(path).name or role,)
        self.spread: Tensor | None = None

    @torch.no_grad()
    def __call__(self, inputs: RewardInputs) -> ComponentScores:
        """Score each completion at its last token."""
        device = self.bundle.base.device
        found = []
        for start in range(0, len(inputs), REWARD_BATCH):
            part = slice(start, start + REWARD_BATCH)
            batch = groups_batch(inputs.prompt_ids[part], inputs.completion_ids[part])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            layout = layout_function("padded")(pairs_of(batch), 0)
            found.append(self.bundle.values(layout, layout.last_index, role=self.role).float().cpu())
        rewards = torch.cat(found)  # (B, K)
        self.spread = rewards.std(dim=1, correction=0) if self.outputs > 1 else None
        values = rewards.mean(dim=1, keepdim=True)
        return ComponentScores(values, torch.ones_like(values, dtype=torch.bool))


def spreads(mix: RewardMix) -> list[Tensor]:
    """How far the heads of each reward adapter disagreed about each completion of the last call, `(B,)` each."""
    adapters = [source for source in mix.sources if isinstance(source, AdapterReward)]
    return [source.spread for source in adapters if source.spread is not None]
