"""Whole models and tokenizers from strangers: refused by name, or what is hostile in them let lie."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.evaluation.models import load_evaluated, load_policy
from alignkit.models.load import load_model, load_tokenizer
from alignkit.models.reward_files import load_reward_model
from alignkit.models.untrusted.configs import check_config
from alignkit.rollout.sources import make_reward_sources
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
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
pytestmark = [pytest.mark.timeout(60)]


def only_pickled(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(content)

    return spoil


def huge(name: str) -> Callable[[Path], None]:
    return lambda folder: sparse(folder / name, 2**43)


def mapped(name: str) -> Callable[[Path], None]:
    """An index that sends a weight to `name`."""

    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(f'{{"metadata": {{}}, "weight_map": {{"lm_head.weight": "{name}"}}}}')

    return spoil


CODE = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
EVIL = "import os\nos.mkdir({marker!r})\n"

REFUSED: dict[str, Attack] = {
    # weights
    "pickled weights alone": Attack(only_pickled("pytorch_model.bin", bare_pickle()), r"pytorch_model\.bin.*convert"),
    "pickled archive alone": Attack(only_pickled("pytorch_model.bin", hostile_archive()), r"pytorch_model\.bin.*conv"),
    "pickle named safetensors": Attack(replaced(WEIGHTS, bare_pickle()), r"model\.safetensors' is malformed"),
    "header of 4 GB": Attack(replaced(WEIGHTS, safetensors({}, length=2**32)), r"header has 4,294,967,296 bytes"),
    "header of 2^63": Attack(replaced(WEIGHTS, safetensors({}, length=2**63)), r"model\.safetensors.* Fetch it again"),
    "header nested deep": Attack(replaced(WEIGHTS, safetensors(deep().encode())), r"model\.safetensors.*nests 100,001"),
    "header no JSON": Attack(replaced(WEIGHTS, safetensors(b"\xff\xfe{")), r"model\.safetensors.*cannot be read"),
    "header with a name twice": Attack(
        replaced(WEIGHTS, safetensors(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1}', b"\0")),
        r"'a' is there twice",
    ),
    "billions of elements in a few bytes": Attack(
        replaced(WEIGHTS, safetensors({"lm_head.weight": tensor([2**20, 2**20], 0, 4)}, bytes(4))),
        r"'lm_head\.weight' of F32 \[1048576, 1048576\] needs 4,398,046,511,104 bytes",
    ),
    "shape that overflows": Attack(
        replaced(WEIGHTS, safetensors({"x": tensor([2**62, 2**62, 2**62], 0, 0)})), r"model\.safetensors.*'x'"
    ),
    "negative shape": Attack(replaced(WEIGHTS, safetensors({"x": tensor([-1], 0, 4)}, bytes(4))), r"impossible shape"),
    "offsets past the end": Attack(
        replaced(WEIGHTS, safetensors({"x": tensor([4], 0, 16)}, bytes(4))), r"take 16 bytes, and it holds 4"
    ),
    "tensors that overlap": Attack(
        replaced(WEIGHTS, safetensors({"x": tensor([2], 0, 8), "y": tensor([2], 4, 12)}, bytes(12))), r"'y' overlaps"
    ),
    "unknown dtype": Attack(replaced(WEIGHTS, safetensors({"x": tensor([1], 0, 4, "PICKLE")}, bytes(4))), r"'PICKLE'"),
    "empty weights": Attack(replaced(WEIGHTS, b""), r"model\.safetensors' is malformed.* Fetch it again"),
    "weights of zeros, 8 TB": Attack(huge(WEIGHTS), r"model\.safetensors' is malformed"),
    "weights that are a folder": Attack(made_folder(WEIGHTS), r"model\.safetensors' is a folder"),
    "weights that are a pipe": Attack(made_pipe(WEIGHTS), r"model\.safetensors' is a pipe, and reading it would wait"),
    "weights that are a link to nothing": Attack(linked(WEIGHTS, "/nowhere/at/all"), r"is a link to nothing"),
    "weights that are a link out": Attack(linked(WEIGHTS, "/etc/passwd"), r"link out of its folder, to '/etc/passwd'"),
    # the index of shards
    "index with ..": Attack(mapped("../outside/secret.safetensors"), r"lies in '\.\./outside/secret\.safetensors'"),
    "index with an absolute name": Attack(mapped("/etc/passwd"), r"index\.json' says .* lies in '/etc/passwd'"),
    "index of pickles": Attack(mapped("pytorch_model.bin"), r"read from safetensors alone.*convert them"),
    "index of shards that are missing": Attack(mapped("model-9.safetensors"), r"'model-9\.safetensors', which is miss"),
    "index without a map": Attack(replaced(INDEX, "{}"), r"index\.json' has no weight_map"),
    "explicit weights elsewhere": Attack(
        edited("config.json", transformers_weights="../../outside/x.safetensors"),
        r"transformers_weights='\.\./\.\./out",
    ),
    # config.json
    "config nested 100,000 deep": Attack(replaced("config.json", deep()), r"config\.json' nests 100,001 deep"),
    "config nested 10,000,000 deep": Attack(replaced("config.json", deep(5_000_000)), r"config\.json' nests 5,000,001"),
    "config not UTF-8": Attack(replaced("config.json", b'{"a": "\xff"}'), r"config\.json' is not UTF-8"),
    "config empty": Attack(replaced("config.json", b""), r"config\.json' is empty"),
    "config a list": Attack(replaced("config.json", "[1]"), r"config\.json' holds a list, where a JSON object"),
    "config of zeros, 8 TB": Attack(huge("config.json"), r"config\.json' has 8,796,093,022,208 bytes"),
    "config that is a pipe": Attack(made_pipe("config.json"), r"config\.json' is a pipe"),
    "config that is a folder": Attack(made_folder("config.json"), r"config\.json' is a folder"),
    "code for an unknown type": Attack(
        edited("config.json", model_type="evil", auto_map=CODE), r"needs its own Python code .*trust_remote_code=True"
    ),
    "attention from the Hub": Attack(
        edited("config.json", attn_implementation="evil/kernel"), r"attn_implementation='evil/kernel', which is code"
    ),
    "vocabulary of 10^12": Attack(edited("config.json", vocab_size=10**12), r"vocab_size=1000000000000; a whole num"),
    "a billion layers": Attack(edited("config.json", num_hidden_layers=10**9), r"num_hidden_layers=1000000000"),
    "a billion labels": Attack(edited("config.json", num_labels=10**9), r"num_labels=1000000000"),
    "no heads": Attack(edited("config.json", num_attention_heads=0), r"num_attention_heads=0; a whole number from 1"),
    "a width that is text": Attack(edited("config.json", hidden_size="wide"), r"hidden_size='wide'"),
    "a width of another model": Attack(edited("config.json", hidden_size=64), r"cannot be loaded"),
    "a link in the config's place": Attack(linked("config.json", "/etc/hostname"), r"config\.json' is a link out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_model_is_refused(name: str, good: Path, tmp_path: Path, outside: Path):
    folder = copy_of(good / "base", tmp_path / "model")
    attack = REFUSED[name]
    attack.spoil(folder)
    text = refuse(lambda: load_model(folder, device=CPU))
    assert re.search(str(attack.message), text), text


PLACES: dict[str, Callable[[Path], Any]] = {
    "classifier as a reward": make_reward_sources,
    "reward model": load_reward_model,
    "evaluated": load_evaluated,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "attack",
    [
        only_pickled("pytorch_model.bin", hostile_archive()),
        replaced(WEIGHTS, safetensors({}, length=2**32)),
        edited("config.json", model_type="evil", auto_map=CODE),
        edited("config.json", num_labels=10**9),
        linked(WEIGHTS, "/etc/passwd"),
        replaced("config.json", deep()),
    ],
    ids=["pickle", "header", "code", "labels", "link", "deep"],
)
def test_every_loader_of_classifiers_refuses(place: str, attack: Any, good: Path, tmp_path: Path):
    folder = copy_of(good / "classifier", tmp_path / "model")
    attack(folder)
    text = refuse(lambda: PLACES[place](folder))
    assert str(folder) in text


LEFT_ALONE = (
    *("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"),
    *("adapter_model.bin", "tokenizer.pkl", "model.ckpt", "vocab.pkl", "weights.pickle", "tf_model.h5"),
)


def test_pickles_beside_good_weights_are_let_lie(good: Path, tmp_path: Path):
    folder = copy_of(good / "base", tmp_path / "model")
    for number, name in enumerate(LEFT_ALONE):
        (folder / name).write_bytes(hostile_archive() if number % 2 else bare_pickle())
    assert attempt(lambda: load_model(folder, device=CPU)) is None
    assert attempt(lambda: load_tokenizer(folder)) is None
    assert attempt(lambda: load_policy(folder, device=CPU)) is None


def test_code_for_a_known_type_is_let_lie(good: Path, tmp_path: Path):
    from tests.hostile.harness import MARKER

    folder = copy_of(good / "base", tmp_path / "model")
    edit(folder / "config.json", auto_map=CODE)
    edit(folder / "tokenizer_config.json", auto_map=CODE)
    (folder / "evil.py").write_text(EVIL.format(marker=str(MARKER)))
    assert attempt(lambda: load_model(folder, device=CPU)) is None
    assert attempt(lambda: load_tokenizer(folder)) is None


def test_sharded_model_loads(good: Path):
    assert (good / "sharded" / INDEX).is_file()
    assert attempt(lambda: load_model(good / "sharded", device=CPU)) is None


def test_model_in_the_hubs_cache_loads_through_its_links(good: Path, tmp_path: Path):
    repository = tmp_path / "models--me--tiny"
    blobs = copy_of(good / "base", repository / "blobs")
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert attempt(lambda: load_model(snapshot, device=CPU)) is None
    assert attempt(lambda: load_tokenizer(snapshot)) is None


@pytest.mark.parametrize("load", [load_model, load_tokenizer], ids=["model", "tokenizer"])
def test_hostile_config_of_the_hub_is_refused(load: Any, good: Path, tmp_path: Path):
    snapshot = tmp_path / "models--me--sent" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    copy_of(good / "base", snapshot)
    (tmp_path / "models--me--sent" / "refs").mkdir()
    (tmp_path / "models--me--sent" / "refs" / "main").write_text("0123abc")
    edit(snapshot / "config.json", num_labels=10**9)
    where = {"cache_dir": str(tmp_path), "local_files_only": True}
    given = where if load is load_tokenizer else {"model_init_kwargs": where}
    assert "num_labels=1000000000" in refuse(lambda: load("me/sent", **given))


def test_pickled_model_of_the_hub_is_refused(good: Path, tmp_path: Path):
    snapshot = tmp_path / "models--me--sent" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    only_pickled("pytorch_model.bin", hostile_archive())(copy_of(good / "base", snapshot))
    (tmp_path / "models--me--sent" / "refs").mkdir()
    (tmp_path / "models--me--sent" / "refs" / "main").write_text("0123abc")
    where = {"cache_dir": str(tmp_path), "local_files_only": True}
    text = refuse(lambda: load_model("me/sent", model_init_kwargs=where, device=CPU))
    assert "'me/sent' holds no model.safetensors. Pickled weights can run anything" in text


def test_use_safetensors_cannot_be_switched_off(good: Path):
    text = refuse(lambda: load_model(good / "base", model_init_kwargs={"use_safetensors": False}))
    assert "would load pickles" in text


# ------------------------------------------------------------ GGUF


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF",
        b"GGUF" + (3).to_bytes(4, "little") + (2**62).to_bytes(8, "little") * 2,
        b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little") + (2**60).to_bytes(8, "little"),
        bare_pickle(),
    ],
    ids=["short", "2^62 tensors", "a key of 2^60 bytes", "pickle"],
)
def test_hostile_gguf_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(content)
    assert "model.gguf" in refuse(lambda: load_model(tmp_path / "model.gguf", device=CPU))


# ------------------------------------------------------------ tokenizers

TOKENIZERS: dict[str, Attack] = {
    "vocabulary in /etc/passwd": Attack(
        edited("tokenizer_config.json", vocab_file="/etc/passwd"),
        r"tokenizer_config\.json' names a file outside .*passwd",
    ),
    "tokenizer in /etc/passwd": Attack(
        edited("tokenizer_config.json", tokenizer_file="/etc/passwd"), r"tokenizer_file='/etc/passwd'"
    ),
    "tokenizer with ..": Attack(
        edited("tokenizer_config.json", merges_file="../outside/secret.json"), r"merges_file='\.\./outside"
    ),
    "positional /etc/passwd": Attack(edited("tokenizer_config.json", init_inputs=["/etc/passwd"]), r"init_inputs="),
    "versions with ..": Attack(
        edited("tokenizer_config.json", fast_tokenizer_files=["tokenizer.x/../../outside/y.json"]), r"fast_tokenizer_fi"
    ),
    "tokenizer nested deep": Attack(replaced("tokenizer.json", deep()), r"tokenizer\.json' nests 100,001 deep"),
    "tokenizer config nested deep": Attack(replaced("tokenizer_config.json", deep()), r"tokenizer_config\.json' nests"),
    "tokenizer of zeros, 8 TB": Attack(huge("tokenizer.json"), r"tokenizer\.json' has 8,796,093,022,208 bytes"),
    "tokenizer that is a pipe": Attack(made_pipe("tokenizer.json"), r"tokenizer\.json' is a pipe"),
    "tokenizer that is a link out": Attack(linked("tokenizer.json", "/etc/passwd"), r"tokenizer\.json' is a link out"),
    "tokenizer empty": Attack(replaced("tokenizer.json", b""), r"No tokenizer could be loaded"),
    "tokenizer a pickle": Attack(replaced("tokenizer.json", bare_pickle()), r"No tokenizer could be loaded"),
    "template that is a link out": Attack(linked("chat_template.jinja", "/etc/passwd"), r"jinja' is a link out"),
    "code of its own": Attack(
        edited("tokenizer_config.json", tokenizer_class="Evil", auto_map=CODE),
        r"needs its own Python code|No tokenizer",
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_hostile_tokenizer_is_refused(name: str, good: Path, tmp_path: Path, outside: Path):
    folder = copy_of(good / "base", tmp_path / "model")
    attack = TOKENIZERS[name]
    attack.spoil(folder)
    if name == "code of its own":
        (folder / "config.json").unlink()
        (folder / "adapter_config.json").unlink(missing_ok=True)
        edit_base(folder, good)
    text = refuse(lambda: load_tokenizer(folder))
    assert re.search(str(attack.message), text), text


def edit_base(folder: Path, good: Path) -> None:
    """Give the folder a config of a model type without a tokenizer class, so that only the code could make one."""
    (folder / "config.json").write_text('{"model_type": "evil"}')


def test_notes_of_where_a_tokenizer_lay_are_read_by_nobody(good: Path, tmp_path: Path):
    folder = copy_of(good / "base", tmp_path / "model")
    edit(folder / "tokenizer_config.json", special_tokens_map_file="/etc/passwd", name_or_path="/etc")
    found = load_tokenizer(folder)
    assert found.get_vocab() == load_tokenizer(good / "base").get_vocab()
    assert "root:" not in repr(found)


def test_template_that_reaches_for_the_system_does_not_get_there(good: Path, tmp_path: Path):
    from jinja2.exceptions import SecurityError

    from tests.hostile.harness import MARKER

    folder = copy_of(good / "base", tmp_path / "model")
    reach = f"cycler.__init__.__globals__.os.mkdir('{MARKER}')"
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ " + reach + " }}"
    (folder / "chat_template.jinja").write_text(reach)
    tokenizer = load_tokenizer(folder)
    raised = attempt(lambda: tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False))
    assert isinstance(raised, SecurityError)


ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "a power of a power": "{{ 10 ** (10 ** 10) }}",
    "a long text": "{{ 'a' * 10 ** 11 }}",
    "a wide text": "{{ ('x' | center(10 ** 11)) }}",
    "calls that branch": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_template_that_does_not_end_is_refused(name: str, good: Path, tmp_path: Path):
    folder = copy_of(good / "base", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(ENDLESS[name])
    assert "does not end within 3 s" in refuse(lambda: load_tokenizer(folder))


def test_templates_with_marks_for_training_and_without_a_system_load(good: Path, tmp_path: Path):
    folder = copy_of(good / "base", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    )
    assert attempt(lambda: load_tokenizer(folder)) is None


def test_sizes_that_honest_configs_have_are_taken():
    check_config({"num_local_experts": 0, "head_dim": 0, "max_position_embeddings": 131072.0}, "config.json")
