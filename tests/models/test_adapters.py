"""Adapters: fp32 on any base, the base unchanged to the bit, plain PEFT files, a frozen copy as the reference."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from alignkit.errors import ModelError
from alignkit.models.load import add_adapter, disable_dropout, load_model, nf4, reference_adapter
from tests.model_factory import ARCHITECTURES, tiny_model

IDS = torch.arange(40, 60)[None]  # (1, 20)
CPU = torch.device("cpu")
# Plain PEFT reads a property of the base that transformers has renamed.
PLAIN_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
VARIANTS = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [41, 42]},
}


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **settings})


def train_one_step(model: nn.Module) -> None:
    """One large AdamW step, so that every trainable weight moves."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # A moves only after B has left zero
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@PLAIN_PEFT
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", ["bf16", "fp32", "nf4"])
def test_adapter_is_fp32_trains_and_leaves_the_base_alone(tiny_folder, tmp_path, base, variant):
    settings = {"device": CPU, "dtype": torch.float32 if base == "fp32" else torch.bfloat16}
    if base == "nf4":
        settings["quantization_config"] = nf4(torch.bfloat16)
    model = load_model(tiny_folder, **settings)
    model.train()  # bitsandbytes repacks 4-bit weights on a CPU in evaluation mode
    with torch.no_grad():
        expected = model(IDS).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = add_adapter(model, lora(**VARIANTS[variant]))
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    if variant == "dora":
        assert any("lora_magnitude_vector" in name for name in trainable)

    start = {name: p.detach().clone() for name, p in trainable.items()}
    train_one_step(adapted)
    moved = {name for name, p in trainable.items() if not torch.equal(p, start[name])}
    assert moved == set(trainable)
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", ""): tensor
        for name, tensor in adapted.state_dict().items()
    }
    for name, tensor in before.items():
        key = name.replace("embed_tokens.weight", "embed_tokens.token_adapter.weight") if variant == "tokens" else name
        assert torch.equal(after[key if key in after else name], tensor), name
    with torch.no_grad(), adapted.disable_adapter():
        assert torch.equal(adapted(IDS).logits, expected)
    with torch.no_grad():
        trained = adapted(IDS).logits
    assert not torch.equal(trained, expected)

    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    plain = PeftModel.from_pretrained(load_model(tiny_folder, **settings), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "adapter", **settings).train()(IDS).logits, trained)
        read = plain.train()(IDS).logits
    if variant == "modules_to_save":  # plain PEFT rounds whole modules to the base's dtype
        assert torch.nn.functional.cosine_similarity(read.float(), trained.float(), dim=-1).min() > 0.98
    else:
        assert torch.equal(read, trained)


def test_callers_config_is_not_changed():
    config = lora(target_modules="all-linear", inference_mode=True)
    snapshot = copy.deepcopy(config.__dict__)
    model = add_adapter(tiny_model("llama"), config)
    assert config.__dict__ == snapshot
    assert model.peft_config["default"].task_type == "CAUSAL_LM"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_fits_every_architecture(architecture):
    model = add_adapter(tiny_model(architecture), lora(target_modules="all-linear"))
    assert not any("lm_head" in name or "embed_out" in name for name, p in model.named_parameters() if p.requires_grad)
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(gradient is not None for gradient in gradients)


def test_other_methods_of_peft_work():
    config = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = add_adapter(tiny_model("llama").to(torch.bfloat16), config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(input_ids=IDS, labels=IDS).loss.backward()


class CountedLinear(LoraLinear):
    """PEFT's layer under another class."""


@PLAIN_PEFT
def test_custom_layers_are_used_and_leave_no_trace_in_the_files(tiny_folder, tmp_path):
    base = load_model(tiny_folder, dtype=torch.float32)
    config = lora(target_modules="all-linear")
    model = add_adapter(base, config, custom_modules={nn.Linear: CountedLinear})
    assert config._custom_modules is None
    assert sum(isinstance(module, CountedLinear) for module in model.modules()) == 14
    train_one_step(model)
    model.save_pretrained(tmp_path)
    assert "custom" not in (tmp_path / "adapter_config.json").read_text()
    plain = PeftModel.from_pretrained(load_model(tiny_folder, dtype=torch.float32), tmp_path)
    assert not any(isinstance(module, CountedLinear) for module in plain.modules())
    assert torch.equal(plain(IDS).logits, model.eval()(IDS).logits)
    again = load_model(tmp_path, dtype=torch.float32, custom_modules={nn.Linear: CountedLinear})
    assert sum(isinstance(module, CountedLinear) for module in again.modules()) == 14


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 8}, "must be a PEFT config .* not dict"),
        (peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), r"prompt learning \(PromptTuning\)"),
        (peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), r"prompt learning \(PrefixTuning\)"),
        (peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), r"prompt learning \(PromptEncoder\)"),
        (peft.AdaLoraConfig(total_step=10), "AdaLora needs steps of its own"),
        (lora(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the base weights"),
        (lora(init_lora_weights="pissa_niter_4"), "'pissa_niter_4' changes the base weights"),
        (lora(init_lora_weights="olora"), "init_lora_weights='olora' changes the base weights"),
        (lora(bias="all"), "bias='all' trains biases of the base itself"),
        (lora(layer_replication=[(0, 2), (0, 2)]), "layer_replication changes the base itself"),
        (lora(alora_invocation_tokens=[1], task_type="CAUSAL_LM"), "Activated LoRA"),
        (lora(task_type="SEQ_CLS"), "task_type 'SEQ_CLS' for a causal language model"),
        (lora(target_modules=["q_prj"]), "does not fit the model: .*Did you mean 'q_proj'"),
    ],
)
def test_what_cannot_be_trained_is_refused(config, message):
    model = tiny_model("llama")
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ModelError, match=message):
        add_adapter(model, config)
    assert [name for name, _ in model.named_parameters()] == names


def test_second_adapter_is_refused():
    model = add_adapter(tiny_model("llama"), lora())
    with pytest.raises(ModelError, match="has an adapter already"):
        add_adapter(model, lora())
    injected = tiny_model("llama")
    injected.add_adapter(lora())
    with pytest.raises(ModelError, match="has an adapter already"):
        add_adapter(injected, lora())


def test_quantized_module_cannot_be_trained_whole(tiny_folder):
    model = load_model(tiny_folder, quantization_config=nf4(), device=CPU)
    with pytest.raises(ModelError, match=r"modules_to_save names 'model.layers.0.mlp.up_proj', which is quantized"):
        add_adapter(model, lora(modules_to_save=["up_proj"]))


# ------------------------------------------------------------ the reference


@pytest.mark.parametrize("variant", ["plain", "dora", "embedding", "modules_to_save", "tokens"])
def test_reference_is_the_adapter_as_it_was(tiny_folder, tmp_path, variant):
    model = add_adapter(load_model(tiny_folder, dtype=torch.bfloat16), lora(lora_dropout=0.1, **VARIANTS[variant]))
    train_one_step(model)
    model.eval()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        start = model(IDS).logits
    random_state = torch.get_rng_state()
    assert reference_adapter(model) == "reference"
    assert torch.equal(torch.get_rng_state(), random_state)

    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == trainable
    copies = {name for name in parameters if "reference" in name.split(".")}
    assert len(copies) == len(trainable)
    for name in trainable:
        twin = name.replace("default", "reference")
        assert twin in copies
        assert torch.equal(parameters[twin], parameters[name])
        assert parameters[twin].data_ptr() != parameters[name].data_ptr()
    assert model.active_adapters == ["default"]

    model.train()
    train_one_step(model)
    model.eval()
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, start)
        model.set_adapter("reference")
        assert torch.equal(model(IDS).logits, start)
        model.set_adapter("default")

    # PEFT saves every adapter unless told which.
    model.save_pretrained(tmp_path / "policy", selected_adapters=["default"], save_embedding_layers=False)
    assert not (tmp_path / "policy" / "reference").exists()
    model.save_pretrained(tmp_path / "everything", save_embedding_layers=False)
    assert (tmp_path / "everything" / "reference").is_dir()


def test_reference_is_frozen_while_it_is_copied_twice_only_on_purpose():
    model = add_adapter(tiny_model("llama"), lora())
    reference_adapter(model)
    with pytest.raises(ModelError, match="an adapter called 'reference' already"):
        reference_adapter(model)


# ------------------------------------------------------------ dropout

DROPOUT = {
    "llama": {"attention_dropout": 0.5},
    "phi": {"attention_dropout": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "gptj": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "gpt_neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "bloom": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
}


@pytest.mark.parametrize("architecture", DROPOUT)
def test_training_forward_equals_evaluation_without_dropout(architecture):
    model = tiny_model(architecture, **DROPOUT[architecture])
    model = add_adapter(model, lora(target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False))
    expected = model(IDS).logits
    model.train()
    assert not torch.equal(model(IDS).logits, expected)
    disable_dropout(model)
    for seed in range(3):  # layer dropping would show by chance only
        torch.manual_seed(seed)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=0)
    assert model.training
