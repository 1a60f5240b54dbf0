"""Precomputed reference log-probabilities: what shares a cache entry, what does not, and what a bad file does."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file

from alignkit.data.collate import DPOCollator, pairs_of
from alignkit.errors import ConfigError, TrainingError
from alignkit.models.adapters import add_adapter, reference_adapter
from alignkit.models.bundle import REFERENCE, ModelBundle
from alignkit.models.load import load_model, nf4
from alignkit.models.lora import FUSED_LORA
from alignkit.trainers import reference_cache
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from alignkit.trainers.reference_cache import COLUMNS, model_digest
from tests.model_factory import tiny_model
from tests.models.conftest import character_tokenizer
from tests.pair_factory import fill_adapter, lora_config, our_model, plain_token_logps, random_rows

ROWS = random_rows(7)


def dataset(rows=ROWS) -> Dataset:
    return Dataset.from_list(rows)


def trainer(tmp_path: Path, model=None, rows=ROWS, peft_config=None, **options) -> DPOTrainer:
    """A trainer over tokenised rows; its cache lies in `tmp_path / "cache"`."""
    settings = {
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "precompute_ref_log_probs": True,
        "reference_cache_dir": str(tmp_path / "cache"),
        **options,
    }
    return DPOTrainer(
        tiny_model("llama") if model is None else model,
        args=DPOConfig(str(tmp_path / "out"), **settings),
        train_dataset=dataset(rows),
        processing_class=character_tokenizer(eos_token="</s>", pad_token="<pad>"),
        peft_config=lora_config() if peft_config is None and not isinstance(model, PeftModel) else peft_config,
    )


def files(tmp_path: Path) -> set[str]:
    folder = tmp_path / "cache"
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {name for name in names if not name.endswith(".lock")}


def columns(run: DPOTrainer) -> torch.Tensor:
    return torch.tensor([run.train_dataset[name] for name in COLUMNS]).T


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the datasets that were really scored."""
    names: list[str] = []
    compute = reference_cache._compute

    def record(run, data, rows, name):
        names.append(name)
        return compute(run, data, rows, name)

    monkeypatch.setattr(reference_cache, "_compute", record)
    return names


def test_columns_are_the_references_own_sums(tmp_path):
    run = trainer(tmp_path)
    pairs = pairs_of(DPOCollator()(ROWS))
    with torch.no_grad():
        logps = plain_token_logps(tiny_model("llama"), pairs)
    sums = [part.sum() for part in logps.split(pairs.lengths[:, 1:].flatten().tolist())]
    torch.testing.assert_close(columns(run), torch.stack(sums).view(-1, 2), rtol=1e-5, atol=1e-5)
    (name,) = files(tmp_path)
    assert name.endswith(".safetensors")
    assert load_file(tmp_path / "cache" / name)["logps"].shape == (len(ROWS), 2)


HITS = {
    "learning rate": {"learning_rate": 5e-4},
    "seed": {"seed": 7},
    "batch size": {"per_device_train_batch_size": 2},
    "reference batch size": {"precompute_ref_batch_size": 5},
    "beta": {"beta": 0.5},
    "loss": {"loss_type": "ipo"},
    "layout": {"layout": "packed"},
    "token budget": {"max_tokens_per_forward": 30},
    "checkpointing": {"activation_checkpointing": False},
}


@pytest.mark.parametrize("change", HITS)
def test_what_does_not_change_the_reference_shares_its_entry(tmp_path, computed, change):
    first = columns(trainer(tmp_path))
    assert computed == ["train"]
    again = columns(trainer(tmp_path, **HITS[change]))
    assert computed == ["train"]
    assert torch.equal(first, again)
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 8},
        {"lora_alpha": 1},
        {"use_dora": True},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_another_adapter_on_the_same_base_shares_its_entry(tmp_path, computed, settings):
    first = columns(trainer(tmp_path))
    again = columns(trainer(tmp_path, peft_config=lora_config(**settings)))
    assert computed == ["train"]
    assert torch.equal(first, again)


def changed_token() -> list[dict]:
    rows = [dict(row) for row in ROWS]
    rows[3] = {**rows[3], "rejected_ids": [*rows[3]["rejected_ids"][:-1], 45]}
    assert rows != ROWS
    return rows


def moved_boundary() -> list[dict]:
    """The same tokens in the same order, but the prompt's last token counts as completion."""
    rows = [dict(row) for row in ROWS]
    row = rows[0]
    rows[0] = {
        "prompt_ids": row["prompt_ids"][:-1],
        "chosen_ids": row["prompt_ids"][-1:] + row["chosen_ids"],
        "rejected_ids": row["rejected_ids"],
    }
    return rows


def nudged_model():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    return model


MISSES = {
    "a token": lambda: {"rows": changed_token()},
    "a row's order": lambda: {"rows": ROWS[::-1]},
    "a boundary": lambda: {"rows": moved_boundary()},
    "a row more": lambda: {"rows": random_rows(8)},
    "a weight": lambda: {"model": nudged_model()},
    "other weights": lambda: {"model": tiny_model("llama", seed=1)},
    "dtype": lambda: {"model": tiny_model("llama").to(torch.bfloat16)},
    "truncation": lambda: {"max_length": 11},
    "ld_alpha": lambda: {"ld_alpha": 0.5},
}


@pytest.mark.parametrize("change", MISSES)
def test_what_changes_the_reference_does_not(tmp_path, computed, change):
    trainer(tmp_path)
    trainer(tmp_path, **MISSES[change]())
    assert computed == ["train", "train"]
    assert len(files(tmp_path)) == 2


def test_quantization_is_part_of_the_key(tiny_folder):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    cpu = torch.device("cpu")
    digests = set()
    for quantization in (None, nf4(torch.float32), nf4(torch.bfloat16)):
        base = load_model(tiny_folder, device=cpu, dtype=torch.float32, quantization_config=quantization)
        digests.add(model_digest(ModelBundle(add_adapter(base, lora_config(), custom_modules=FUSED_LORA))))
    assert len(digests) >= 2


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    tiny_model("llama", hidden_size=64).save_pretrained(folder)
    return folder


def test_the_policys_adapter_is_not_part_of_the_digest():
    bundle = ModelBundle(our_model())
    before = model_digest(bundle)
    fill_adapter(bundle.model, seed=9)
    assert model_digest(bundle) == before


def test_a_continued_adapters_reference_is_part_of_the_digest():
    digests = set()
    for seed in (None, 1):
        model = our_model()
        if seed is not None:
            fill_adapter(model, seed=seed)
        digests.add(model_digest(ModelBundle(model, adapters={REFERENCE: reference_adapter(model)})))
    digests.add(model_digest(ModelBundle(our_model())))
    assert len(digests) == 3


def test_an_adapter_called_like_a_module_hides_no_base_weight():
    digests = set()
    for change in (0.0, 1.0):
        bundle = ModelBundle(our_model())
        bundle.model.add_adapter("mlp", lora_config())
        with torch.no_grad():
            bundle.base.model.layers[0].mlp.up_proj.get_base_layer().weight.add_(change)
        digests.add(model_digest(bundle))
    assert len(digests) == 2
    assert model_digest(ModelBundle(our_model())) in digests  # the inactive adapter itself does not count


HASHER = """
    from alignkit.models.adapters import reference_adapter
    from alignkit.models.bundle import REFERENCE, ModelBundle
    from alignkit.trainers.reference_cache import model_digest
    from tests.pair_factory import our_model
    model = our_model()
    print(model_digest(ModelBundle(model, adapters={REFERENCE: reference_adapter(model)})))
"""


@pytest.mark.slow
def test_the_digest_is_the_same_in_every_process():
    """An adapter's config holds sets of names, whose order Python draws anew in each process."""
    found = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", textwrap.dedent(HASHER)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=True)
        found.add(run.stdout.strip())
    assert len(found) == 1


def test_a_separate_reference_is_what_counts():
    def of(reference_seed: int, policy_seed: int = 0) -> str:
        policy = add_adapter(tiny_model("llama", seed=policy_seed), lora_config())
        return model_digest(ModelBundle(policy, reference=tiny_model("llama", seed=reference_seed)))

    assert of(1) != of(2)
    assert of(1) == of(1, policy_seed=3)


@pytest.mark.parametrize("damage", ["cut", "empty", "wrong key", "wrong rows", "text"])
def test_a_damaged_file_is_computed_again_and_replaced(tmp_path, computed, damage):
    good = columns(trainer(tmp_path))
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) - 5])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "wrong key":
        save_file({"other": torch.zeros(7, 2)}, path)
    elif damage == "wrong rows":
        save_file({"logps": torch.zeros(6, 2)}, path)
    else:
        path.write_text("not a tensor file at all")
    assert torch.equal(columns(trainer(tmp_path)), good)
    assert computed == ["train", "train"]
    assert path.read_bytes() == whole
    assert len(files(tmp_path)) == 1


def test_no_partial_file_ever_bears_the_final_name(tmp_path, monkeypatch):
    """The file is complete before it gets its name; a failed write leaves nothing behind."""
    path = tmp_path / "cache" / "key.safetensors"
    seen = []

    def observe(tensors, file):
        seen.append((path.exists(), Path(file).parent == path.parent, Path(file).name))
        save_file(tensors, file)

    monkeypatch.setattr(reference_cache, "save_file", observe)
    reference_cache._write(path, torch.ones(3, 2))
    ((existed, beside, temporary),) = seen
    assert (existed, beside) == (False, True)
    assert not temporary.endswith(".safetensors")
    assert files(tmp_path) == {"key.safetensors"}

    def fail(tensors, file):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(reference_cache, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        reference_cache._write(path, torch.zeros(3, 2))
    assert files(tmp_path) == {"key.safetensors"}
    assert torch.equal(load_file(path)["logps"], torch.ones(3, 2))


WRITER = """
    import sys, torch
    from pathlib import Path
    from alignkit.trainers.reference_cache import _read, _write
    path, value = Path(sys.argv[1]), float(sys.argv[2])
    for _ in range(50):
        _write(path, torch.full((500, 2), value))
        found = _read(path, 500)
        assert found is not None and len(found.unique()) == 1, "a mixed or partial file"
"""


@pytest.mark.slow
def test_two_processes_may_write_the_same_entry(tmp_path):
    path = tmp_path / "cache" / "key.safetensors"
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path)]
    processes = [subprocess.Popen([*command, value], stderr=subprocess.PIPE, text=True) for value in ("1", "2")]
    for process in processes:
        _, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors
    assert files(tmp_path) == {"key.safetensors"}
    assert reference_cache._read(path, 500)[0, 0] in (1.0, 2.0)


def test_writes_in_turn_both_end_with_a_whole_file(tmp_path):
    path = tmp_path / "cache" / "key.safetensors"
    for value in (1.0, 2.0):
        reference_cache._write(path, torch.full((4, 2), value))
        assert reference_cache._read(path, 4)[0, 0] == value
    assert files(tmp_path) == {"key.safetensors"}


def test_streams_are_refused(tmp_path):
    run = trainer(tmp_path)
    with pytest.raises(ConfigError, match="needs a dataset of known length, and 'train' is a stream"):
        reference_cache.with_reference_logps(run, dataset().to_iterable_dataset(), "train")


def test_a_dataset_that_has_the_columns_is_taken_as_it_is(tmp_path, computed):
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in ROWS]
    run = trainer(tmp_path, rows=rows)
    assert computed == []
    assert files(tmp_path) == set()
    assert torch.equal(columns(run), torch.tensor([[-1.0, -2.0]]).expand(len(ROWS), 2))


def test_a_log_prob_that_is_not_finite_stops_and_writes_nothing(tmp_path, monkeypatch):
    run = trainer(tmp_path / "first")
    run.args = dataclasses.replace(run.args, reference_cache_dir=str(tmp_path / "cache"))
    bad = torch.zeros(len(ROWS), 2)
    bad[4, 1] = torch.nan
    monkeypatch.setattr(reference_cache, "_compute", lambda *_: bad)
    with pytest.raises(TrainingError, match="the reference gives row 4 of 'train' a log-probability that is not finit"):
        reference_cache.with_reference_logps(run, dataset(), "train")
    assert files(tmp_path) == set()


def test_training_with_precomputed_log_probs_equals_reference_in_the_loop(tmp_path):
    losses = []
    for number, precompute in enumerate((True, False)):
        options = {"precompute_ref_log_probs": precompute, "max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
        if not precompute:
            options["reference_cache_dir"] = None
        run = trainer(tmp_path / str(number), **options)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
