"""Adapters from strangers, through every loader of adapters."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignkit.hub.export import export
from alignkit.models.bundle import ModelBundle
from alignkit.models.load import load_model, load_tokenizer
from alignkit.models.reward_adapter import add_reward_adapter
from alignkit.models.reward_files import load_reward_model
from tests.hostile.harness import (
    Attack,
    attempt,
    bare_pickle,
    copy_of,
    deep,
    edit,
    edited,
    hostile_archive,
    linked,
    made_folder,
    made_pipe,
    refuse,
    replaced,
    safetensors,
    sparse,
    tensor,
)

CPU = torch.device("cpu")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def only_pickled(content: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / "adapter_model.bin").write_bytes(content)

    return spoil


def changed(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Other weights under the same config."""

    def spoil(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return spoil


def not_finite(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda weights: next(iter(weights.values())).view(-1)[:1].fill_(value) and None


def narrowed(weights: dict[str, torch.Tensor]) -> None:
    for name in weights:
        weights[name] = weights[name][:2].clone() if ".lora_A." in name else weights[name][:, :2].clone()


def of_other_layers(weights: dict[str, torch.Tensor]) -> None:
    for name in list(weights):
        weights[name.replace("model.layers", "transformer.blocks")] = weights.pop(name)


REFUSED: dict[str, Attack] = {
    "pickled weights alone": Attack(only_pickled(bare_pickle()), r"'adapter_model\.bin', not as safetensors.*convert"),
    "pickled archive alone": Attack(only_pickled(hostile_archive()), r"'adapter_model\.bin', not as safetensors"),
    "no weights": Attack(
        lambda folder: (folder / WEIGHTS).unlink(), r"adapter_config\.json without adapter_model\.safe"
    ),
    "pickle named safetensors": Attack(
        replaced(WEIGHTS, hostile_archive()), r"adapter_model\.safetensors' is malformed"
    ),
    "header of 4 GB": Attack(replaced(WEIGHTS, safetensors({}, length=2**32)), r"header has 4,294,967,296 bytes"),
    "billions of elements": Attack(
        replaced(WEIGHTS, safetensors({"a.lora_A.weight": tensor([4, 2**40], 0, 4)}, bytes(4))), r"needs 17,592,186,"
    ),
    "weights of zeros, 8 TB": Attack(lambda folder: sparse(folder / WEIGHTS, 2**43), r"safetensors' is malformed"),
    "weights that are a link out": Attack(linked(WEIGHTS, "/etc/passwd"), r"safetensors' is a link out of its folder"),
    "weights that are a broken link beside a pickle": Attack(
        lambda folder: (linked(WEIGHTS, "gone")(folder), replaced("adapter_model.bin", bare_pickle())(folder)),
        r"is a link to nothing",
    ),
    "weights that are a pipe": Attack(made_pipe(WEIGHTS), r"safetensors' is a pipe"),
    "weights that are a folder": Attack(made_folder(WEIGHTS), r"safetensors' is a folder"),
    "NaN in the weights": Attack(changed(not_finite(float("nan"))), r"not finite, in 'base_model.* earlier checkpoint"),
    "infinity in the weights": Attack(changed(not_finite(float("-inf"))), r"not finite, in 'base_model"),
    "weights of another rank": Attack(changed(narrowed), r"has the shape \[2, \d+\], and the config's rank is 4"),
    "weights of other layers": Attack(changed(of_other_layers), r"'transformer\.blocks.*', which the base lacks"),
    "config of another rank": Attack(edited(CONFIG, r=8), r"and the config's rank is 8"),
    "rank of a billion": Attack(edited(CONFIG, r=10**9), r"r=1000000000; a rank is a whole number from 1 to 16,384"),
    "rank of a billion for a layer": Attack(
        edited(CONFIG, rank_pattern={"q_proj": 10**9}), r"rank_pattern\['q_proj'\]=1000000000"
    ),
    "rank of zero": Attack(edited(CONFIG, r=0), r"r=0; a rank"),
    "rank that is text": Attack(edited(CONFIG, r="4"), r"r='4'; a rank"),
    "alpha that is no number": Attack(
        lambda folder: (folder / CONFIG).write_text(
            (folder / CONFIG).read_text().replace('"lora_alpha": 8', '"lora_alpha": NaN')
        ),
        r"adapter_config\.json' is not JSON that can be read \(it holds NaN",
    ),
    "a pattern that never ends": Attack(edited(CONFIG, target_modules=r"(.*.*.*.*.*.*.*)*\d$x"), r"longer than 3 s"),
    "a pattern that is none": Attack(edited(CONFIG, target_modules="(("), r"cannot be matched: .*unterminated"),
    "an initialisation that changes the base": Attack(
        edited(CONFIG, init_lora_weights="pissa"), r"init_lora_weights='pissa' changes the base"
    ),
    "layers of the base doubled": Attack(
        edited(CONFIG, layer_replication=[[0, 2], [0, 2]]), r"layer_replication chang"
    ),
    "an unknown method": Attack(edited(CONFIG, peft_type="EVIL"), r"adapter_config\.json of .* cannot be read"),
    "config nested deep": Attack(replaced(CONFIG, deep()), r"adapter_config\.json' nests 100,001 deep"),
    "config not UTF-8": Attack(replaced(CONFIG, b'{"r": "\xe9"}'), r"adapter_config\.json' is not UTF-8"),
    "config empty": Attack(replaced(CONFIG, b""), r"adapter_config\.json' is empty"),
    "config that is a pipe": Attack(made_pipe(CONFIG), r"adapter_config\.json' is a pipe"),
    "config that is a link out": Attack(linked(CONFIG, "/etc/hostname"), r"adapter_config\.json' is a link out"),
    "base with a terminal's escape": Attack(
        edited(CONFIG, base_model_name_or_path="./\x1b]0;evil\x07\u202ebase"), r"\\x1b\]0;evil\\x07\\u202ebase"
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_adapter_is_refused(name: str, good: Path, tmp_path: Path, outside: Path):
    folder = copy_of(good / "adapter", tmp_path / "adapter")
    attack = REFUSED[name]
    attack.spoil(folder)
    text = refuse(lambda: load_model(folder, device=CPU))
    assert re.search(str(attack.message), text), text


def test_adapter_for_another_base_names_the_shapes(good: Path, tmp_path: Path):
    folder = copy_of(good / "adapter", tmp_path / "adapter")
    edit(folder / CONFIG, base_model_name_or_path=str(good / "wide"))
    text = refuse(lambda: load_model(folder, device=CPU))
    assert re.search(r"was trained on another one: 'model\.layers\.0\..*' is \d+ wide in the base, and \d+ in", text)


@pytest.mark.parametrize("load", [lambda folder: load_model(folder, device=CPU), load_tokenizer], ids=["model", "text"])
def test_adapter_that_is_its_own_base_is_no_endless_search(load: Any, good: Path, tmp_path: Path):
    folder = copy_of(good / "adapter", tmp_path / "adapter")
    for path in [*folder.glob("tokenizer*"), *folder.glob("*.jinja")]:
        path.unlink()
    edit(folder / CONFIG, base_model_name_or_path=str(folder))
    assert "is itself an adapter" in refuse(lambda: load(folder))


def test_good_adapter_loads_and_the_pickle_beside_it_is_let_lie(good: Path, tmp_path: Path):
    folder = copy_of(good / "adapter", tmp_path / "adapter")
    for name in ("adapter_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt"):
        (folder / name).write_bytes(hostile_archive())
    assert attempt(lambda: load_model(folder, device=CPU)) is None


def test_library_that_an_adapter_names_is_not_imported(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = copy_of(good / "adapter", tmp_path / "adapter")
    (tmp_path / "evil_library.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(folder / CONFIG, auto_mapping={"base_model_class": "C", "parent_library": "evil_library"})
    assert attempt(lambda: load_model(folder, device=CPU)) is None
    assert "evil_library" not in sys.modules


# ------------------------------------------------------------ every loader of reward adapters


def beside_a_policy(folder: Path, good: Path) -> Any:
    policy = load_model(good / "adapter", device=CPU)
    policy.get_base_model().config._name_or_path = str(good / "base")
    return add_reward_adapter(policy, folder, "reward")


LOADERS: dict[str, Callable[[Path, Path], Any]] = {
    "beside a policy": beside_a_policy,
    "as a classifier": lambda folder, good: load_reward_model(folder, device=CPU),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "spoil",
    [
        only_pickled(hostile_archive()),
        changed(not_finite(float("nan"))),
        edited(CONFIG, r=10**9),
        linked(WEIGHTS, "/etc/passwd"),
        replaced(WEIGHTS, safetensors({}, length=2**32)),
        replaced(CONFIG, deep()),
    ],
    ids=["pickle", "NaN", "rank", "link", "header", "deep"],
)
def test_every_loader_of_reward_adapters_refuses(loader: str, spoil: Any, good: Path, tmp_path: Path):
    folder = copy_of(good / "reward", tmp_path / "reward")
    edit(folder / CONFIG, base_model_name_or_path=str(good / "base"))
    spoil(folder)
    assert str(folder) in refuse(lambda: LOADERS[loader](folder, good))


OF_OTHER_KINDS: dict[str, dict[str, Any]] = {
    "virtual tokens": {"peft_type": "P_TUNING", "num_virtual_tokens": 10**9},
    "a prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 10**9},
    "a tokenizer elsewhere": {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": 4,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "x",
        "tokenizer_name_or_path": "evil/code",
    },
    "adapters elsewhere": {"peft_type": "XLORA", "hidden_size": 8, "adapters": {"a": "/etc"}},
    "other weights": {"peft_type": "LOKR", "target_modules": ["q_proj"]},
    "a bank of vectors": {"peft_type": "VBLORA", "num_vectors": 2**62, "vector_length": 8, "target_modules": "q_proj"},
    "layers without end": {
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q_proj"],
        "layer_replication": [[0, 2]] * 9,
    },
    "a library": {
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q_proj"],
        "megatron_config": {"a": 1},
        "megatron_core": "evil_library",
    },
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", OF_OTHER_KINDS)
def test_reward_adapters_of_other_kinds_are_refused(kind: str, loader: str, good: Path, tmp_path: Path):
    folder = copy_of(good / "reward", tmp_path / "adapter")
    kept = {"task_type": "SEQ_CLS", "base_model_name_or_path": str(good / "base")}
    (folder / CONFIG).write_text(json.dumps(kept | OF_OTHER_KINDS[kind]))
    refuse(lambda: LOADERS[loader](folder, good))


def test_reward_adapter_cannot_change_the_base_that_it_is_put_on(good: Path, tmp_path: Path):
    folder = copy_of(good / "reward", tmp_path / "reward")
    edit(folder / CONFIG, base_model_name_or_path=str(good / "base"), init_lora_weights="pissa")
    policy: Any = load_model(good / "adapter", device=CPU)
    policy.get_base_model().config._name_or_path = str(good / "base")
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    text = refuse(lambda: add_reward_adapter(policy, folder, "reward"))
    assert "changes the base" in text
    after = policy.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert ModelBundle(policy).adapters["policy"] == "default"


# ------------------------------------------------------------ the Hub


def on_the_hub(folder: Path, cache: Path) -> str:
    """Put a folder into a cache of the Hub, as a download leaves it; return the repository's name."""
    repository = cache / "models--me--sent"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, repository / "blobs")
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    return "me/sent"


HUB: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle alone": (only_pickled(hostile_archive()), r"'me/sent' holds no adapter_model\.safetensors, and adapters"),
    "NaN": (changed(not_finite(float("nan"))), r"not finite"),
    "rank of a billion": (edited(CONFIG, r=10**9), r"r=1000000000; a rank"),
    "header of 4 GB": (replaced(WEIGHTS, safetensors({}, length=2**32)), r"header has 4,294,967,296 bytes"),
    "config nested deep": (replaced(CONFIG, deep()), r"nests 100,001 deep"),
}


@pytest.mark.parametrize("case", HUB)
def test_hostile_adapter_of_the_hub_is_refused(case: str, good: Path, tmp_path: Path):
    spoil, message = HUB[case]
    folder = copy_of(good / "adapter", tmp_path / "adapter")
    spoil(folder)
    options = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    name = on_the_hub(folder, tmp_path / "cache")
    text = refuse(lambda: load_model(name, device=CPU, model_init_kwargs=options))
    assert re.search(message, text), text


def test_good_adapter_of_the_hub_loads(good: Path, tmp_path: Path):
    name = on_the_hub(good / "adapter", tmp_path / "cache")
    options = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    assert attempt(lambda: load_model(name, device=CPU, model_init_kwargs=options)) is None


def test_export_of_a_hostile_adapter_leaves_nothing(good: Path, tmp_path: Path):
    folder = copy_of(good / "adapter", tmp_path / "adapter")
    only_pickled(hostile_archive())(folder)
    refuse(lambda: export(folder, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_publishing_a_folder_does_not_follow_its_links_out(good: Path, tmp_path: Path, outside: Path):
    from alignkit.hub.staging import stage

    folder = copy_of(good / "adapter", tmp_path / "adapter")
    (folder / "LICENSE").symlink_to(outside)
    (tmp_path / "staged").mkdir()
    text = refuse(lambda: stage([folder], tmp_path / "staged", repo_id="me/tiny"))
    assert "LICENSE' is a link out of its folder" in text
    assert json.dumps("the neighbour") not in "".join(
        path.read_text(errors="replace") for path in (tmp_path / "staged").iterdir() if path.is_file()
    )
