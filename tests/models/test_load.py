"""Loading models: dtype by device, quantization, adapters to continue from, and a message for each fault."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from alignkit.errors import ConfigError, ModelError
from alignkit.models import load
from alignkit.models.load import compute_dtype, int8, load_model, load_tokenizer, nf4, with_pad_token
from tests.model_factory import tiny_config, tiny_model
from tests.models.conftest import character_tokenizer

CPU = torch.device("cpu")
# Plain PEFT reads a property of the base that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def adapter_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A saved adapter with weights that are not zero, on the tiny Llama."""
    model = get_peft_model(load_model(tiny_folder, device=CPU), LoraConfig(r=2, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# ------------------------------------------------------------ dtype and device


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_dtype_on_cuda_follows_the_capability(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert compute_dtype(torch.device("cuda", 0)) is expected


def test_dtype_on_cpu_follows_its_instructions():
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert compute_dtype(CPU) is (torch.bfloat16 if native else torch.float32)


def test_device_without_16_bit_arithmetic_is_fp32_and_says_so_once(caplog):
    load._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert compute_dtype(torch.device("mps")) is torch.float32
        assert compute_dtype(torch.device("mps")) is torch.float32
    assert [record.message for record in caplog.records] == [
        "No native 16-bit arithmetic on mps: the model is loaded in fp32."
    ]


def test_model_has_the_dtype_of_the_device_or_the_one_asked_for(tiny_folder):
    assert load_model(tiny_folder, device=CPU).dtype is compute_dtype(CPU)
    assert load_model(str(tiny_folder), dtype=torch.float32).dtype is torch.float32
    assert load_model(tiny_folder, model_init_kwargs={"dtype": "float16"}).dtype is torch.float16
    assert load_model(tiny_folder, model_init_kwargs={"torch_dtype": "auto"}).dtype is torch.bfloat16
    assert not load_model(tiny_folder).training


def test_device_map_is_one_device():
    cuda = torch.device("cuda", 1)
    assert load._device_map(None, cuda, quantized=True) == {"": cuda}
    assert load._device_map("auto", cuda, quantized=True) == {"": cuda}
    assert load._device_map("cuda:3", cuda, quantized=False) == {"": "cuda:3"}
    assert load._device_map({"": 0}, cuda, quantized=False) == {"": 0}
    assert load._device_map(None, cuda, quantized=False) is None
    assert load._device_map(None, CPU, quantized=True) is None


@pytest.mark.parametrize("device_map", ["balanced", {"model": 0, "lm_head": "cpu"}, {"": "disk"}])
def test_several_devices_are_refused(tiny_folder, device_map):
    with pytest.raises(ConfigError, match="one device per process"):
        load_model(tiny_folder, model_init_kwargs={"device_map": device_map})


# ------------------------------------------------------------ quantization


def test_nf4_is_double_quantized_and_never_fp32_by_accident():
    config = nf4()
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype is compute_dtype()
    assert nf4(torch.float16).bnb_4bit_compute_dtype is torch.float16
    assert int8().load_in_8bit


@pytest.mark.parametrize("factory", [nf4, int8])
def test_missing_bitsandbytes_names_the_extra(monkeypatch, factory):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r'pip install "alignkit\[quantized\]"'):
        factory()


def test_4_bit_model_loads_and_is_quantized(tiny_folder):
    from bitsandbytes.nn import Linear4bit

    model = load_model(tiny_folder, quantization_config=nf4(), device=CPU)
    quantized = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(quantized) == 2 * 7  # every linear layer of two blocks; the head stays
    assert all(module.weight.dtype is torch.uint8 and module.compute_dtype is compute_dtype() for module in quantized)
    assert model.lm_head.weight.dtype is compute_dtype()
    assert model.model.norm.weight.dtype is compute_dtype()
    dense = load_model(tiny_folder, dtype=torch.float32)(torch.arange(40, 60)[None]).logits
    logits = model(torch.arange(40, 60)[None]).logits.float()
    assert torch.nn.functional.cosine_similarity(dense, logits, dim=-1).mean() > 0.9


def test_8_bit_model_loads_and_does_not_flood_the_log(tiny_folder, caplog):
    from bitsandbytes.nn import Linear8bitLt

    model = load_model(tiny_folder, dtype=torch.bfloat16, quantization_config=int8(), device=CPU)
    assert sum(isinstance(module, Linear8bitLt) for module in model.modules()) == 2 * 7
    with caplog.at_level(logging.WARNING):
        logits = model(torch.arange(40, 60)[None]).logits.float()
    assert len([record for record in caplog.records if "MatMul8bitLt" in record.message]) <= 1
    dense = load_model(tiny_folder, dtype=torch.float32)(torch.arange(40, 60)[None]).logits
    assert torch.nn.functional.cosine_similarity(dense, logits, dim=-1).mean() > 0.99


def test_quantized_checkpoint_loads_as_it_is_but_not_twice(tiny_folder, tmp_path):
    from bitsandbytes.nn import Linear4bit

    # The stored compute dtype is fp32, what bitsandbytes takes by default.
    stored = load_model(tiny_folder, quantization_config=nf4(torch.float32), device=CPU)
    stored.save_pretrained(tmp_path / "nf4")
    with pytest.raises(ModelError, match=r"quantized already \(bitsandbytes\).*Leave out quantization_config"):
        load_model(tmp_path / "nf4", quantization_config=nf4())
    model = load_model(tmp_path / "nf4", device=CPU)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert {layer.compute_dtype for layer in layers} == {compute_dtype(CPU)}


def test_fp32_products_by_default_of_bitsandbytes_are_warned_about(tiny_folder, caplog):
    if compute_dtype() is torch.float32:
        pytest.skip("fp32 is right on this device")
    with caplog.at_level(logging.WARNING):
        load_model(tiny_folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert any("computes in fp32" in record.message for record in caplog.records)


# ------------------------------------------------------------ continuing from an adapter


def test_adapter_is_continued_exactly_and_in_fp32(adapter_folder):
    from safetensors.torch import load_file

    model = load_model(adapter_folder, device=CPU)
    assert isinstance(model, PeftModel)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = load_file(adapter_folder / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in trainable} == set(saved)
    for name, parameter in trainable.items():
        assert parameter.dtype is torch.float32
        assert torch.equal(parameter, saved[name.replace(".default", "")])
    assert model.base_model.model.model.norm.weight.dtype is compute_dtype(CPU)


def test_adapter_is_continued_on_a_4_bit_base(adapter_folder):
    model = load_model(adapter_folder, quantization_config=nf4(), device=CPU)
    assert all(p.dtype is torch.float32 for p in model.parameters() if p.requires_grad)
    assert any(p.dtype is torch.uint8 for p in model.parameters())


def test_whole_modules_of_a_continued_adapter_are_not_rounded(tiny_folder, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = load.add_adapter(load_model(tiny_folder, device=CPU), config)
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    head.data += 1e-4  # far below what bf16 can tell apart at 0.2
    model.save_pretrained(tmp_path / "adapter")
    again = load_model(tmp_path / "adapter", device=CPU)
    assert torch.equal(again.base_model.model.lm_head.modules_to_save["default"].weight, head)


def test_adapter_without_a_tokenizer_uses_its_bases(adapter_folder, tiny_folder):
    assert load_tokenizer(adapter_folder).get_vocab() == load_tokenizer(tiny_folder).get_vocab()


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_adapter_without_a_recorded_base(adapter_folder):
    edit_json(adapter_folder / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ModelError, match="does not record its base model"):
        load_model(adapter_folder)


def test_adapter_whose_base_is_gone(adapter_folder):
    edit_json(adapter_folder / "adapter_config.json", base_model_name_or_path="/gone/model")
    with pytest.raises(ModelError, match="No such path: '/gone/model'"):
        load_model(adapter_folder)


def test_adapter_on_an_adapter(adapter_folder, tmp_path):
    shutil.copytree(adapter_folder, tmp_path / "second")
    edit_json(tmp_path / "second" / "adapter_config.json", base_model_name_or_path=str(adapter_folder))
    with pytest.raises(ModelError, match="is itself an adapter"):
        load_model(tmp_path / "second")


def test_adapter_of_another_shape(adapter_folder, tmp_path):
    tiny_model("llama", hidden_size=32).save_pretrained(tmp_path / "narrow")
    edit_json(adapter_folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "narrow"))
    with pytest.raises(
        ModelError, match=r"does not fit this base, so it was trained on another one: .* 32 wide in the base, and 64"
    ):
        load_model(adapter_folder)


def test_adapter_with_missing_weights(adapter_folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter_folder / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, adapter_folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="cannot be put on its base: Found missing adapter keys"):
        load_model(adapter_folder)


def test_adapter_beside_a_whole_model(tiny_folder, adapter_folder):
    shutil.copytree(tiny_folder, adapter_folder, dirs_exist_ok=True)
    with pytest.raises(ModelError, match="both a whole model and an adapter"):
        load_model(adapter_folder)


# ------------------------------------------------------------ what is refused


def test_no_such_path_names_the_nearest(tiny_folder):
    with pytest.raises(ModelError, match=r"No such path: .*lama2'\. Did you mean 'llama'\?"):
        load_model(tiny_folder.parent / "lama2")


def test_not_on_the_hub():
    with pytest.raises(ModelError, match="'nobody/nothing' is neither a folder here nor in the local cache"):
        load_model("nobody/nothing", model_init_kwargs={"local_files_only": True})


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match="holds no model"):
        load_model(tmp_path)


def test_file_that_is_no_model(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"is a file\. Give the folder"):
        load_model(tmp_path / "weights.bin")


def test_broken_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json' is not JSON that can be read .* Fetch it again"):
        load_model(tmp_path)


def test_remote_code_is_refused(tmp_path):
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="pass trust_remote_code=True"):
        load_model(tmp_path)


def test_unknown_model_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange"}))
    with pytest.raises(ModelError, match="model type 'strange', which the installed transformers does not know"):
        load_model(tmp_path)


def test_sequence_classifier_is_refused(tmp_path):
    LlamaForSequenceClassification(tiny_config("llama")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no causal language model but LlamaForSequenceClassification"):
        load_model(tmp_path)


def test_encoder_decoder_is_refused(tmp_path):
    config = T5Config(vocab_size=32, d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-decoder model"):
        load_model(tmp_path)


def test_model_without_a_language_head_anywhere(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="cannot load as a causal language model"):
        load_model(tmp_path)


def test_checkpoint_without_its_head_is_refused(tmp_path):
    LlamaModel(tiny_config("llama")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks 1 of the model's weights \(lm_head.weight\); they would be random"):
        load_model(tmp_path)


def test_arguments_given_twice_must_agree(tiny_folder):
    with pytest.raises(ConfigError, match="dtype is given twice"):
        load_model(tiny_folder, dtype=torch.float32, model_init_kwargs={"dtype": "bfloat16"})
    assert load_model(tiny_folder, dtype=torch.float32, model_init_kwargs={"dtype": "float32"}).dtype is torch.float32


def test_unknown_dtype(tiny_folder):
    with pytest.raises(ConfigError, match="dtype 'bf16' is not one of bfloat16"):
        load_model(tiny_folder, model_init_kwargs={"dtype": "bf16"})


def test_unknown_model_init_kwarg(tiny_folder):
    with pytest.raises(ConfigError, match=r"model_init_kwargs holds something that the model does not take: .*colour"):
        load_model(tiny_folder, model_init_kwargs={"colour": "red"})


def test_caller_keeps_its_model_init_kwargs(tiny_folder):
    kwargs = {"attn_implementation": "eager", "dtype": "float32"}
    assert load_model(tiny_folder, model_init_kwargs=kwargs).config._attn_implementation == "eager"
    assert kwargs == {"attn_implementation": "eager", "dtype": "float32"}


def test_gguf_is_not_quantized_again(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="GGUF file and cannot be quantized again"):
        load_model(tmp_path / "model.gguf", quantization_config=nf4())


def test_broken_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path)


def test_several_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"several GGUF files \(a.gguf, b.gguf\)"):
        load_model(tmp_path)


# ------------------------------------------------------------ tokenizers


def test_pad_token_is_added_to_a_copy():
    tokenizer = character_tokenizer(eos_token="</s>")
    padded = with_pad_token(tokenizer)
    assert tokenizer.pad_token is None
    assert (padded.pad_token, padded.pad_token_id) == ("</s>", 2)


def test_tokenizer_that_can_pad_is_returned_itself():
    tokenizer = character_tokenizer(pad_token="<pad>")
    assert with_pad_token(tokenizer) is tokenizer


def test_tokenizer_without_pad_and_eos():
    with pytest.raises(ModelError, match="no pad token and no end-of-sequence token"):
        with_pad_token(character_tokenizer())


def test_folder_without_a_tokenizer(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"No tokenizer could be loaded from .*pass it as processing_class"):
        load_tokenizer(tmp_path)


def test_loaded_tokenizer_can_pad(tiny_folder):
    assert load_tokenizer(tiny_folder).pad_token == "</s>"
