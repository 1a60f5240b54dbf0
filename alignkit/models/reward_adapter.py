"""Reward adapters: LoRA and a head `score`, trained on a causal language model, or put on a base that others share.

On disk such an adapter is PEFT's, of task type `SEQ_CLS`, with `score` among its `modules_to_save`: transformers'
sequence classifiers load it (`alignkit.models.reward_files`), and so does the causal language model that is the base of
a policy, where it costs an adapter instead of a second model.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple, cast

from peft import LoraConfig, PeftConfig, PeftModel, TaskType
from transformers import PreTrainedModel

from alignkit.errors import ModelError
from alignkit.models.adapters import CustomModules, add_frozen_adapter, continue_adapter
from alignkit.models.heads import SCORE, add_reward_head, has_head, put_head
from alignkit.models.load import load_model
from alignkit.models.source import Source, hub_kwargs_of, locate
from alignkit.models.untrusted.adapters import find_adapter

# PEFT adds these to `modules_to_save` of every classifier, and would once more with every round of loading and saving.
_PEFT_HEADS = ("classifier", SCORE)


class SavedReward(NamedTuple):
    """A reward adapter on disk: where, and the number of its heads."""

    source: Source
    config: PeftConfig
    outputs: int


def find_reward_adapter(path: str | Path, **hub_kwargs: Any) -> SavedReward | None:
    """Say what the reward adapter in `path` is, or return None where there is another kind of model.

    Raises:
        ModelError: there is nothing, or a `SEQ_CLS` adapter without the weights of a head `score`.
    """
    source = locate(path, hub_kwargs)
    if source.adapter is None or source.adapter.task_type != TaskType.SEQ_CLS:
        return None
    tensors = find_adapter(source.name, **hub_kwargs_of(source)).tensors
    heads = [tensor for name, tensor in tensors.items() if name.endswith(f".{SCORE}.weight")]
    if len(heads) != 1:
        raise ModelError(
            f"'{path}' is an adapter of a sequence classifier without a head '{SCORE}', so it gives no rewards. Train "
            "one with RewardTrainer, or save yours with modules_to_save=['score']."
        )
    return SavedReward(source, source.adapter, heads[0].shape[0])


def reward_peft_config(peft_config: Any) -> Any:
    """Return a copy of an adapter's configuration with the task type of reward models; PEFT adds the head itself.

    Raises:
        ModelError: the adapter is for another task, or is to train the model's output layer, which never runs.
    """
    if not isinstance(peft_config, PeftConfig):
        return peft_config  # `add_adapter` says what is wrong
    if peft_config.task_type not in (None, TaskType.CAUSAL_LM, TaskType.SEQ_CLS):
        raise ModelError(f"peft_config has task_type '{peft_config.task_type}': a reward model needs 'SEQ_CLS'")
    config = copy.deepcopy(peft_config)
    config.task_type = TaskType.SEQ_CLS
    if isinstance(config, LoraConfig):
        targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or ()
        if "lm_head" in {*targets, *(config.modules_to_save or ())}:
            raise ModelError(
                "peft_config trains 'lm_head', but a reward model computes no logits: leave it out. The head 'score' "
                "is trained in any case."
            )
        kept = [name for name in config.modules_to_save or () if name not in _PEFT_HEADS]
        config.modules_to_save = kept or None
    return config


def load_reward_policy(
    name: str | Path,
    *,
    custom_modules: CustomModules | None = None,
    trust_remote_code: bool = False,
    **loading: Any,
) -> PreTrainedModel | PeftModel:
    """Load a model to train rewards on: a base, or a reward adapter on its base, to be trained on.

    Args:
        name: as for `load_model`.
        custom_modules, trust_remote_code: as for `load_model`.
        **loading: its further arguments.

    Raises:
        ModelError: an adapter that is no reward adapter, or what `load_model` raises.
    """
    source = locate(name, {})
    saved = find_reward_adapter(name) if source.adapter is not None else None
    if saved is None and source.adapter is not None:
        raise ModelError(
            f"'{name}' is an adapter of a language model. Merge it into its base (merge_and_unload, save_pretrained) "
            "and give the merged model: a reward adapter is trained on a base without adapters."
        )
    where = name if saved is None else source.base
    base = load_model(where, trust_remote_code=trust_remote_code, **loading)
    if saved is None:
        return base
    if isinstance(base, PeftModel):
        raise ModelError(f"the base of the reward adapter '{name}' is itself an adapter; merge that one first")
    put_head(base, SCORE, saved.outputs)
    return continue_adapter(base, source.name, reward_peft_config(saved.config), custom_modules=custom_modules)


def with_reward_head(model: PreTrainedModel | PeftModel, outputs: int) -> PreTrainedModel | PeftModel:
    """Give a base its head; see that an adapter that is trained on has one with as many outputs.

    The output layer of a model that is trained whole is frozen, unless it is the input embeddings: it never runs.

    Raises:
        ModelError: a `PeftModel` without a head, or a head with another number of outputs.
    """
    if not isinstance(model, PeftModel):
        add_reward_head(model, outputs)
        embeddings: Any = model.get_input_embeddings()
        output_layer: Any = model.get_output_embeddings()
        if output_layer.weight is not embeddings.weight:
            output_layer.requires_grad_(False)
        return model
    base: Any = model.get_base_model()
    if not has_head(base, SCORE):
        raise ModelError(
            f"the model has an adapter, but no reward head '{SCORE}' to train. Pass the base and a peft_config, or the "
            "folder of a reward adapter."
        )
    found = base.get_submodule(SCORE).original_module.outputs
    if found != outputs:
        raise ModelError(f"the reward adapter has {found} heads and num_heads={outputs}: set num_heads={found}")
    return model


def add_reward_adapter(
    model: PeftModel,
    path: str | Path,
    name: str,
    *,
    custom_modules: CustomModules | None = None,
) -> int:
    """Put a saved reward adapter on the base of `model`, frozen, inactive and in fp32; return the number of its heads.

    `models/bundle.py` calls this; what is worn and what is trainable are its affair.

    Raises:
        ModelError: no reward adapter, or one of another base.
    """
    saved = find_reward_adapter(path)
    if saved is None:
        raise ModelError(
            f"'{path}' holds no reward adapter: give the output folder of a RewardTrainer that trained a LoRA adapter"
        )
    base = cast(PreTrainedModel, model.get_base_model())
    recorded = saved.config.base_model_name_or_path
    if recorded and not _is_same_base(saved.source, base.config._name_or_path):
        raise ModelError(
            f"the reward adapter '{path}' was trained on '{recorded}', and the base here is "
            f"'{base.config._name_or_path}': its rewards would mean nothing. Use the same base for both, or load the "
            "reward model by itself with alignkit.load_reward_model and pass its model and tokenizer. If the two are "
            "the same weights under two names, write the name used here into its adapter_config.json."
        )
    is_first = not has_head(base, SCORE)
    if is_first:
        put_head(base, SCORE, saved.outputs)
    try:
        add_frozen_adapter(
            model,
            saved.source.name,
            name,
            copy.deepcopy(saved.config),
            custom_modules=custom_modules,
            **hub_kwargs_of(saved.source),
        )
    except ModelError:
        if is_first:
            delattr(base, SCORE)
        raise
    return saved.outputs


def _is_same_base(source: Source, name: str) -> bool:
    """Whether the base that an adapter recorded is the model called `name`; a base without a name may be any."""
    if not name or name in (source.base, source.adapter and source.adapter.base_model_name_or_path):
        return True
    recorded, found = Path(source.base).expanduser(), Path(name).expanduser()
    return recorded.is_dir() and found.is_dir() and recorded.resolve() == found.resolve()
