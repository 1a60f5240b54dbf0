"""Runs of what must be refused: what was raised, whether a model ran before it, and what became of the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel, Trainer

from alignkit.checkpoint.lock import LOCK
from alignkit.models.adapters import add_adapter
from alignkit.trainers.reward import RewardTrainer
from alignkit.trainers.reward_config import RewardConfig
from tests.model_factory import tiny_model
from tests.rollout.reward_samples import tiny_classifier
from tests.tiny_preferences import QUIET, character_tokenizer, lora, text_rows

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


class Made(NamedTuple):
    """A value that is made when its case runs, with the folder of saved models."""

    make: Callable[[Path], Any]


class Case(NamedTuple):
    """What is given, what must be raised, and how its message reads (a regular expression).

    `late` cases can only be known once the first rollout has been rewarded.
    """

    given: Mapping[str, Any]
    error: type[Exception]
    message: str
    late: bool = False


class Outcome(NamedTuple):
    """What became of a case; `passes` are forward passes of whole models."""

    error: Exception | None
    passes: int
    steps: int
    is_output_unchanged: bool


class Attempts:
    """Runs cases, each once.

    Args:
        cases: by name.
        build: makes a trainer that writes to a folder, of what a case gives.
        folder: where runs go.
        models: where saved models are.
    """

    def __init__(
        self, cases: Mapping[str, Case], build: Callable[..., Trainer], folder: Path, models: Path | None = None
    ) -> None:
        self._cases, self._build, self._folder, self._models = cases, build, folder, models or folder
        self._outcomes: dict[str, Outcome] = {}

    def run(self, name: str) -> Outcome:
        """Make and train what case `name` gives, in a folder that holds an earlier run."""
        if name not in self._outcomes:
            self._outcomes[name] = self._attempt(name)
        return self._outcomes[name]

    def _attempt(self, name: str) -> Outcome:
        given = {
            key: value.make(self._models) if isinstance(value, Made) else value
            for key, value in self._cases[name].given.items()
        }
        output = self._folder / f"run{len(self._outcomes)}"
        (output / "checkpoint-3").mkdir(parents=True)
        for file in (output / "adapter.bin", output / "checkpoint-3" / "trainer_state.json"):
            file.write_bytes(b"an earlier run")
        before = _content(output)
        error, trainer = None, None
        with _counted() as passes:
            try:
                trainer = self._build(output, **given)
                trainer.train()
            except Exception as raised:  # noqa: BLE001 - whatever it is, the case says whether it is right
                error = raised
        steps = 0 if trainer is None else trainer.state.global_step
        return Outcome(error, len(passes), steps, _content(output) == before)


def _content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != LOCK
    }


@contextmanager
def _counted() -> Iterator[list[str]]:
    """Gather the class of every whole model that runs."""
    passes: list[str] = []

    def note(module: Any, args: Any) -> None:
        if isinstance(module, PreTrainedModel):
            passes.append(type(module).__name__)

    hook = register_module_forward_pre_hook(note)
    try:
        yield passes
    finally:
        hook.remove()


def save_models(folder: Path) -> Path:
    """Save a base, other models, and adapters that were trained on the base."""
    tokenizer = character_tokenizer()
    models = {
        "base": tiny_model("llama"),
        "other": tiny_model("llama", seed=1),
        "wide": tiny_model("llama", hidden_size=64),
        "two": tiny_classifier("llama", num_labels=2),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, heads in (("reward", 1), ("ensemble", 3)):
        reward_trainer(folder / name, model=str(folder / "base"), num_heads=heads).save_model()
    add_adapter(tiny_model("llama"), lora()).save_pretrained(str(folder / "policy"))
    (folder / "empty").mkdir()
    return folder


def reward_trainer(folder: Path, **given: Any) -> RewardTrainer:
    """A tiny reward model's trainer, of arguments of the trainer and options of its configuration."""
    names = ("model", "args", "train_dataset", "eval_dataset", "processing_class", "peft_config")
    arguments = {name: given.pop(name) for name in names if name in given}
    options = {**QUIET, "max_steps": 1, "per_device_train_batch_size": 4, "activation_checkpointing": False, **given}
    return RewardTrainer(
        **{
            "model": tiny_model("llama") if "model" not in arguments else None,
            "args": RewardConfig(str(folder), **options) if "args" not in arguments else None,
            "train_dataset": text_rows(8),
            "processing_class": character_tokenizer(),
            "peft_config": lora(task_type="SEQ_CLS"),
            **arguments,
        }
    )


def tokenizer_with(**changed: Any) -> Any:
    """The tests' tokenizer with other special tokens or a chat template."""
    tokenizer = character_tokenizer()
    for name, value in changed.items():
        setattr(tokenizer, name, value)
    return tokenizer
