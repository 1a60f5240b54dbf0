"""Classifiers: what text they get, where the score is read, and that nothing about the model changes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase

from alignkit.errors import ConfigError, ModelError
from alignkit.rollout.classifier import ClassifierReward, length_batches, log_odds, padding_with
from alignkit.rollout.reward import RewardError, RewardInputs
from tests.model_factory import tiny_model
from tests.rollout.reward_samples import conversations, logits_at_last_token, samples, tiny_classifier

# PEFT asks for it under its old name.
PLAIN_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TEXTS = ("no", "hello there, this is a longer answer", "yes, of course", "<|im_end|>", "it ends here.<|im_end|>")


def scores_of(source: ClassifierReward, inputs: RewardInputs) -> list[float]:
    values, applies = source(inputs)
    assert values.shape == (len(inputs), 1)
    assert values.dtype == torch.float32
    assert applies.all()
    return values[:, 0].tolist()


def smol_classifier(tokenizer: PreTrainedTokenizerBase, architecture: str = "llama", **overrides: Any) -> Any:
    return tiny_classifier(architecture, **{"vocab_size": len(tokenizer), **overrides})


def words(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A classifier for the tokenizer of a few words."""
    return tiny_classifier("llama", vocab_size=len(tokenizer), pad_token_id=None)


@pytest.mark.parametrize("pad", ["as eos", "another", None])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_the_score_is_read_at_the_last_token(
    smol_tokenizer: PreTrainedTokenizerBase, architecture: str, pad: str | None, batch_tokens: int
) -> None:
    """Also of texts that end with the padding token, in batches of any size, and where there is no padding token."""
    assert smol_tokenizer.pad_token_id == smol_tokenizer.eos_token_id
    pad_id = {"as eos": smol_tokenizer.eos_token_id, "another": 5, None: None}[pad]
    model = smol_classifier(smol_tokenizer, architecture, pad_token_id=pad_id)
    inputs = samples(*TEXTS)
    found = scores_of(ClassifierReward(model, smol_tokenizer, batch_tokens=batch_tokens), inputs)
    texts = [prompt + text for prompt, text in zip(inputs.prompts, inputs.completions, strict=True)]
    expected = [logits_at_last_token(model, smol_tokenizer(text)["input_ids"]).item() for text in texts]
    assert found == pytest.approx(expected, rel=1e-4)
    assert len({round(score, 3) for score in expected}) == len(TEXTS)
    assert model.config.pad_token_id == pad_id


def test_the_model_alone_would_read_another_token(smol_tokenizer: PreTrainedTokenizerBase) -> None:
    """The reason for the detour: padding is taken off by token id, in a batch of one too."""
    eos = smol_tokenizer.eos_token_id
    model = smol_classifier(smol_tokenizer, pad_token_id=eos)
    ids = smol_tokenizer("it ends here.<|im_end|>")["input_ids"]
    assert ids[-1] == eos
    alone = model(torch.tensor([ids])).logits.item()
    assert alone == pytest.approx(logits_at_last_token(model, ids[:-1]).item(), rel=1e-4)
    assert alone != pytest.approx(logits_at_last_token(model, ids).item(), rel=1e-2)


def test_it_is_said_once_that_texts_end_with_padding(
    smol_tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    model = smol_classifier(smol_tokenizer, pad_token_id=smol_tokenizer.eos_token_id)
    source = ClassifierReward(model, smol_tokenizer, name="judge")
    with caplog.at_level(logging.WARNING):
        source(samples("no", "yes"))
        assert caplog.messages == []
        source(samples(*TEXTS))
        source(samples(*TEXTS))
    assert caplog.messages == [
        "reward 'judge' has texts that end with its padding token (2): scores are read at that token."
    ]


def test_an_encoder_gets_its_special_tokens() -> None:
    """BERT reads [CLS]: the score equals the model's own on the tokenizer's own encoding."""
    from tests.models.conftest import character_tokenizer

    tokenizer = character_tokenizer(cls_token="<s>", sep_token="</s>", pad_token="<pad>")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    model = tiny_classifier("bert", vocab_size=128)
    inputs = samples("a", "some words", "abc")
    found = scores_of(ClassifierReward(model, tokenizer), inputs)
    for prompt, text, score in zip(inputs.prompts, inputs.completions, found, strict=True):
        ids = tokenizer(prompt + text)["input_ids"]
        assert (ids[0], ids[-1]) == (1, 2)
        assert score == pytest.approx(model(torch.tensor([ids])).logits.item(), rel=1e-4)


def test_a_conversation_goes_through_the_classifiers_own_template(word_tokenizer: PreTrainedTokenizerBase) -> None:
    model = words(word_tokenizer)
    found = scores_of(ClassifierReward(model, word_tokenizer), conversations("yes", "no be kind"))
    for answer, score in zip(("yes", "no be kind"), found, strict=True):
        ids = word_tokenizer(f"<user> hi<assistant> {answer} </s>", add_special_tokens=False)["input_ids"]
        assert score == pytest.approx(logits_at_last_token(model, ids).item(), rel=1e-4)


def test_a_conversation_without_a_template_is_joined(
    byte_bpe_tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_classifier("llama", vocab_size=len(byte_bpe_tokenizer), pad_token_id=None)
    source = ClassifierReward(model, byte_bpe_tokenizer, name="judge")
    with caplog.at_level(logging.WARNING):
        (found, _) = scores_of(source, conversations("hello", "foo"))
    ids = byte_bpe_tokenizer("hi\n\nhello")["input_ids"]
    assert found == pytest.approx(logits_at_last_token(model, ids).item(), rel=1e-4)
    assert caplog.messages == [
        "reward 'judge' has no chat template: the contents of the messages are joined by blank lines."
    ]


@pytest.mark.parametrize("make", [samples, conversations])
def test_the_completion_alone(word_tokenizer: PreTrainedTokenizerBase, make: Any) -> None:
    model = words(word_tokenizer)
    found = scores_of(ClassifierReward(model, word_tokenizer, completion_only=True), make("yes be", "no"))
    for answer, score in zip(("yes be", "no"), found, strict=True):
        ids = word_tokenizer(answer)["input_ids"]
        assert score == pytest.approx(logits_at_last_token(model, ids).item(), rel=1e-4)


def test_long_texts_lose_their_beginning_and_are_counted(word_tokenizer: PreTrainedTokenizerBase) -> None:
    model = words(word_tokenizer)
    inputs = RewardInputs(
        prompts=["w1 w2 w3 w4 ", "w1 "], completions=["w5 w6", "w5"], prompt_ids=[[], []], completion_ids=[[], []]
    )
    source = ClassifierReward(model, word_tokenizer, max_tokens=3)
    found = scores_of(source, inputs)
    for text, score in zip(("w4 w5 w6", "w1 w5"), found, strict=True):
        assert score == pytest.approx(logits_at_last_token(model, word_tokenizer(text)["input_ids"]).item(), rel=1e-4)
    assert source.truncated == 1
    source(inputs)
    assert source.truncated == 2


def test_a_leading_mark_stays_when_a_text_is_cut(word_tokenizer: PreTrainedTokenizerBase) -> None:
    model = words(word_tokenizer)
    inputs = RewardInputs(prompts=["</s> w2 w3 "], completions=["w5 w6"], prompt_ids=[[]], completion_ids=[[]])
    marked = type(word_tokenizer)(tokenizer_object=word_tokenizer.backend_tokenizer, bos_token="</s>")
    (found,) = scores_of(ClassifierReward(model, marked, max_tokens=3), inputs)
    expected = logits_at_last_token(model, word_tokenizer("</s> w5 w6")["input_ids"]).item()
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_longest_text_is_what_model_and_tokenizer_state(byte_bpe_tokenizer: PreTrainedTokenizerBase) -> None:
    size = len(byte_bpe_tokenizer)
    assert ClassifierReward(tiny_classifier("gpt2", vocab_size=size), byte_bpe_tokenizer).max_tokens == 256
    assert ClassifierReward(tiny_classifier("bert", vocab_size=size), byte_bpe_tokenizer).max_tokens == 64
    assert ClassifierReward(tiny_classifier("bloom", vocab_size=size), byte_bpe_tokenizer).max_tokens is None
    (found,) = scores_of(
        ClassifierReward(tiny_classifier("gpt2", vocab_size=size), byte_bpe_tokenizer), samples("x" * 900)
    )
    assert abs(found) > 0


# label, output, problem type -> from logits (1, 2, 4) of labels bad, fair, good
READINGS = [
    ("good", None, None, 4 - torch.tensor([1.0, 2.0]).logsumexp(0).item()),
    (0, "log_odds", None, 1 - torch.tensor([2.0, 4.0]).logsumexp(0).item()),
    ("fair", "probability", None, 0.11419520),  # e² / (e + e² + e⁴)
    ("good", "logit", None, 4.0),
    ("good", None, "multi_label_classification", 4.0),
    ("fair", "probability", "multi_label_classification", 0.88079708),  # 1 / (1 + e⁻²)
]


@pytest.mark.parametrize(("label", "output", "problem", "expected"), READINGS)
def test_readings_of_several_labels(
    word_tokenizer: PreTrainedTokenizerBase, label: Any, output: Any, problem: str | None, expected: float
) -> None:
    model = labelled(word_tokenizer, problem_type=problem)
    source = ClassifierReward(model, word_tokenizer, label=label, output=output)
    with torch.no_grad():
        hidden = model.model(torch.tensor([[4, 5]])).last_hidden_state[0, -1]  # w0 would be unknown; ids of "w1 w2"
        # A head that answers 1, 2, 4 to this very text.
        model.score.weight.copy_(torch.tensor([1.0, 2.0, 4.0])[:, None] * hidden / hidden.square().sum())
    inputs = RewardInputs(prompts=["w1 "], completions=["w2"], prompt_ids=[[]], completion_ids=[[]])
    assert scores_of(source, inputs) == pytest.approx([expected], rel=1e-5)


def labelled(tokenizer: PreTrainedTokenizerBase, **overrides: Any) -> Any:
    names = {0: "bad", 1: "fair", 2: "good"}
    return tiny_classifier("llama", vocab_size=len(tokenizer), num_labels=3, id2label=names, **overrides)


def test_one_label_can_be_a_probability(word_tokenizer: PreTrainedTokenizerBase) -> None:
    model = words(word_tokenizer)
    inputs = samples("w1", "w2 w3")
    logits = torch.tensor(scores_of(ClassifierReward(model, word_tokenizer), inputs))
    chances = scores_of(ClassifierReward(model, word_tokenizer, output="probability"), inputs)
    assert chances == pytest.approx(logits.sigmoid().tolist(), rel=1e-5)


def test_log_odds_are_those_of_the_probability() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.softmax(1)[:, 2]
    torch.testing.assert_close(log_odds(logits, 2), (p / (1 - p)).log(), rtol=1e-10, atol=0)


def test_the_model_is_frozen_and_keeps_its_modes(word_tokenizer: PreTrainedTokenizerBase) -> None:
    model = words(word_tokenizer).train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    source = ClassifierReward(model, word_tokenizer)
    seen: list[bool] = []
    model.score.register_forward_pre_hook(lambda *_: seen.append(model.training or torch.is_grad_enabled()))
    source(samples("w1"))
    assert seen == [False]
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_was_changed_comes_back_after_an_error(word_tokenizer: PreTrainedTokenizerBase) -> None:
    model = words(word_tokenizer).train()
    with padding_with(model, 3):
        assert model.config.pad_token_id == 3
    assert model.config.pad_token_id is None
    model.score.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        ClassifierReward(model, word_tokenizer)(samples("w1"))
    assert model.training
    assert model.config.pad_token_id is None


def test_attention_keeps_its_soft_cap(word_tokenizer: PreTrainedTokenizerBase) -> None:
    found, expected = (smol_classifier(word_tokenizer, "gemma2") for _ in range(2))
    expected.set_attn_implementation("eager")
    scores = [
        scores_of(ClassifierReward(model, word_tokenizer), samples("w1 w2", "w2 w3 w1")) for model in (found, expected)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@PLAIN_PEFT
def test_an_adapter_on_a_classifier(word_tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    base = words(word_tokenizer)
    plain = scores_of(ClassifierReward(base, word_tokenizer), samples("w1", "w2 w3"))
    adapted = get_peft_model(base, LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear"))
    assert isinstance(adapted, PeftModel)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    adapted.eval()
    found = scores_of(ClassifierReward(adapted, word_tokenizer), samples("w1", "w2 w3"))
    ids = word_tokenizer("p0 w1")["input_ids"]
    assert found[0] == pytest.approx(adapted(torch.tensor([ids])).logits.item(), rel=1e-4)
    assert found != pytest.approx(plain, rel=1e-2)


def test_batches_are_of_similar_length() -> None:
    lengths = {0: 5, 1: 100, 2: 7, 3: 50, 4: 49, 5: 6}
    assert length_batches(lengths, 100) == [[1], [3, 4], [2, 5, 0]]
    assert length_batches(lengths, 10) == [[1], [3], [4], [2], [5], [0]]
    assert length_batches({}, 10) == []


def test_a_conversation_that_the_template_refuses(word_tokenizer: PreTrainedTokenizerBase) -> None:
    strict = type(word_tokenizer)(tokenizer_object=word_tokenizer.backend_tokenizer)
    strict.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.content }} {% endfor %}"
    )
    inputs = conversations("w1", "w2")
    inputs.prompts[0].insert(0, {"role": "system", "content": "be kind"})
    with pytest.raises(
        RewardError, match=r"sample 0: the reward model's chat template refuses .*no system here"
    ) as caught:
        ClassifierReward(words(word_tokenizer), strict)(inputs)
    assert caught.value.faults[0].reason == "template refused"
    scores = caught.value.scores
    assert scores is not None
    assert scores.applies[:, 0].tolist() == [False, True]
    alone = scores_of(ClassifierReward(words(word_tokenizer), strict), conversations("w2"))
    assert scores.values[1].item() == pytest.approx(alone[0], rel=1e-4)


def test_a_sample_without_a_token(word_tokenizer: PreTrainedTokenizerBase) -> None:
    source = ClassifierReward(words(word_tokenizer), word_tokenizer, completion_only=True)
    with pytest.raises(RewardError, match="sample 1: prompt and completion have no token") as caught:
        source(samples("w1", "", "w2"))
    assert caught.value.faults[0].reason == "no text"


def test_a_tokenizer_of_another_model(smol_tokenizer: PreTrainedTokenizerBase) -> None:
    source = ClassifierReward(tiny_classifier("llama"), smol_tokenizer, name="judge")
    with pytest.raises(
        ModelError, match=r"tokenizer of reward 'judge' makes token \d+, but the model has 128 embeddings"
    ):
        source(samples("hello"))


def test_a_model_that_is_no_classifier(word_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM is no sequence classifier.*AutoModelForSequenceClassification"
    ):
        ClassifierReward(tiny_model("llama"), word_tokenizer)
    with pytest.raises(ModelError, match="must be a PreTrainedModel or a PeftModel of one, not Linear"):
        ClassifierReward(torch.nn.Linear(2, 2), word_tokenizer)  # type: ignore[arg-type]
    model = words(word_tokenizer)
    model.config.num_labels = 2
    with pytest.raises(ModelError, match=r"returned logits \(1, 1\) where a sequence classifier returns \(1, 2\)"):
        ClassifierReward(model, word_tokenizer, label=1)(samples("w1"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"has 3 labels \(0 'bad', 1 'fair', 2 'good'\). Say which one is the reward"),
        ({"label": "goof"}, r"has no label 'goof'; it has 0 'bad', 1 'fair', 2 'good'\. Did you mean 'good'\?"),
        ({"label": 3}, "has no label 3"),
        ({"label": "good", "output": "odds"}, r"output='odds' .* must be one of logit, log_odds, probability\. Did"),
        (
            {"label": "good", "max_tokens": 0},
            "max_tokens=0 of reward 'LlamaForSequenceClassification': must be 1 or more",
        ),
        ({"label": "good", "batch_tokens": 0}, "batch_tokens=0"),
    ],
)
def test_options_that_do_not_fit_the_model(
    word_tokenizer: PreTrainedTokenizerBase, options: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassifierReward(labelled(word_tokenizer), word_tokenizer, **options)


def test_a_reward_model_needs_a_tokenizer() -> None:
    with pytest.raises(ModelError, match="needs its tokenizer, not NoneType"):
        ClassifierReward(tiny_classifier("llama"), None)  # type: ignore[arg-type]
