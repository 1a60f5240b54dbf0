"""KL, perplexity, diversity, answers side by side and the frontier, against the models' own logits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.errors import DataError, ModelError
from alignkit.evaluation.divergence import kl_from_reference, sample_policy, summarize_kl
from alignkit.evaluation.diversity import distinct_n, summarize_texts
from alignkit.evaluation.estimates import Estimate
from alignkit.evaluation.frontier import FrontierPoint, find_checkpoints, reward_kl_frontier
from alignkit.evaluation.frontier_picture import frontier_curve
from alignkit.evaluation.generation import side_by_side
from alignkit.evaluation.models import PolicyModel, load_policy
from alignkit.evaluation.perplexity import perplexity
from alignkit.evaluation.scoring import TokenLogps
from alignkit.models.adapters import add_adapter
from tests.model_factory import tiny_model
from tests.pair_factory import lora_config, our_model, plain_model
from tests.tiny_preferences import character_tokenizer

PROMPTS = ["tell me", "why", "what is it?", "ab"]


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return load_policy(plain_model("llama"), character_tokenizer())


def plain_logps(model: Any, ids: list[int]) -> Tensor:
    """Log-probabilities of all tokens but the first, out of the model's own logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


# --- answers side by side ---


def test_answers_of_a_loaded_model_are_greedy_and_side_by_side(policy: PolicyModel) -> None:
    sides = side_by_side(policy, PROMPTS, max_new_tokens=6)
    tokenizer: Any = policy.tokenizer
    ids = list(tokenizer(PROMPTS[0])["input_ids"])
    begin = len(ids)
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(policy.bundle.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert sides.policy[0].ids == ids[begin:]
    answers = sides.answers(2)
    assert [answer.prompt for answer in answers] == PROMPTS[:2]
    assert [answer.policy for answer in answers] == sides.policy_texts[:2]
    assert any(answer.policy != answer.reference for answer in sides.answers())


def test_sampled_answers_depend_on_the_seed_alone(policy: PolicyModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "each": 2}
    first, again, other = (side_by_side(policy, PROMPTS, seed=seed, **options) for seed in (1, 1, 2))
    few = side_by_side(policy, PROMPTS, seed=1, count=2, **options)
    assert first.policy == again.policy != other.policy
    assert few.policy == first.policy[:4]
    assert first.policy[0] != first.policy[1]


def test_without_a_reference_the_policy_answers_alone() -> None:
    alone = side_by_side(load_policy(tiny_model("llama"), character_tokenizer()), PROMPTS, max_new_tokens=4)
    assert alone.reference == []
    assert [answer.reference for answer in alone.answers()] == [None] * 4


def test_no_prompt_is_an_error(policy: PolicyModel) -> None:
    with pytest.raises(DataError, match="no prompt"):
        side_by_side(policy, [])
    with pytest.raises(DataError):
        side_by_side(policy, [{"answer": "a"}])
    small = load_policy(tiny_model("llama", max_position_embeddings=32), character_tokenizer())
    with pytest.raises(DataError, match="leaves no room"):
        side_by_side(small, PROMPTS, max_new_tokens=32)


# --- KL ---


def test_kl_is_that_of_the_models_own_logits(policy: PolicyModel) -> None:
    samples = sample_policy(policy, PROMPTS, each=3, max_new_tokens=8, seed=4)
    model: Any = policy.bundle.model
    ratios = []
    for number, completion in zip(samples.clusters, samples.completions, strict=True):
        prompt = samples.prompts.ids[number]
        ids, start = [*prompt, *completion.ids], len(prompt) - 1
        with model.disable_adapter():
            reference = plain_logps(model, ids)[start:]
        ratios.append(plain_logps(model, ids)[start:] - reference)
    found = samples.kl()
    tokens = sum(map(len, ratios))
    of_k3 = [(torch.expm1(-ratio) + ratio).sum().item() for ratio in ratios]
    assert found.completions == 12
    assert found.k1.value == pytest.approx(sum(ratio.sum().item() for ratio in ratios) / 12, rel=1e-4)
    assert found.k3.value == pytest.approx(sum(of_k3) / 12, rel=1e-4)
    assert found.k3_per_token.value == pytest.approx(sum(of_k3) / tokens, rel=1e-4)
    assert found.tokens.value == pytest.approx(tokens / 12)
    assert found.k3.low > 0
    json.dumps(found.as_dict(), allow_nan=False)


def test_kl_of_one_token_is_the_sum_over_the_vocabulary() -> None:
    """400 draws of a single token against the exact divergence of the two distributions."""
    policy = load_policy(plain_model("llama"), character_tokenizer())
    model: Any = policy.bundle.model
    ids = torch.tensor([policy.tokenizer("why")["input_ids"]])
    with torch.no_grad():
        ours = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
        with model.disable_adapter():
            theirs = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
    exact = (ours.exp() * (ours - theirs)).sum().item()
    found = kl_from_reference(policy, ["why"] * 400, max_new_tokens=1)
    assert found.k1.low < exact < found.k1.high
    assert found.k3.value == pytest.approx(exact, rel=0.35)


def test_an_untrained_adapter_has_not_moved() -> None:
    policy = load_policy(add_adapter(tiny_model("llama"), lora_config()), character_tokenizer())
    found = kl_from_reference(policy, PROMPTS, max_new_tokens=4)
    assert (found.k1.value, found.k3.value) == pytest.approx((0.0, 0.0), abs=1e-6)


def test_without_a_reference_there_is_no_kl() -> None:
    with pytest.raises(ModelError, match="pass reference="):
        kl_from_reference(load_policy(tiny_model("llama"), character_tokenizer()), PROMPTS)
    with pytest.raises(DataError, match="no completion"):
        summarize_kl([], [], [])


def test_kl_per_completion_and_per_token_by_hand() -> None:
    logps = [
        TokenLogps(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])),
        TokenLogps(*torch.tensor([[-1.0], [-3.0]])),
    ]
    found = summarize_kl(logps, [0, 1], [True, False])
    assert found.k1.value == pytest.approx((0.5 - 1.0 + 2.0) / 2)
    assert found.k1_per_token.value == pytest.approx(1.5 / 3)
    of_k3 = sum(math.exp(-d) - 1 + d for d in (0.5, -1.0, 2.0))
    assert found.k3.value == pytest.approx(of_k3 / 2)
    assert found.finished == 0.5


# --- perplexity ---


def test_perplexity_is_token_weighted_and_that_of_the_models_own_logits(policy: PolicyModel) -> None:
    documents = ["the cat sat", "a", "on the mat, all day long", {"text": "ab"}]
    model: Any = policy.bundle.model
    rows = [policy.tokenizer(text)["input_ids"] for text in ("the cat sat", "on the mat, all day long", "ab")]
    ours = [-plain_logps(model, ids) for ids in rows]
    with model.disable_adapter():
        theirs = [-plain_logps(model, ids) for ids in rows]
    found = perplexity(policy, documents)
    tokens = sum(len(ids) - 1 for ids in rows)
    assert (found.documents, found.skipped, found.cut, found.tokens) == (3, 1, 0, tokens)
    means = [torch.cat(nats).mean().item() for nats in (ours, theirs)]
    assert found.policy.value == pytest.approx(math.exp(means[0]), rel=1e-4)
    assert found.reference is not None
    assert found.reference.value == pytest.approx(math.exp(means[1]), rel=1e-4)
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(math.exp(means[0] - means[1]), rel=1e-4)
    assert found.ratio.low <= found.ratio.value <= found.ratio.high
    json.dumps(found.as_dict(), allow_nan=False)


def test_long_documents_are_cut_and_counted(policy: PolicyModel) -> None:
    text = "the cat sat on the mat"
    found = perplexity(policy, [text, "ab"], max_tokens=8)
    assert (found.cut, found.tokens) == (1, 8)
    assert found.policy == perplexity(policy, [text[:8], "ab"]).policy


def test_what_is_no_text_is_refused(policy: PolicyModel) -> None:
    with pytest.raises(DataError, match="two tokens"):
        perplexity(policy, ["", "a"])
    with pytest.raises(DataError, match="document 1"):
        perplexity(policy, ["ab", {"content": "ab"}])


# --- texts ---


def test_distinct_by_hand() -> None:
    texts = ["a b a b", "a c", ""]
    assert distinct_n(texts, 1) == pytest.approx(3 / 6)
    assert distinct_n(texts, 2) == pytest.approx(3 / 4)
    assert distinct_n(texts, 5) == 0.0
    with pytest.raises(DataError, match="at least one word"):
        distinct_n(texts, 0)


def test_a_summary_of_texts() -> None:
    found = summarize_texts(["a b a b", "a c", ""], tokens=[5, 3, 1], finished=[True, True, False])
    assert (found.answers, found.empty, found.median_words) == (3, 1, 2.0)
    assert found.words.value == pytest.approx(2.0)
    assert found.tokens is not None
    assert found.tokens.value == pytest.approx(3.0)
    assert found.finished is not None
    assert found.finished.value == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="no answers"):
        summarize_texts([])


# --- frontier ---


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def test_the_frontier_of_saved_checkpoints(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    run = tmp_path / "run"
    for step, adapted in ((10, add_adapter(tiny_model("llama"), lora_config())), (2, our_model("llama"))):
        adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        adapted.save_pretrained(run / f"checkpoint-{step}")
    assert list(find_checkpoints(run)) == ["checkpoint-2", "checkpoint-10"]
    points = reward_kl_frontier(run, PROMPTS, letters, max_new_tokens=6, each=2, dtype=torch.float32)
    assert [(point.name, point.step) for point in points] == [("checkpoint-2", 2), ("checkpoint-10", 10)]
    assert points[0].kl.value > 0.5
    assert points[1].kl.value == pytest.approx(0.0, abs=1e-6)
    samples = sample_policy(load_policy(run / "checkpoint-2", dtype=torch.float32), PROMPTS, max_new_tokens=6, each=2)
    tokenizer = character_tokenizer()
    lengths = [len(tokenizer.decode(one.ids, skip_special_tokens=True)) for one in samples.completions]
    assert points[0].reward.value == pytest.approx(sum(lengths) / 8)
    json.dumps([point.as_dict() for point in points], allow_nan=False)
    with pytest.raises(DataError, match="neither checkpoints"):
        find_checkpoints(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        find_checkpoints(tmp_path / "nowhere")


def test_the_frontier_is_a_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    points = [
        FrontierPoint("checkpoint-1", 1, Estimate(0.5, 0.4, 0.6), Estimate(1.0, -math.inf, math.inf), 4),
        FrontierPoint("final", None, Estimate(2.5, 2.0, 3.0), Estimate(2.0, 1.5, 2.5), 4),
    ]
    path = frontier_curve(points, tmp_path / "frontier.png")
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    assert frontier_curve([], tmp_path / "none.png") is None
    assert "No picture of the frontier" in caplog.text
