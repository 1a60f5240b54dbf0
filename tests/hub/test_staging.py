"""What is copied to be published, from folders in which more than one run has left its files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from alignkit.errors import ModelError
from alignkit.hub.publish import pack
from alignkit.hub.secrets import SecretFound
from alignkit.hub.staging import MODEL_INDEX, Staged, stage
from tests.hub.conftest import snapshot
from tests.hub.record_factory import make_record

LEFT = ("report.html", "accuracy.png", "chat_template.jinja", "vocab.json")


@pytest.fixture
def staged(tmp_path: Path) -> Callable[..., Staged]:
    def run(*sources: Path) -> Staged:
        folder = tmp_path / "staged"
        folder.mkdir()
        before = [snapshot(source) for source in sources]
        found = stage(sources, folder, repo_id="me/x", base_model=None)
        assert [snapshot(source) for source in sources] == before
        return found

    return run


@pytest.mark.parametrize("created", ["2026-01-01T00:00:00+00:00", "2025-01-01T00:00:00+00:00", None])
def test_what_an_earlier_run_left_stays_here(
    created: str | None, staged: Callable[..., Staged], adapter: Path, tmp_path: Path
) -> None:
    """A trainer's output directory: its own report goes up, that of another run does not, nor another tokenizer."""
    make_record(created="2026-01-01T00:00:00+00:00").save(adapter)
    output = tmp_path / "output"
    output.mkdir()
    for name in (*LEFT, "LICENSE"):
        (output / name).write_text("left here")
    if created is not None:
        make_record(created=created).save(output)
    found = staged(adapter, output)
    is_own = created == "2026-01-01T00:00:00+00:00"
    assert set(found.files).intersection(LEFT) == ({"report.html", "accuracy.png"} if is_own else set())
    assert {"LICENSE", "tokenizer.json", "tokenizer_config.json", "run_record.json"} < set(found.files)


def test_a_tokenizer_is_taken_from_where_there_is_one(
    staged: Callable[..., Staged], adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).rename(output / name)
    (output / "qwen.tiktoken").write_text("AAAA 0")
    assert {"tokenizer.json", "tokenizer_config.json", "qwen.tiktoken"} < set(staged(adapter, output).files)


def test_shards_of_an_earlier_save_stay_here(staged: Callable[..., Staged], base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="30KB")
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    (folder / "model-00001-of-00099.safetensors").write_bytes(b"an earlier save")
    found = staged(folder)
    assert {name for name in found.files if name.endswith(".safetensors")} == shards


def test_an_index_reaches_into_no_other_folder(staged: Callable[..., Staged], base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="30KB")
    (folder / MODEL_INDEX).write_text('{"weight_map": {"a": "../other/secret.safetensors"}}')
    with pytest.raises(ModelError, match="no safetensors file beside it"):
        staged(folder)


@pytest.mark.parametrize("whose", ["base", "adapter"])
def test_a_path_of_the_base_or_the_run_is_found_wherever_it_lies(
    whose: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))  # in which the two usually lie in tests
    (tmp_path / "scratch").mkdir()
    folder = tmp_path / "scratch" / "staged"
    (adapter / "report.html").write_text(f"<p>{ {'base': base, 'adapter': adapter}[whose] }/x</p>")
    with pytest.raises(SecretFound, match=r"report\.html, line 1: path of this machine"):
        pack([adapter], folder, "me/x", token=None, secrets={})


def test_the_token_of_the_run_is_looked_for_beside_that_of_the_call(adapter: Path, tmp_path: Path) -> None:
    (adapter / "report.html").write_text("<p>An-Odd-Token-1</p>")
    with pytest.raises(SecretFound, match=r"secret value \(hub_token\)"):
        pack([adapter], tmp_path / "staged", "me/x", token="x" * 20, secrets={"hub_token": "An-Odd-Token-1"})
