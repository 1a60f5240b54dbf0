"""alignkit: align language models with human preferences on one consumer GPU, or none.

Names are imported when they are first used, so that `import alignkit` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alignkit.data.collate import DPOCollator
    from alignkit.data.prepare import prepare_preferences
    from alignkit.data.show import show_example
    from alignkit.data.sources import load_preferences
    from alignkit.errors import (
        AlignkitError,
        CheckpointError,
        ConfigError,
        DataError,
        ModelError,
        PublishError,
        TrainingError,
    )
    from alignkit.functional.preference import LOSSES
    from alignkit.hub.publish import publish
    from alignkit.models.bundle import ModelBundle
    from alignkit.models.load import int8, nf4
    from alignkit.models.memory import memory_report
    from alignkit.models.reward_files import load_reward_model
    from alignkit.trainers.config import DPOConfig
    from alignkit.trainers.dpo import DPOTrainer
    from alignkit.trainers.ppo import PPOTrainer
    from alignkit.trainers.ppo_callbacks import PPOCallback, RewardCallback, RolloutCallback, StopOnKL, ValueCallback
    from alignkit.trainers.ppo_config import PPOConfig
    from alignkit.trainers.ppo_doctor import PPODoctor
    from alignkit.trainers.reward import RewardTrainer
    from alignkit.trainers.reward_config import RewardConfig

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "AlignkitError",
    "CheckpointError",
    "ConfigError",
    "DPOCollator",
    "DPOConfig",
    "DPOTrainer",
    "DataError",
    "ModelBundle",
    "ModelError",
    "PPOCallback",
    "PPOConfig",
    "PPODoctor",
    "PPOTrainer",
    "PublishError",
    "RewardCallback",
    "RewardConfig",
    "RewardTrainer",
    "RolloutCallback",
    "StopOnKL",
    "TrainingError",
    "ValueCallback",
    "__version__",
    "int8",
    "load_preferences",
    "load_reward_model",
    "memory_report",
    "nf4",
    "prepare_preferences",
    "publish",
    "show_example",
]

# Where each public name lives. A new name needs a row here, one in `__all__` and one in the block above.
_MODULE_OF = {
    "DPOCollator": "alignkit.data.collate",
    "prepare_preferences": "alignkit.data.prepare",
    "show_example": "alignkit.data.show",
    "load_preferences": "alignkit.data.sources",
    "AlignkitError": "alignkit.errors",
    "CheckpointError": "alignkit.errors",
    "ConfigError": "alignkit.errors",
    "DataError": "alignkit.errors",
    "ModelError": "alignkit.errors",
    "PublishError": "alignkit.errors",
    "TrainingError": "alignkit.errors",
    "LOSSES": "alignkit.functional.preference",
    "publish": "alignkit.hub.publish",
    "ModelBundle": "alignkit.models.bundle",
    "int8": "alignkit.models.load",
    "nf4": "alignkit.models.load",
    "memory_report": "alignkit.models.memory",
    "load_reward_model": "alignkit.models.reward_files",
    "DPOConfig": "alignkit.trainers.config",
    "DPOTrainer": "alignkit.trainers.dpo",
    "PPOTrainer": "alignkit.trainers.ppo",
    "PPOCallback": "alignkit.trainers.ppo_callbacks",
    "RewardCallback": "alignkit.trainers.ppo_callbacks",
    "RolloutCallback": "alignkit.trainers.ppo_callbacks",
    "StopOnKL": "alignkit.trainers.ppo_callbacks",
    "ValueCallback": "alignkit.trainers.ppo_callbacks",
    "PPOConfig": "alignkit.trainers.ppo_config",
    "PPODoctor": "alignkit.trainers.ppo_doctor",
    "RewardTrainer": "alignkit.trainers.reward",
    "RewardConfig": "alignkit.trainers.reward_config",
}


def __getattr__(name: str) -> object:
    """Import the module that holds `name` and keep the result, so that this runs once per name."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'alignkit' has no attribute {name!r}")
    value = vars(import_module(_MODULE_OF[name]))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
