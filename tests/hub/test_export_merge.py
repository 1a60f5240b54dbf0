"""Merging: the merged model says what the adapter said, or is not kept."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from alignkit.errors import ConfigError, ModelError
from alignkit.hub import merge
from alignkit.hub.agreement import Fp32Arithmetic, check_ids, check_texts, compare, next_token_logps
from alignkit.hub.merge import MERGE_FILE, ROUNDING_KL, merge_adapter
from alignkit.hub.merge_inputs import new_folder
from tests.hub.export_models import TEMPLATE, save_adapter, save_base, shake
from tests.hub.record_factory import make_record
from tests.model_factory import VOCAB_SIZE, tiny_model

pytestmark = [
    # Plain PEFT reads a property of the base that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Plain PEFT, when the adapters of these tests are made.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "dpo", base)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------ the comparison


def test_kl_and_agreement_are_those_of_the_definition() -> None:
    first = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    second = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]))
    found = compare([first], [second])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert found.max_kl == pytest.approx(expected, rel=1e-5)
    assert found.mean_kl == pytest.approx(expected / 2, rel=1e-5)
    assert (found.tokens, found.same_top) == (2, 0.5)


def test_padding_of_the_vocabulary_does_not_count() -> None:
    logps = torch.log(torch.tensor([[0.5, 0.5]]))
    padded = torch.log(torch.tensor([[0.25, 0.25, 0.5]]))
    assert compare([logps], [padded]).max_kl == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3", "gpt2", "phi"])
def test_16_bit_weights_compute_as_their_fp32_copy_does(architecture: str) -> None:
    model = tiny_model(architecture).to(torch.bfloat16)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.inference_mode():
        half = model(input_ids=ids).logits
        with Fp32Arithmetic():
            found = model(input_ids=ids).logits
        wanted = model.float()(input_ids=ids).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    assert (half.float() - wanted).abs().max() > 100 * (found - wanted).abs().max()


def test_texts_are_conversations_where_there_is_a_template(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert check_texts(tokenizer)[0].startswith("<user>What is the capital of France")
    assert "<assistant>It is Paris" in check_texts(tokenizer)[0]
    tokenizer.chat_template = None
    assert check_texts(tokenizer)[0].startswith("What is the capital of France")
    with pytest.raises(ValueError, match="no text to compare"):
        check_ids(tokenizer, [""])


# ------------------------------------------------------------ what is written


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("gemma3_text", {"tie_word_embeddings": True}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_merged_model_is_the_adapter_on_its_base(
    tmp_path: Path, architecture: str, config: dict[str, Any], dtype: torch.dtype
) -> None:
    base = save_base(tmp_path / "base", architecture, dtype=dtype, **config)
    adapter = save_adapter(tmp_path / "adapter", base)
    merged = merge_adapter(adapter, tmp_path / "out")
    assert merged.dtype == str(dtype).removeprefix("torch.")
    assert merged.agreement.mean_kl < merged.effect / 100
    assert merged.agreement.mean_kl <= merged.tolerance == max(ROUNDING_KL[dtype], 0.01 * merged.effect)
    # By plain transformers and PEFT, in plain fp32.
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.inference_mode():
        wanted = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(input_ids=ids).logits
        bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(input_ids=ids).logits
    assert (found - wanted).abs().mean() < 0.05 * (bare - wanted).abs().mean()


def test_the_folder_is_complete_and_says_what_was_measured(base: Path, adapter: Path, tmp_path: Path) -> None:
    merged = merge_adapter(adapter, tmp_path / "out")
    files = set(leftovers(merged.path))
    assert files >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", MERGE_FILE}
    assert not {"adapter_config.json", "training_args.bin"} & files
    weights = load_file(merged.path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not any("lora" in name or "base_layer" in name for name in weights)
    assert AutoTokenizer.from_pretrained(merged.path).chat_template == TEMPLATE
    check = json.loads((merged.path / MERGE_FILE).read_text())
    assert check["agreement"] == merged.agreement._asdict()
    assert check["base"]["name"] == "tiny-llama"
    assert check["tolerance"] == merged.tolerance
    for file in merged.path.glob("*.json"):
        assert str(tmp_path) not in file.read_text()
        assert str(base) not in file.read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]},
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [5, 6, 7], "target_modules": ["q_proj"]},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
@pytest.mark.parametrize("tied", [True, False])
def test_kinds_of_lora(tmp_path: Path, options: dict[str, Any], tied: bool) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=tied)
    adapter = save_adapter(tmp_path / "adapter", base, **options)
    merged = merge_adapter(adapter, tmp_path / "out")
    assert merged.agreement.mean_kl < merged.effect / 20
    reloaded = AutoModelForCausalLM.from_pretrained(merged.path)
    changes_an_end = any("lm_head" in str(value) or "embed" in str(value) for value in options.values())
    if tied and changes_an_end:
        head, embedding = reloaded.get_output_embeddings(), reloaded.get_input_embeddings()
        assert not reloaded.config.tie_word_embeddings
        assert not torch.equal(head.weight, embedding.weight)


def test_another_base_may_be_given(base: Path, adapter: Path, tmp_path: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "gone")
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "adapter_config.json").write_text(json.dumps(settings))
    (moved / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="No such path"):
        merge_adapter(moved, tmp_path / "out")
    assert merge_adapter(moved, tmp_path / "out", base=base).agreement.mean_kl < 1e-2


def test_a_base_packed_in_training_is_said(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert merge_adapter(adapter, tmp_path / "plain").notes == ()
    (copy := tmp_path / "copy").mkdir()
    for file in adapter.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    make_record().save(copy)  # of a run on a base packed as nf4
    (note,) = merge_adapter(copy, tmp_path / "out").notes
    assert "packed as nf4" in note
    assert "bfloat16 base" in note


# ------------------------------------------------------------ what is refused


def test_a_planted_bug_is_found_and_nothing_is_left(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda self, name: 1.5 * right(self, name))
    with pytest.raises(ModelError, match="does not say what the adapter says: mean KL"):
        merge_adapter(adapter, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_one_module_that_was_left_out_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=12)
    adapter = save_adapter(tmp_path / "adapter", base)
    right, done = LoraLinear.get_delta_weight, []

    def forgetful(self: LoraLinear, name: str) -> torch.Tensor:
        done.append(name)
        return right(self, name) * (len(done) != 20)

    monkeypatch.setattr(LoraLinear, "get_delta_weight", forgetful)
    with pytest.raises(ModelError, match="does not say what the adapter says: mean KL"):
        merge_adapter(adapter, tmp_path / "out")
    assert len(done) == 84


def test_weights_that_were_not_written_are_found(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = merge._save_merged

    def spoiled(model: Any, dtype: torch.dtype, folder: Path) -> None:
        right(model, dtype, folder)
        reloaded = AutoModelForCausalLM.from_pretrained(folder)
        reloaded.model.layers[1].mlp.down_proj.weight.data.zero_()
        reloaded.save_pretrained(folder)

    monkeypatch.setattr(merge, "_save_merged", spoiled)
    with pytest.raises(ModelError, match="does not say what the adapter says"):
        merge_adapter(adapter, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_the_tolerance_is_the_users(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"allowed are 1e-12"):
        merge_adapter(adapter, tmp_path / "out", tolerance=1e-12)


def test_rounding_away_an_adapter_is_said(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    faint = save_adapter(tmp_path / "faint", base, scale=0.004)
    with caplog.at_level(logging.WARNING, logger="alignkit"):
        lossy = merge_adapter(faint, tmp_path / "bf16")
        assert "costs much of what the adapter changes" in caplog.text
        caplog.clear()
        exact = merge_adapter(faint, tmp_path / "fp32", dtype=torch.float32)
    assert not caplog.records
    assert exact.agreement.mean_kl < lossy.agreement.mean_kl / 10


def test_a_full_output_directory_is_refused(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match=r"exists and is not empty\. Give another one"):
        merge_adapter(adapter, tmp_path / "out")
    assert leftovers(tmp_path / "out") == ["mine.txt"]
    assert leftovers(tmp_path) == ["out"]


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty one is fine
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        assert leftovers(tmp_path / "out") == []
    assert leftovers(tmp_path / "out") == ["a"]
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "other" / "deep"):
        raise KeyboardInterrupt
    assert leftovers(tmp_path / "other") == []


def test_a_whole_model_has_nothing_to_merge(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a whole model, so there is nothing to merge"):
        merge_adapter(base, tmp_path / "out")


def test_a_reward_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "reward", base)
    settings = json.loads((tmp_path / "reward" / "adapter_config.json").read_text())
    (tmp_path / "reward" / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "SEQ_CLS"}))
    with pytest.raises(ModelError, match="a reward model's adapter"):
        merge_adapter(tmp_path / "reward", tmp_path / "out")


def test_prompt_learning_is_refused(base: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "prompt"
    )
    with pytest.raises(ModelError, match=r"prompt learning .* nothing can be merged"):
        merge_adapter(tmp_path / "prompt", tmp_path / "out")


def test_a_base_quantized_on_disk_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    (packed := tmp_path / "packed").mkdir()
    for file in base.iterdir():
        (packed / file.name).write_bytes(file.read_bytes())
    settings = json.loads((packed / "config.json").read_text())
    settings["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True).to_dict()
    (packed / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"quantized on disk \(bitsandbytes\).*16-bit"):
        merge_adapter(adapter, tmp_path / "out", base=packed)


def test_another_models_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", hidden_size=64)
    with pytest.raises(ModelError, match="does not fit this base, so it was trained on another one"):
        merge_adapter(adapter, tmp_path / "out", base=other)
    assert leftovers(tmp_path) == ["other"]


def test_a_base_that_is_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is itself an adapter"):
        merge_adapter(adapter, tmp_path / "out", base=adapter)


def test_too_little_disk_is_refused_before_the_work(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = merge.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(merge, "_adapter_on_base", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ModelError, match=r"0\.0 GB are free where it would be written"):
        merge_adapter(adapter, tmp_path / "out")


def test_other_dtypes_are_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be merged into"):
        merge_adapter(adapter, tmp_path / "out", dtype=torch.float64)


# ------------------------------------------------------------ a trainer


def new_trainer(base: Path, folder: Path, **options: Any) -> Any:
    from alignkit import DPOConfig, DPOTrainer

    rows = [{"prompt": "one two", "chosen": " three", "rejected": " four"}] * 2
    return DPOTrainer(
        model=str(base),
        args=DPOConfig(output_dir=str(folder), report_to="none", use_cpu=True, learning_rate=1e-4),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        **options,
    )


def test_a_trainer_on_a_packed_base_is_merged_into_16_bits(tmp_path: Path) -> None:
    from alignkit import nf4

    pytest.importorskip("bitsandbytes")
    base = save_base(tmp_path / "base", hidden_size=64)
    trainer = new_trainer(base, tmp_path / "run", quantization_config=nf4())
    shake(trainer.model, 0.1)
    merged = merge_adapter(trainer, tmp_path / "out")
    assert "packed as nf4" in merged.notes[0]
    assert merged.base["quantization"] is None
    weights = load_file(merged.path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    # What the adapter does not touch is the base's own, not an unpacked copy's.
    stored = load_file(base / "model.safetensors")
    assert torch.equal(weights["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert merged.agreement.mean_kl < merged.effect / 100


def test_a_trainers_policy_is_merged_as_it_is(base: Path, tmp_path: Path) -> None:
    trainer = new_trainer(base, tmp_path / "run")
    policy: Any = trainer.model
    assert isinstance(policy, PeftModel)
    shake(policy, 0.1)
    merged = merge_adapter(trainer, tmp_path / "out")
    assert merged.agreement.mean_kl < merged.effect / 100
    assert merged.base["name"] == "tiny-llama"
    row = list(range(3, VOCAB_SIZE - 1))
    found = next_token_logps(AutoModelForCausalLM.from_pretrained(merged.path), [row])
    assert compare(next_token_logps(policy.eval(), [row]), found).mean_kl < merged.effect / 50
