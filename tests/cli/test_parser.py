"""RecipeParser: precedence, unknown keys, types, spellings, and what a script prints when something is wrong."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alignkit.cli import ModelArguments, RecipeParser, ScriptArguments
from alignkit.cli.arguments import DIFFERENCES
from alignkit.cli.coerce import Mismatch, coerce
from alignkit.errors import ConfigError
from alignkit.trainers.config import DPOConfig

CLASSES = (ScriptArguments, ModelArguments, DPOConfig)


@pytest.fixture(scope="module")
def parser() -> RecipeParser:
    return RecipeParser(CLASSES)


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def training(parser: RecipeParser, argv: list[str], **kwargs) -> DPOConfig:
    return parser.parse(argv, **kwargs)[2]


def test_no_arguments_give_the_dataclass_defaults(parser):
    script, model, config = parser.parse([])
    assert (script, model) == (ScriptArguments(), ModelArguments())
    assert (script.dataset_name, model.model_name_or_path, config.beta) == ("demo", "demo", 0.1)


def test_precedence(parser, recipe):
    defaults = {"learning_rate": 1e-4, "beta": 0.3, "lora_r": 4}
    path = recipe("learning_rate: 2e-4\nbeta: 0.5\n")
    _, model, config = parser.parse(["--config", path, "--beta", "0.7"], defaults=defaults)
    assert (model.lora_r, config.learning_rate, config.beta) == (4, 2e-4, 0.7)


def test_an_argument_equal_to_the_default_still_wins_over_yaml(parser, recipe):
    assert training(parser, ["--beta", "0.1", "--config", recipe("beta: 0.5")]).beta == 0.1


def test_parsing_leaves_the_defaults_alone(parser):
    defaults = {"gradient_checkpointing": False}
    parser.parse([], defaults=defaults)
    assert defaults == {"gradient_checkpointing": False}
    assert training(parser, []).activation_checkpointing is True


@pytest.mark.parametrize("argv", [["--beta=0.2"], ["--beta", "0.2"]])
def test_both_ways_to_write_a_value(parser, argv):
    assert training(parser, argv).beta == 0.2


def test_dashes_are_underscores(parser):
    assert training(parser, ["--learning-rate", "1e-5"]).learning_rate == 1e-5


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], True),
        (["--activation_checkpointing", "false"], False),
        (["--gradient_checkpointing", "false"], False),
        (["--no_gradient_checkpointing"], False),
        (["--activation_checkpointing"], True),
        (["--gradient_checkpointing"], True),
    ],
)
def test_both_spellings_of_checkpointing(parser, argv, expected):
    config = training(parser, argv)
    assert (config.activation_checkpointing, config.gradient_checkpointing) == (expected, expected)


@pytest.mark.parametrize("below", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.parametrize("above", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.parametrize("value", [True, False])
def test_precedence_holds_across_spellings(parser, recipe, below, above, value):
    path = recipe(f"{below}: {str(not value).lower()}")
    assert training(parser, ["--config", path, f"--{above}", str(value)]).activation_checkpointing is value


def test_two_spellings_that_disagree(parser, recipe):
    path = recipe("activation_checkpointing: true\ngradient_checkpointing: false\n")
    with pytest.raises(
        ConfigError, match=r"recipe\.yaml line 2: gradient_checkpointing and activation_checkpointing are two"
    ):
        parser.parse(["--config", path])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--sync_ref_model"], True),
        (["--sync_ref_model", "true"], True),
        (["--sync_ref_model", "no"], False),
        ([], False),
    ],
)
def test_booleans(parser, argv, expected):
    assert training(parser, argv).sync_ref_model is expected


def test_bf16_without_a_value_is_on(parser):
    assert training(parser, ["--bf16"]).bf16 is True
    assert training(parser, ["--bf16", "false"]).bf16 is False


def test_lists(parser, recipe):
    config = training(parser, ["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.25"])
    assert (config.loss_type, config.loss_weights) == (["sigmoid", "sft"], [1.0, 0.25])
    config = training(parser, ["--config", recipe("loss_type: [sigmoid, sft]\nloss_weights: [1, 2.5e-1]\n")])
    assert (config.loss_type, config.loss_weights) == (["sigmoid", "sft"], [1.0, 0.25])
    assert training(parser, ["--config", recipe("loss_type: hinge")]).loss_type == ["hinge"]
    assert training(parser, ["--loss_type", "hinge"]).loss_type == ["hinge"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "all-linear"),
        (["--lora_target_modules", "all-linear"], "all-linear"),
        (["--lora_target_modules", "q_proj", "v_proj"], ["q_proj", "v_proj"]),
    ],
)
def test_text_or_list(parser, argv, expected):
    assert parser.parse(argv)[1].lora_target_modules == expected


def test_mappings_are_json(parser, recipe):
    config = training(parser, ["--model_init_kwargs", '{"revision": "v1", "low": 1e-3}'])
    assert config.model_init_kwargs == {"revision": "v1", "low": 1e-3}
    path = recipe("model_init_kwargs:\n  revision: v1\nlr_scheduler_kwargs: {num_cycles: 2}\n")
    config = training(parser, ["--config", path])
    assert (config.model_init_kwargs, config.lr_scheduler_kwargs) == ({"revision": "v1"}, {"num_cycles": 2})


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "'1e-6'", "0.000001"])
def test_yaml_floats(parser, recipe, text):
    assert training(parser, ["--config", recipe(f"learning_rate: {text}")]).learning_rate == 1e-6


def test_yaml_no_is_the_strategy_no(parser, recipe):
    assert training(parser, ["--config", recipe("save_strategy: no")]).save_strategy == "no"


def test_none(parser, recipe):
    assert training(parser, ["--max_length", "none"]).max_length is None
    assert training(parser, ["--config", recipe("max_length: null")]).max_length is None
    assert training(parser, ["--max_tokens_per_forward", "none"]).max_tokens_per_forward is None
    assert training(parser, ["--max_tokens_per_forward", "4096"]).max_tokens_per_forward == 4096
    assert training(parser, ["--report_to", "none"]).report_to == []


BAD_ARGUMENTS = {
    "unknown option": (["--betta", "0.2"], r"unknown option --betta\. Did you mean 'beta'\?"),
    "unknown option with dashes": (
        ["--learning-ratio=1"],
        r"unknown option --learning-ratio\. Did you mean 'learning_rate'",
    ),
    "abbreviated option": (["--learning_r", "1e-4"], r"unknown option --learning_r\. Did you mean 'learning_rate'\?"),
    "environment variables": (["--env", "A=1"], r"unknown option --env"),
    "stray word": (["train"], r"unexpected argument 'train'"),
    "float": (["--beta", "big"], r"--beta: beta='big' is not a number"),
    "integer": (["--lora_r", "8.5"], r"--lora_r: lora_r='8\.5' is not a whole number"),
    "boolean": (["--sync_ref_model", "maybe"], r"--sync_ref_model: sync_ref_model='maybe' is not true or false"),
    "list of floats": (["--loss_weights", "1", "x"], r"--loss_weights: loss_weights=\['1', 'x'\] is not a number"),
    "choice": (["--layout", "pad"], r"argument --layout: invalid choice: 'pad'"),
    "mapping": (["--model_init_kwargs", '{"a":'], r"--model_init_kwargs: .* is not a JSON mapping"),
    "value missing": (["--beta"], r"argument --beta: expected one argument"),
    "no such file": (["--config", "nowhere.yaml"], r"--config: there is no file 'nowhere\.yaml'"),
    "refused by the dataclass": (["--beta", "-1"], r"beta=-1\.0: must be a positive, finite number"),
    "refused by TrainingArguments": (["--warmup_steps", "-1"], r"warmup_steps"),
    "option without effect in a recipe": (
        ["--do_train"],
        r"--do_train: do_train has no effect; a recipe always trains",
    ),
    "python object": (["--parallelism_config", "tp"], r"parallelism_config='tp' is not a Python object \(Parallelism"),
    "4 and 8 bits": (["--load_in_4bit", "--load_in_8bit"], r"load_in_4bit and load_in_8bit are both set"),
    "quantization type without 4 bits": (["--bnb_4bit_quant_type", "fp4"], r"bnb_4bit_quant_type='fp4': has no effect"),
    "quantized full fine-tuning": (
        ["--load_in_4bit", "--use_peft", "false"],
        r"use_peft=False: a quantized base cannot",
    ),
    "adapter option without adapter": (
        ["--no_use_peft", "--lora_r", "8"],
        r"lora_r=8: has no effect with use_peft=False",
    ),
    "rank of zero": (["--lora_r", "0"], r"lora_r=0: must be 1 or more"),
    "dropout of one": (["--lora_dropout", "1"], r"lora_dropout=1\.0: must be in \[0, 1\)"),
    "no rows": (["--max_train_rows", "0"], r"max_train_rows=0: must be 1 or more"),
}


@pytest.mark.parametrize(("argv", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments(parser, argv, message):
    with pytest.raises(ConfigError, match=message):
        parser.parse(argv)


BAD_FILES = {
    "unknown key": (
        "beta: 0.1\nlearning_rat: 1\n",
        r"recipe\.yaml line 2: unknown option 'learning_rat'\. Did you mean",
    ),
    "environment variables": ("env:\n  A: 1\n", r"recipe\.yaml line 1: unknown option 'env'"),
    "a file in a file": ("config: other.yaml\n", r"recipe\.yaml line 1: unknown option 'config'"),
    "key that is no text": ("true: 1\n", r"recipe\.yaml.*unknown option True"),
    "text for a number": ("beta: high\n", r"recipe\.yaml line 1: beta='high' is not a number"),
    "boolean for a number": ("beta: true\n", r"recipe\.yaml line 1: beta=True is not a number"),
    "fraction for a count": ("\nlora_r: 8.5\n", r"recipe\.yaml line 2: lora_r=8\.5 is not a whole number"),
    "number for a boolean": ("sync_ref_model: 1\n", r"recipe\.yaml line 1: sync_ref_model=1 is not true or false"),
    "number for text": ("hub_model_id: 7\n", r"hub_model_id=7 is not text \(in YAML, put it in quotes\)"),
    "mapping for a list": ("loss_weights: {a: 1}\n", r"loss_weights=\{'a': 1\} is not a list"),
    "nothing for a number": ("beta:\n", r"recipe\.yaml line 1: beta=None is not a number"),
    "misspelt strategy": ("save_strategy: epochs\n", r"save_strategy='epochs' is not one of .*Did you mean 'epoch'\?"),
    "unknown choice": ("layout: pack\n", r"recipe\.yaml line 1: layout='pack' is not one of .*Did you mean 'packed'"),
    "given twice": ("beta: 0.1\nlora_r: 8\nbeta: 0.2\n", r"recipe\.yaml line 3: beta is given twice"),
    "list": ("- beta\n", r"recipe\.yaml: must hold a mapping \(option: value\), found a sequence"),
    "text": ("beta\n", r"recipe\.yaml: must hold a mapping \(option: value\), found a scalar"),
    "empty": ("# nothing\n", r"recipe\.yaml: must hold a mapping \(option: value\), found nothing"),
    "bad syntax": ("beta: 0.1\nlora_r: [1\n", r"recipe\.yaml line 3: not valid YAML"),
    "two documents": ("beta: 0.1\n---\nbeta: 0.2\n", r"recipe\.yaml line 2: not valid YAML"),
    "refused by the dataclass": ("loss_type: sigmoyd\n", r"unknown loss 'sigmoyd'\. Did you mean 'sigmoid'\?"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files(parser, recipe, text, message):
    with pytest.raises(ConfigError, match=message):
        parser.parse(["--config", recipe(text)])


def test_file_that_is_not_utf8(parser, tmp_path):
    (tmp_path / "latin.yaml").write_bytes("output_dir: caf\xe9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml' is not UTF-8 text"):
        parser.parse(["--config", str(tmp_path / "latin.yaml")])


def test_folder_instead_of_a_file(parser, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        parser.parse(["--config", str(tmp_path)])


def test_unknown_recipe_default(parser):
    with pytest.raises(ConfigError, match=r"the recipe's defaults: unknown option 'betta'\. Did you mean 'beta'\?"):
        parser.parse([], defaults={"betta": 1})


def test_arguments_file_beside_the_script_is_not_read(parser, tmp_path, monkeypatch):
    (tmp_path / "recipe.args").write_text("--beta 0.9")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "recipe.py")])
    assert parser.parse()[2].beta == 0.1


def test_help_shows_every_option(parser, capsys):
    with pytest.raises(SystemExit) as exit_:
        parser.parse(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    names = [field.name for dataclass_type in CLASSES for field in dataclasses.fields(dataclass_type)]
    assert [name for name in names if f"--{name}" not in text] == []
    assert "--config" in text


@pytest.mark.parametrize("dataclass_type", CLASSES)
def test_every_field_has_a_help_text(dataclass_type):
    fields = dataclasses.fields(dataclass_type)
    assert [field.name for field in fields if not field.metadata.get("help", "").strip()] == []


def test_a_script_ends_with_one_line_and_exit_code_2(parser, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--betta", "0.2"])
    with pytest.raises(SystemExit) as exit_:
        parser.parse()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: unknown option --betta. Did you mean 'beta'?\n"


@pytest.mark.slow
def test_a_real_script_prints_no_traceback(tmp_path):
    script = tmp_path / "recipe.py"
    script.write_text(
        "from alignkit.cli import *\nRecipeParser((ScriptArguments, ModelArguments)).parse()\nprint('ran')\n"
    )
    result = subprocess.run(
        [sys.executable, str(script), "--lora_rank", "8"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert "error: unknown option --lora_rank. Did you mean" in result.stderr
    assert "Traceback" not in result.stderr


def test_trl_names_are_kept():
    trl = pytest.importorskip("trl", reason="the comparison with TRL's arguments needs TRL, which needs Python 3.11")
    for theirs, ours in ((trl.ScriptArguments, ScriptArguments), (trl.ModelConfig, ModelArguments)):
        defaults = {field.name: field.default for field in dataclasses.fields(ours)}
        for field in dataclasses.fields(theirs):
            same = field.name in defaults and defaults[field.name] == field.default
            assert same != (field.name in DIFFERENCES), field.name


def test_peft_config():
    config = ModelArguments(lora_r=8, lora_alpha=4, use_rslora=True, lora_modules_to_save=["lm_head"]).to_peft_config()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (8, 4, 0.0, "all-linear")
    assert (config.use_rslora, config.use_dora, config.modules_to_save, config.task_type) == (
        True,
        False,
        ["lm_head"],
        "CAUSAL_LM",
    )
    assert ModelArguments(use_peft=False).to_peft_config() is None


def test_quantization_config():
    pytest.importorskip("bitsandbytes", reason="quantization needs bitsandbytes")
    assert ModelArguments().to_quantization_config() is None
    assert ModelArguments(load_in_8bit=True).to_quantization_config().load_in_8bit is True
    four = ModelArguments(load_in_4bit=True, dtype="float16").to_quantization_config()
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.float16
    options = {"bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": False, "bnb_4bit_quant_storage": "bfloat16"}
    four = ModelArguments(load_in_4bit=True, **options).to_quantization_config()
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("fp4", False)
    assert four.bnb_4bit_quant_storage == torch.bfloat16


def test_model_init_kwargs():
    assert ModelArguments().to_model_init_kwargs() == {}
    arguments = ModelArguments(model_revision="v2", dtype="auto", attn_implementation="eager")
    assert arguments.to_model_init_kwargs() == {"revision": "v2", "dtype": "auto", "attn_implementation": "eager"}


@pytest.mark.parametrize("options", [{"dtype": "int4"}, {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}])
def test_unknown_names_from_python(options):
    with pytest.raises(ConfigError, match="must be one of"):
        ModelArguments(**options)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("3", int | str | None, 3),
        ("auto", int | str | None, "auto"),
        (3, float, 3.0),
        ("false", bool | str, False),
        ("all", bool | str, "all"),
        ("none", float | None, None),
        ("none", str | None, "none"),
        ([1, "2"], list[float] | None, [1.0, 2.0]),
        ("x", list[str], ["x"]),
        ("config.json", dict | str | None, "config.json"),
        ('{"a": 1}', dict | str | None, {"a": 1}),
    ],
)
def test_coerce(value, hint, expected):
    result = coerce(value, hint)
    assert (result, type(result)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("value", "hint"), [("x", int), (True, int), (True, float), (1, bool), (None, int), (3, str), ('{"a"', dict | str)]
)
def test_coerce_refuses(value, hint):
    with pytest.raises(Mismatch):
        coerce(value, hint)
