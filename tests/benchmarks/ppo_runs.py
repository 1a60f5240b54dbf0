"""The runs of the PPO benchmark: what is the same for all, what differs, and the bars they are held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.runs import Bar

PROMPTS = 8  # a rollout; there are no others, so every update of every side sees the same ones
COMPLETION_TOKENS = 48
PPO_EPOCHS = 4
MAX_PROMPT_TOKENS = 256

# Options that both sides spell alike.
COMMON: dict[str, Any] = {
    "num_ppo_epochs": PPO_EPOCHS,
    "num_mini_batches": 1,
    "learning_rate": 1e-4,
    "temperature": 0.7,
    "kl_coef": 0.05,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": True,
}


@dataclass(frozen=True, slots=True)
class PPORun:
    """One way to make the same update.

    Attributes:
        side: "trl" or "alignkit".
        summary: the row's description in tables.
        prompts_per_batch: micro-batch; gradient accumulation brings a rollout to `PROMPTS`.
        lora_critic: TRL's value model trains an adapter and not all of its weights. (alignkit's is a head on the
            policy's trunk.)
        settings: further fields of the side's `PPOConfig`.
    """

    side: str
    summary: str
    prompts_per_batch: int = PROMPTS
    lora_critic: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


_OURS = {"activation_checkpointing": False}
_OFF = {"gradient_checkpointing": False}

# In the order of one repeat: sides alternate.
PPO_RUNS: dict[str, PPORun] = {
    "trl_default": PPORun("trl", "TRL 1.12, its defaults (batch 8, critic trained whole)"),
    "ours_full_length": PPORun(
        "alignkit",
        "alignkit, EOS forbidden, so that completions are as long as TRL's",
        settings={**_OURS, "min_completion_length": COMPLETION_TOKENS},
    ),
    "trl_lora_critic": PPORun("trl", "TRL 1.12, critic with LoRA (batch 8)", lora_critic=True, settings=_OFF),
    "ours": PPORun("alignkit", "alignkit, completions end at EOS", settings=_OURS),
    "trl_best": PPORun("trl", "TRL 1.12, critic with LoRA, batch 1 × 8", 1, lora_critic=True, settings=_OFF),
}

PPO_BARS: tuple[Bar, ...] = (
    Bar("ours_full_length", "trl_default", "speed", 3.0),
    Bar("ours_full_length", "trl_default", "memory", 0.4),
    Bar("ours_full_length", "trl_lora_critic", "speed"),
    Bar("ours_full_length", "trl_lora_critic", "memory"),
    Bar("ours_full_length", "trl_best", "speed"),
    Bar("ours_full_length", "trl_best", "memory"),
    Bar("ours", "trl_default", "speed"),
)


@dataclass(frozen=True, slots=True)
class PPOJob:
    """One run in one process, as it is handed over in a JSON file.

    Attributes:
        run: a name in `PPO_RUNS`.
        model: a folder.
        rows: a JSON file of rows with `prompt`, `prompt_ids`, and `probe_ids`, a completion to reward.
        classifier: folder of the reward model as a sequence classifier.
        adapter: folder of the same reward model as an adapter of `model`.
        scratch: a folder for whatever the run writes.
        updates, warmup: rollouts that count, with their optimizer steps, and those before them.
        threads: of PyTorch.
    """

    run: str
    model: str
    rows: str
    classifier: str
    adapter: str
    scratch: str
    updates: int
    warmup: int
    threads: int
