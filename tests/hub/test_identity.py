"""What a run was made of: named truly, without paths or secrets."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from alignkit.data.prepare import prepare_preferences
from alignkit.data.reasons import DropReason
from alignkit.data.sources import load_preferences
from alignkit.hub.card import render_card
from alignkit.hub.identity import (
    describe_adapter,
    describe_base,
    describe_command,
    describe_data,
    describe_settings,
    rows_digest,
)
from alignkit.models.adapters import add_adapter
from alignkit.models.heads import add_value_head
from alignkit.trainers.config import DPOConfig
from tests.hub.record_factory import make_record
from tests.model_factory import tiny_model
from tests.models.conftest import character_tokenizer
from tests.pair_factory import lora_config

CANARY = "hf_canaryCANARYcanaryCANARYcanary12"
TOKENIZER = character_tokenizer(eos_token="</s>", pad_token="<pad>")


def describe(name_or_path: str) -> dict[str, Any]:
    model = tiny_model("llama")
    model.config._name_or_path = name_or_path
    return describe_base(model)


def test_a_base_of_the_hub() -> None:
    found = describe("owner/Name-1B")  # in no cache: its commit is not known
    assert (found["name"], found["hub_id"], found["revision"]) == ("Name-1B", "owner/Name-1B", None)
    assert found["note"] is None
    assert (found["dtype"], found["quantization"], found["model_type"]) == ("float32", None, "llama")


def test_a_snapshot_in_the_cache_is_its_repository() -> None:
    commit = "cd" * 20
    found = describe(f"/home/someone/.cache/huggingface/hub/models--owner--Name-1B/snapshots/{commit}")
    assert (found["hub_id"], found["revision"]) == ("owner/Name-1B", commit)


@pytest.mark.parametrize("name", ["/home/someone/models/mine", "./mine", "~/mine"])
def test_a_local_base_has_no_path(name: str) -> None:
    found = describe(name)
    assert (found["name"], found["hub_id"]) == ("mine", None)
    assert "someone" not in str(found)


def test_a_local_folder_that_looks_like_an_id_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "README.md").write_text(
        "---\nlicense: mit\nlanguage: de\n---\nHello", encoding="utf-8"
    )
    found = describe("owner/name")
    assert found["hub_id"] is None
    assert (found["license"], found["language"]) == ("mit", ["de"])


@pytest.mark.parametrize(
    ("name", "told"), [(".", "here"), ("C:\\Users\\someone\\mine", "mine"), ("file:///home/someone/mine", "mine")]
)
def test_a_local_base_has_a_name(name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert describe(name)["name"] == told


@pytest.mark.parametrize(
    ("card", "license", "language"),
    [
        ("---\nlicense: [mit, apache-2.0]\nlanguage: en\n---\n", "mit, apache-2.0", ["en"]),
        ("---\nlicense: mit\nlanguage: [no, sv]\n---\n", "mit", ["no", "sv"]),
        ("---\nlicense: mit\nlanguage: 5\ntags: 3\n---\n", "mit", []),
        ("---\nlanguage: 2020-01-01\nlicense: {a: b}\n---\n", None, []),
        ("---\nlicense: [\n---\n", None, []),
        ("---\n- mit\n---\n", None, []),
        ("no metadata", None, []),
    ],
)
def test_whatever_the_card_of_a_base_holds(card: str, license: str | None, language: list[str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    found = describe(str(tmp_path))
    assert (found["license"], found["language"]) == (license, language)
    render_card(make_record(base=found | {"is_chat": True}))


def test_the_demo_is_what_it_was_converted_from() -> None:
    found = describe("/elsewhere/.cache/alignkit/SmolLM2-135M-Instruct-demo-0.1.2-1")
    assert found["hub_id"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "dequantized from SmolLM2-135M-Instruct.Q4_1.gguf" in found["note"]
    assert found["license"] == "apache-2.0"
    assert "elsewhere" not in str(found)


def test_adapters_and_heads_do_not_count_as_the_base() -> None:
    base = tiny_model("llama")
    weights = describe_base(base)["parameters"]
    assert weights == sum(each.numel() for each in base.parameters())
    add_value_head(base)
    model = add_adapter(base, lora_config())
    assert describe_base(model)["parameters"] == weights
    adapter = describe_adapter(model)
    assert adapter is not None
    assert adapter["kind"] == "LORA"
    assert adapter["trainable_parameters"] == sum(e.numel() for e in model.parameters() if e.requires_grad)
    assert describe_adapter(base) is None


ROWS = [{"prompt": "ab", "chosen": "cd", "rejected": "e"}, {"prompt": "f", "chosen": "g", "rejected": "ha"}]


def digest_of(rows: list[dict]) -> str:
    prepared, _ = prepare_preferences(Dataset.from_list(rows), TOKENIZER, max_length=64)
    assert isinstance(prepared, Dataset)
    return rows_digest(prepared)


def test_the_digest_knows_every_token_and_the_order() -> None:
    first = digest_of(ROWS)
    assert first == digest_of(ROWS)
    others = [
        ROWS[::-1],
        ROWS[:1],
        [{**ROWS[0], "chosen": "cc"}, ROWS[1]],
        [{"prompt": "ab", "chosen": "cde", "rejected": "e"}, ROWS[1]],
        [{"prompt": "a", "chosen": "bcd", "rejected": "be"}, ROWS[1]],  # the same ids, cut elsewhere
    ]
    assert len({first, *map(digest_of, others)}) == 1 + len(others)


def test_the_digest_is_of_the_selected_rows_and_no_other_column() -> None:
    prepared, _ = prepare_preferences(Dataset.from_list([*ROWS, *ROWS]), TOKENIZER, max_length=64)
    assert isinstance(prepared, Dataset)
    assert rows_digest(prepared.select([0, 1])) == digest_of(ROWS)
    assert rows_digest(prepared.select([0, 1]).add_column("ref_chosen_logps", [1.0, 2.0])) == digest_of(ROWS)


def test_the_digest_knows_labels_and_margins() -> None:
    prepared, _ = prepare_preferences(Dataset.from_list(ROWS), TOKENIZER, max_length=64)
    assert isinstance(prepared, Dataset)
    others = [prepared.add_column("label", labels) for labels in ([True, False], [False, True])]
    others += [prepared.add_column("margin", [0.5, margin]) for margin in (1.0, 2.0)]
    assert len({rows_digest(each) for each in (prepared, *others)}) == 5


def test_data_is_told_without_the_text_of_rows() -> None:
    given = Dataset.from_list(ROWS)
    prepared, report = prepare_preferences(given, TOKENIZER, max_length=64)
    report.drop(8, DropReason.IDENTICAL, CANARY)
    assert CANARY in str(report.as_dict())
    found = describe_data("train", given, prepared, report)
    assert CANARY not in str(found)
    assert found["preparation"]["drops"]["identical"] == {"count": 1, "row_ids": [8]}
    assert (found["rows"], found["source"], found["hub_id"]) == (2, None, None)


def test_local_files_are_named_without_their_folder(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4, encoding="utf-8")
    given = load_preferences(str(path), split="train[:3]")
    found = describe_data("train", given, given, None)
    assert found["source"] == "mine.jsonl [:3]"
    assert str(tmp_path) not in str(found)


def test_data_of_the_hub_is_named_with_its_commit() -> None:
    given = Dataset.from_list(ROWS)
    url = "hf://datasets/owner/pairs@0123abcd/data/train-00000.parquet"
    given.info.download_checksums = {url: {"num_bytes": 1, "checksum": None}}
    found = describe_data("train", given, given, None)
    assert (found["hub_id"], found["revision"], found["source"]) == ("owner/pairs", "0123abcd", "owner/pairs")


def test_settings_have_no_secrets_and_no_paths(tmp_path: Path) -> None:
    args = DPOConfig(
        str(tmp_path),
        hub_token=CANARY,
        run_name=CANARY,
        beta=0.3,
        model_init_kwargs={"token": CANARY, "revision": "v1", "cache_dir": "/home/someone/cache"},
        reference_cache_dir="/home/someone/reference",
        precompute_ref_log_probs=True,
        report_to="none",
    )
    settings, changed = describe_settings(args)
    assert CANARY not in str(settings)
    assert "someone" not in str(settings)
    assert str(tmp_path) not in str(settings)
    assert settings["model_init_kwargs"] == {"revision": "v1"}
    assert settings["beta"] == 0.3
    assert "beta" in changed
    assert "learning_rate" not in changed


def test_numbers_of_tokens_are_no_secrets(tmp_path: Path) -> None:
    settings, changed = describe_settings(DPOConfig(str(tmp_path), max_tokens_per_forward=2048))
    assert settings["max_tokens_per_forward"] == 2048
    assert "max_tokens_per_forward" in changed


def test_secrets_and_folders_inside_a_value_are_not_told() -> None:
    thing = {"note": f"key {CANARY}", "args": "--out=/home/someone/x", f"{CANARY}": 1, "password": "hunter2"}
    settings, _ = describe_settings(Options(thing=thing))
    assert settings["thing"] == {"note": "key …", "args": "--out=x", "…": 1}


@dataclass
class Options:
    plain: int = 1
    listed: list = field(default_factory=lambda: [1])
    dtype: Any = torch.float32
    thing: Any = None


def test_values_that_json_lacks_are_named_or_left_out() -> None:
    settings, changed = describe_settings(Options(plain=2, dtype=torch.bfloat16, thing=object()))
    assert settings == {"plain": 2, "listed": [1], "dtype": "bfloat16"}
    assert changed == ["plain", "dtype"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--beta", "0.3"], "python run.py --beta 0.3"),
        (["--config", "/home/someone/a.yaml"], "python run.py --config a.yaml"),
        (["--output_dir=/home/someone/out/"], "python run.py --output_dir=out"),
        (["--hub_token", CANARY, "--beta", "1"], "python run.py --hub_token … --beta 1"),
        ([f"--hub_token={CANARY}"], "python run.py --hub_token=…"),
        (["a b"], "python run.py 'a b'"),
        (
            ["--max_tokens_per_forward", "2048", "--pad_token=x"],
            "python run.py --max_tokens_per_forward 2048 --pad_token=x",
        ),
        (["--dataset_name", "file:///home/someone/a.jsonl"], "python run.py --dataset_name a.jsonl"),
        (["--data_files=train=/home/someone/a.json"], "python run.py --data_files=train=a.json"),
        (["--model_name_or_path", CANARY], "python run.py --model_name_or_path …"),
        (["--judge", "gpt@https://host/v1"], "python run.py --judge gpt@https://host/v1"),
        (
            ["--model_init_kwargs", f'{{"token": "{CANARY}", "revision": "v1", "cache_dir": "/home/someone"}}'],
            """python run.py --model_init_kwargs '{"revision": "v1"}'""",
        ),
    ],
)
def test_the_command_line(arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "run.py"
    program.touch()
    monkeypatch.setattr(sys, "argv", [str(program), *arguments])
    found = describe_command()
    assert found is not None
    assert found.replace("'--hub_token=…'", "--hub_token=…").replace("'…'", "…") == expected


def test_a_notebook_has_no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/lib/ipykernel_launcher", "-f", "/run/kernel.json"])
    assert describe_command() is None
