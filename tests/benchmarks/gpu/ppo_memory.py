"""What PPO with four roles on one base takes on a card of a given memory: `python -m ... job.json result.json`.

Every card is a process of its own, which runs the recipe of that card on a random model of the real one's shape.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from alignkit.cli import ModelArguments, RecipeParser, RewardArguments, ScriptArguments
from alignkit.models.adapters import add_adapter
from alignkit.models.reward_adapter import reward_peft_config, with_reward_head
from alignkit.rollout.collect import Rollout
from alignkit.trainers.ppo import PPOTrainer
from alignkit.trainers.ppo_callbacks import PPOCallback, steps_per_rollout
from alignkit.trainers.ppo_config import PPOConfig
from tests.benchmarks.gpu.card import FAILURES, GIB, Clock, capped, described, quiet
from tests.benchmarks.gpu.script import Call
from tests.benchmarks.gpu.shapes import FIRST_WORD, Shape, eight_billion, empty_model, large_model, word_tokenizer

ROOT = Path(__file__).resolve().parents[3]
RECIPES = ROOT / "recipes" / "configs"
UPDATES = 2
PROMPT_TOKENS, COMPLETION_TOKENS = 1024, 512
DRY_SHRINK = 16  # lengths and bounds of a dry run are the recipe's over this
LENGTHS = ("max_prompt_length", "max_completion_length", "max_tokens_per_forward", "rollout_batch_tokens")


@dataclass(frozen=True, slots=True)
class Job:
    """One card in one process, as it is handed over in a JSON file.

    Attributes:
        cap_gb: the card's memory.
        prompts: of a rollout; 0 for as many as the recipe says.
        is_dry: tiny, on the CPU.
    """

    cap_gb: float
    prompts: int
    is_dry: bool

    @property
    def recipe(self) -> Path:
        """The configuration for this card."""
        return RECIPES / f"ppo-llama-3.1-8b-{self.cap_gb:g}gb.yaml"


@dataclass(slots=True)
class Measurement:
    """What a card gave.

    Attributes:
        passed: it ran, or ran out of memory; `None` where it was not run to its end for lack of time.
        stage: what it was doing last.
        roles: on the base.
        settings: those of the recipe that bound memory, and the prompts of a rollout.
        base_bytes, peak_allocated_bytes, peak_reserved_bytes: 0 on a CPU.
        update_seconds: of each update, rollout included.
        rollout_seconds: of each update's generation, rewards and scoring.
        completion_tokens: of each update.
    """

    name: str
    cap_gb: float
    passed: bool | None = None
    fits: bool = False
    stage: str = "load"
    roles: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    base_bytes: int = 0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    update_seconds: list[float] = field(default_factory=list)
    rollout_seconds: list[dict[str, float]] = field(default_factory=list)
    completion_tokens: list[int] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    note: str = ""


# --- in the process of one card ---


class Recorder(PPOCallback):
    """Notes where a run is, and writes what it has after every update, in case that is all there will be."""

    def __init__(self, result: Measurement, device: torch.device, path: Path) -> None:
        self.result, self.device, self.path = result, device, path

    def on_rollout_begin(self, *args: Any, **kwargs: Any) -> None:
        self.result.stage = "generate and reward"

    def on_rewards(self, *args: Any, **kwargs: Any) -> None:
        self.result.stage = "score"

    def on_rollout_end(self, *args: Any, rollout: Rollout, **kwargs: Any) -> None:
        self.result.stage = "train"
        self.result.rollout_seconds.append(dict(rollout.seconds))
        self.result.completion_tokens.append(sum(len(completion.ids) for completion in rollout.completions))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % steps_per_rollout(args) == 0:
            self.write()

    def write(self) -> None:
        """Write the result with the peaks so far."""
        if self.device.type == "cuda":
            self.result.peak_allocated_bytes = torch.cuda.max_memory_allocated(self.device)
            self.result.peak_reserved_bytes = torch.cuda.max_memory_reserved(self.device)
        self.path.write_text(json.dumps(asdict(self.result)), encoding="utf-8")


def measure(job: Job, path: Path) -> Measurement:
    """Make a few updates under the card's cap; `path` gets the result as it grows."""
    device = torch.device("cpu") if job.is_dry else torch.device("cuda", torch.cuda.current_device())
    result = Measurement(f"{job.cap_gb:g} GB", job.cap_gb)
    recorder = Recorder(result, device, path)
    recorder.write()
    with capped(job.cap_gb, device), tempfile.TemporaryDirectory() as folder:
        try:
            _train(job, result, recorder, Path(folder))
            result.fits = result.passed = True
        except torch.OutOfMemoryError:
            result.passed = True  # that is an answer too
        except FAILURES as error:
            result.passed, result.note = False, described(error)
        recorder.write()
    return result


def _train(job: Job, result: Measurement, recorder: Recorder, folder: Path) -> None:
    shape, _ = eight_billion(tiny=job.is_dry)
    device = recorder.device
    save_reward_adapter(shape, folder / "reward")
    model_arguments, reward, args = read_recipe(job, folder)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    base = large_model(shape, dtype, device)
    if device.type == "cuda":
        result.base_bytes = torch.cuda.memory_allocated(device)
    clock = Clock(device, steps_per_rollout(args))
    result.update_seconds = clock.seconds  # it grows
    prompts = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.num_mini_batches
    lengths: dict[str, Any] = {name: vars(args)[name] for name in LENGTHS}
    result.settings = {"prompts": prompts, **lengths}
    with quiet():
        trainer = PPOTrainer(
            base,
            reward.reward_model,
            args,
            Dataset.from_list(prompt_rows(prompts, lengths["max_prompt_length"], shape.vocabulary)),
            processing_class=word_tokenizer(shape.vocabulary),
            peft_config=model_arguments.to_peft_config(),
            callbacks=[clock, recorder],
        )
        result.roles = sorted(trainer.bundle.adapters)
        trainer.train()
    norms = [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]
    result.gradient_norms = norms
    tokens = set(trainer.reports["train"].token_lengths["prompt"])
    if tokens != {lengths["max_prompt_length"]}:
        raise ValueError(f"prompts were to have {lengths['max_prompt_length']} tokens, and have {sorted(tokens)}")
    wanted = [prompts * lengths["max_completion_length"]] * UPDATES
    if result.completion_tokens != wanted:
        raise ValueError(f"updates were to generate {wanted} tokens, and generated {result.completion_tokens}")
    if not norms or not all(math.isfinite(norm) and norm > 0 for norm in norms):
        raise ValueError(f"gradient norms {norms}: nothing was trained")


def read_recipe(job: Job, folder: Path) -> tuple[ModelArguments, RewardArguments, PPOConfig]:
    """The recipe's own options, except for what a measurement must change: lengths are forced, the run is short."""
    parser = RecipeParser((ScriptArguments, ModelArguments, RewardArguments, PPOConfig))
    own = ["--config", str(job.recipe), "--output_dir", str(folder / "output")]
    recipe: PPOConfig = parser.parse(own)[3]
    changes: dict[str, Any] = {
        "reward_model": folder / "reward",
        "max_steps": UPDATES * steps_per_rollout(recipe),
        "min_completion_length": recipe.max_completion_length,
        "report_to": "none",
        "disable_tqdm": "true",
    }
    if job.is_dry:
        changes |= {name: int(vars(recipe)[name]) // DRY_SHRINK for name in LENGTHS}
        changes |= {"min_completion_length": changes["max_completion_length"], "use_cpu": "true"}
    if job.prompts:
        steps = recipe.num_mini_batches * recipe.gradient_accumulation_steps
        if job.prompts % steps:
            raise ValueError(f"--prompts {job.prompts}: {job.recipe.name} divides a rollout by {steps}")
        changes["per_device_train_batch_size"] = job.prompts // steps
    given = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    _, model, reward, args = parser.parse([*own, *given])
    return model, reward, args


def prompt_rows(count: int, tokens: int, vocabulary: int) -> list[dict[str, str]]:
    """Prompts of exactly so many tokens."""
    source = random.Random(0)
    words = range(FIRST_WORD, vocabulary)
    return [{"prompt": " ".join(map(str, source.choices(words, k=tokens)))} for _ in range(count)]


def save_reward_adapter(shape: Shape, folder: Path) -> None:
    """Save a random reward adapter for a base of this shape, without the base."""
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    base: Any = with_reward_head(empty_model(shape, torch.float32), 1)
    model = add_adapter(base, reward_peft_config(config))
    generator = torch.Generator().manual_seed(0)
    names = get_peft_model_state_dict(model, save_embedding_layers=False)
    folder.mkdir()
    save_file(
        {name: 0.02 * torch.randn(empty.shape, generator=generator) for name, empty in names.items()},
        folder / "adapter_model.safetensors",
    )
    model.peft_config["default"].save_pretrained(str(folder))


# --- in the script ---


def run(call: Call) -> list[dict[str, Any]]:
    """Measure every card in turn, each in a process of its own; one that fails is a row like the others."""
    found = []
    for cap_gb in call.arguments.caps:
        job = Job(cap_gb, call.arguments.prompts, call.arguments.cpu_dry_run)
        found.append(measure_apart(job, call.deadline - time.monotonic()))
        print(_line(found[-1]), flush=True)
    return found


def measure_apart(job: Job, seconds: float) -> dict[str, Any]:
    """Measure one card in a process that has so many seconds."""
    if seconds <= 0:
        return asdict(Measurement(f"{job.cap_gb:g} GB", job.cap_gb, note="left out: no time"))
    with tempfile.TemporaryDirectory() as folder:
        job_path, path = Path(folder) / "job.json", Path(folder) / "result.json"
        job_path.write_text(json.dumps(asdict(job)), encoding="utf-8")
        command = [sys.executable, "-m", "tests.benchmarks.gpu.ppo_memory", str(job_path), str(path)]
        ended = ""
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
            if done.returncode:
                ended = f"exit code {done.returncode}: {done.stderr.strip()[-500:]}"
        except subprocess.TimeoutExpired:
            ended = "stopped: no time"
        result = asdict(Measurement(f"{job.cap_gb:g} GB", job.cap_gb))
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
    if ended:
        result |= {"note": ended, "passed": None if ended.startswith("stopped") else False}
    return result


def table(measurements: list[dict[str, Any]], call: Call) -> str:
    """Measurements as markdown."""
    lines = [
        f"Llama-like, {call.shape.label}; policy, reference, critic and reward adapter on one base; the recipe of each "
        f"card, with prompts of {PROMPT_TOKENS} and completions of {COMPLETION_TOKENS} tokens; {UPDATES} updates, "
        "times of the last" + (f". **{call.note}.**" if call.note else "."),
        "",
        "| card, GB | prompts / update | base, GiB | peak allocated, GiB | peak reserved, GiB | s / update "
        "| of it generating | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in measurements:
        sizes = (each[f"{name}_bytes"] / GIB for name in ("base", "peak_allocated", "peak_reserved"))
        memory = " | ".join(f"{size:.2f}" for size in sizes)
        lines.append(
            f"| {each['cap_gb']:g} | {each['settings'].get('prompts', '')} | {memory} | {_times(each)} "
            f"| {_verdict(each)} |"
        )
    return "\n".join(lines)


def _times(each: dict[str, Any]) -> str:
    if not each["update_seconds"]:
        return " | "
    last = len(each["update_seconds"]) - 1
    seconds = each["update_seconds"][last]
    return f"{seconds:.1f} | {each['rollout_seconds'][last]['generate'] / seconds:.0%}"


def _verdict(each: dict[str, Any]) -> str:
    if each["note"]:
        return each["note"].replace("\n", " ").replace("|", "/")
    return "fits" if each["fits"] else f"DOES NOT FIT: out of memory at '{each['stage']}'"


def _line(each: dict[str, Any]) -> str:
    peak = each["peak_allocated_bytes"] / GIB
    return f"{each['name']}: {_verdict(each)}, {len(each['update_seconds'])} updates, peak {peak:.2f} GiB"


def main(argv: list[str]) -> int:
    """Read a job, run it, write its result."""
    measure(Job(**json.loads(Path(argv[1]).read_text(encoding="utf-8"))), Path(argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
