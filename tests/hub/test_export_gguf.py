"""GGUF: fetching the converter, converting, and what the checks of the result find."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignkit.errors import ConfigError, ModelError
from alignkit.hub import gguf
from alignkit.hub.export import EXPORT_FILE, export
from alignkit.hub.gguf import OUT_TYPES, GgufFile, convert_to_gguf, fetch_converter
from alignkit.models.load import load_model, load_tokenizer
from tests.hub.export_models import save_adapter, save_base, save_wide_base
from tests.hub.test_export_ollama import read_modelfile

pytestmark = [
    # Plain PEFT reads a property of the base that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
HAS_LLAMA_CPP = importlib.util.find_spec("llama_cpp") is not None


@pytest.fixture(scope="session")
def converter() -> Path:
    try:
        return fetch_converter()
    except ModelError as error:
        pytest.skip(f"the converter cannot be had here: {error}")


def adapter_on_wide_base(folder: Path, architecture: str = "llama", **config: Any) -> Path:
    save_wide_base(folder / "base", architecture, **config)
    return save_adapter(folder / "adapter", folder / "base", target_modules=["q_proj", "v_proj", "down_proj"])


# ------------------------------------------------------------ conversion


@pytest.fixture(scope="session")
def converted(converter: Path, tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    """A tiny Llama in f16, whose folder `tiny` lies beside it."""
    folder = tmp_path_factory.mktemp("converted")
    save_wide_base(folder / "tiny", tie_word_embeddings=False)
    return convert_to_gguf(folder / "tiny", folder / "model.gguf", name="Tiny 1B Instruct")


def check_read_back(made: GgufFile, tiny: Path, logit_error: float) -> None:
    """By plain transformers, and by what the file says of itself."""
    assert sorted(path.name for path in made.path.parent.iterdir()) == ["model.gguf", "tiny"]
    assert made.bytes == made.path.stat().st_size
    assert made.checks["transformers"].mean_kl <= OUT_TYPES[made.outtype].max_kl
    assert ("llama_cpp" in made.checks) == HAS_LLAMA_CPP == (not made.notes)
    found = load_model(made.path, dtype=torch.float32, device=torch.device("cpu"))
    wanted = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.inference_mode():
        assert (found(input_ids=ids).logits - wanted(input_ids=ids).logits).abs().max() < logit_error


@pytest.mark.slow
def test_a_converted_model_is_read_back_as_it_was(converted: GgufFile) -> None:
    from gguf import GGUFReader

    tiny = converted.path.parent / "tiny"
    check_read_back(converted, tiny, 0.02)
    fields = {key: field.contents() for key, field in GGUFReader(converted.path).fields.items()}
    assert fields["general.name"] == "Tiny 1B Instruct"
    assert fields["tokenizer.chat_template"] == load_tokenizer(tiny).chat_template
    text = " ".join(str(value) for key, value in fields.items() if key.startswith("general."))
    assert not any(part in text for part in (str(tiny.parent), str(Path.home()), str(Path(__file__).parent)))


@pytest.mark.slow
def test_eight_bits_and_a_tied_head(tmp_path: Path, converter: Path) -> None:
    save_wide_base(tmp_path / "tiny", "qwen3", tie_word_embeddings=True, head_dim=128)
    made = convert_to_gguf(tmp_path / "tiny", tmp_path / "model.gguf", outtype="q8_0")
    check_read_back(made, tmp_path / "tiny", 1.0)


@pytest.mark.slow
def test_all_formats_at_once(tmp_path: Path, converter: Path) -> None:
    adapter = adapter_on_wide_base(tmp_path)
    made = export(adapter, tmp_path / "out", formats=["merged", "gguf", "ollama"], name="tiny")
    on_disk = {str(file.relative_to(made.path)) for file in made.path.rglob("*") if file.is_file()}
    assert set(made.files) == on_disk >= {"merged/model.safetensors", "model.gguf", "Modelfile", EXPORT_FILE}
    assert ("from", "./model.gguf") in read_modelfile((made.path / "Modelfile").read_text())
    figures = json.loads((made.path / EXPORT_FILE).read_text())
    assert figures["merged"]["agreement"] == made.merged.agreement._asdict()
    assert {key: made.as_dict()[key] for key in ("merged", "gguf")} == {key: figures[key] for key in ("merged", "gguf")}
    assert made.gguf is not None
    assert figures["gguf"]["checks"]["transformers"] == made.gguf.checks["transformers"]._asdict()
    assert str(tmp_path) not in (made.path / EXPORT_FILE).read_text()
    # The adapter's effect is in the file.
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.inference_mode():
        logits = {
            name: load_model(place, dtype=torch.float32, device=torch.device("cpu"))(input_ids=ids).logits
            for name, place in {"gguf": made.gguf.path, "adapter": adapter, "base": tmp_path / "base"}.items()
        }
    distance = (logits["gguf"] - logits["adapter"]).abs().mean()
    assert distance < 0.1 * (logits["base"] - logits["adapter"]).abs().mean()


@pytest.mark.slow
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path: Path, converter: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    with pytest.raises(ModelError, match=r"converter \(.*\) refused the model: .+ give the folder of its clone"):
        export(adapter, tmp_path / "out", formats=["gguf"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.slow
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, converted: GgufFile) -> None:
    tokenizer = save_wide_base(tmp_path / "other", seed=7)
    with pytest.raises(ModelError, match="says something else than the model: mean KL"):
        gguf._read_back(converted.path, tmp_path / "other", tokenizer, "f16")


@pytest.mark.slow
def test_an_error_leaves_no_file(tmp_path: Path, converter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.setattr(gguf, "_run_converter", lambda folder, model_dir, file, *_: file.write_text("no GGUF"))
    with pytest.raises(ValueError):  # noqa: PT011 - of whoever reads it first
        convert_to_gguf(tmp_path / "tiny", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.slow
def test_metadata_is_compared(converted: GgufFile, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = converted.path.parent / "tiny"
    tokenizer = load_tokenizer(tiny)
    gguf._check_metadata(converted.path, tiny, tokenizer)
    tokenizer.chat_template = f"{tokenizer.chat_template} "
    with pytest.raises(ModelError, match="does not hold the tokenizer's chat template"):
        gguf._check_metadata(converted.path, tiny, tokenizer)
    tokenizer = load_tokenizer(tiny)
    tokenizer.eos_token = "<|im_start|>"
    with pytest.raises(ModelError, match="another EOS token"):
        gguf._check_metadata(converted.path, tiny, tokenizer)
    tokenizer.add_tokens(["one more"])
    with pytest.raises(ModelError, match="holds other tokens than the tokenizer: 1 of"):
        gguf._check_metadata(converted.path, tiny, tokenizer)


@pytest.mark.slow
def test_a_path_in_the_metadata_is_found(tmp_path: Path, converter: Path) -> None:
    save_wide_base(tmp_path / "tiny")
    with pytest.raises(ModelError, match=r"names a path of this machine \(general.name\)"):
        convert_to_gguf(tmp_path / "tiny", tmp_path / "model.gguf", name=str(tmp_path / "tiny"))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.slow
def test_the_demonstration_model_from_adapter_to_ollama(tmp_path: Path, converter: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from tests.hub.export_models import shake

    base: Any = load_model("demo", dtype=torch.bfloat16, device=torch.device("cpu"))
    adapted = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    shake(adapted, 0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    made = export(tmp_path / "adapter", tmp_path / "out", formats=["merged", "ollama"], outtype="f16")
    assert made.merged.agreement.mean_kl < made.merged.effect / 10
    assert made.merged.agreement.same_top > 0.98
    assert made.gguf is not None
    assert made.gguf.checks["transformers"].mean_kl < 1e-4
    commands = dict(read_modelfile((made.path / "Modelfile").read_text()))
    assert "<|im_start|>user\n{{ .Content }}<|im_end|>" in commands["template"]
    assert (commands["stop"], commands["license"]) == ("<|im_end|>", "apache-2.0")
    if not HAS_LLAMA_CPP:
        pytest.skip("llama-cpp-python is not installed: the file was read back by transformers alone")
    assert made.gguf.checks["llama_cpp"].mean_kl < 1e-3
    assert made.gguf.checks["llama_cpp"].same_top > 0.97


# ------------------------------------------------------------ fetching


def test_a_clone_of_llama_cpp_may_be_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no convert_hf_to_gguf"):
        fetch_converter(tmp_path)
    (tmp_path / "convert_hf_to_gguf.py").write_text("")
    assert fetch_converter(tmp_path) == tmp_path


def fake_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes] | None) -> list[list[str]]:
    """Let `pip download` put an archive with `files` into its folder, or fail; return the commands that are run."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment lacks pip, which fetches the converter")
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if files is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found\n")
        with tarfile.open(Path(command[command.index("-d") + 1]) / "a.tar.gz", "w:gz") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gguf.subprocess, "run", run)
    return commands


def test_only_the_converter_is_unpacked_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = "llama_cpp_python-0/vendor/llama.cpp/"
    files = {
        f"{inside}convert_hf_to_gguf.py": b"script",
        f"{inside}conversion/base.py": b"base",
        f"{inside}gguf-py/gguf/__init__.py": b"",
        f"{inside}src/llama.cpp": b"not wanted",
        f"{inside}conversion/../../../../../evil.py": b"evil",
        "llama_cpp_python-0/llama_cpp/llama.py": b"not wanted",
    }
    commands = fake_pip(monkeypatch, tmp_path, files)
    folder = fetch_converter()
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/__init__.py"}
    assert not list(tmp_path.rglob("evil.py"))
    assert fetch_converter() == folder
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--require-hashes", "--no-deps"} <= set(command)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_a_failed_fetch_is_explained_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, tmp_path, None)
    with pytest.raises(ModelError, match=r"No matching distribution found.*package index, or give a clone"):
        fetch_converter()
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_archive_without_the_converter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, tmp_path, {"llama_cpp_python-0/README.md": b""})
    with pytest.raises(ModelError, match="holds no convert_hf_to_gguf"):
        fetch_converter()
    assert list((tmp_path / "cache").iterdir()) == []


# ------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ["ggfu"]}, "Unknown format 'ggfu'.* Did you mean 'gguf'"),
        ({"formats": []}, "one or more of merged, gguf, ollama"),
        ({"formats": "gguf"}, "one or more of merged, gguf, ollama"),
        ({"formats": ["gguf"], "outtype": "q8"}, "outtype 'q8' is not one of .* Did you mean 'q8_0'"),
    ],
)
def test_options_are_checked_before_the_work(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export("nowhere/at-all", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        convert_to_gguf(tmp_path, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"


def test_a_missing_package_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else found(name))
    with pytest.raises(ModelError, match=r'needs sentencepiece: pip install "alignkit\[export\]"'):
        export(tmp_path / "no adapter here", tmp_path / "out", formats=("gguf",))
    assert not (tmp_path / "out").exists()
