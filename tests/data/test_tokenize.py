"""Ids by hand, and what happens where the prompt's tokens are no prefix."""

from __future__ import annotations

import pickle

import pytest
from datasets.fingerprint import Hasher
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignkit.data.records import Preference, Unpaired
from alignkit.data.tokenize import (
    EncodedRow,
    RecordTokenizer,
    Truncated,
    encoder_without_dummy_prefix,
    truncate,
)
from tests.data.conftest import ids

USER, YES, NO = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "assistant", "content": "no"},
)


def encode_one(tokenizer: PreTrainedTokenizerBase, record: Preference | Unpaired) -> EncodedRow:
    (encoded,) = RecordTokenizer(tokenizer).encode([record])
    assert isinstance(encoded, EncodedRow)
    return encoded


def clone(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> PreTrainedTokenizerFast:
    """A copy that a test may change."""
    copy = pickle.loads(pickle.dumps(tokenizer))
    copy.chat_template = template
    return copy


def test_text_gets_eos(word_tokenizer) -> None:
    encoded = encode_one(word_tokenizer, Preference("w1 w2 ", "w3 ", "w4 w5 "))
    assert encoded == EncodedRow([4, 5], ([6, 1], [7, 8, 1]), not_prefix=False)


def test_text_that_ends_with_eos_gets_no_second_one(word_tokenizer) -> None:
    encoded = encode_one(word_tokenizer, Preference("w1 ", "w2 </s>", "w3 "))
    assert encoded == EncodedRow([4], ([5, 1], [6, 1]), not_prefix=False)


def test_conversations_end_as_the_template_ends_them(word_tokenizer) -> None:
    system = {"role": "system", "content": "be kind"}
    encoded = encode_one(word_tokenizer, Preference([system, USER], [YES], [NO]))
    assert encoded.prompt_ids == ids("be", "kind", "<user>", "hi", "<assistant>")
    assert encoded.completion_ids == (ids("yes", "</s>"), ids("no", "</s>"))
    assert not encoded.not_prefix


def test_unpaired_records_have_one_completion(word_tokenizer) -> None:
    encoded = encode_one(word_tokenizer, Unpaired([USER], [YES], True))
    assert encoded == EncodedRow(ids("<user>", "hi", "<assistant>"), (ids("yes", "</s>"),), not_prefix=False)


def test_a_batch_mixes_text_and_conversations_in_order(word_tokenizer) -> None:
    records = [Preference("w1 ", "w2 ", "w3 "), Preference([USER], [YES], [NO]), Unpaired("w4 ", "w5 ", False)]
    batch = RecordTokenizer(word_tokenizer).encode(records)
    assert batch == [encode_one(word_tokenizer, record) for record in records]
    assert [row.prompt_ids for row in batch if isinstance(row, EncodedRow)] == [
        [4],
        ids("<user>", "hi", "<assistant>"),
        [7],
    ]


def test_template_arguments_and_tools_reach_the_template(word_tokenizer) -> None:
    template = (
        "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}{{ mood }} "
        "{% for message in messages %}{{ message.content }} {% endfor %}"
    )
    tokenizer = clone(word_tokenizer, template)
    record = Preference([USER], [YES], [NO], tools=[{"name": "w7"}], chat_template_kwargs={"mood": "kind"})
    assert encode_one(tokenizer, record) == EncodedRow(ids("w7", "kind", "hi"), (ids("yes"), ids("no")), False)


def test_merged_tokens_keep_the_whole_prompt(byte_bpe_tokenizer) -> None:
    tokenizer = byte_bpe_tokenizer
    prompt, merged = tokenizer("the b")["input_ids"], tokenizer("the bar")["input_ids"]
    assert merged[: len(prompt)] != prompt  # else the test shows nothing
    encoded = encode_one(tokenizer, Preference("the b", "ar", " is"))
    assert encoded.not_prefix
    assert encoded.prompt_ids == prompt
    assert encoded.completion_ids[0] == tokenizer("ar</s>")["input_ids"]
    assert encoded.completion_ids[1] == tokenizer("the b is</s>")["input_ids"][len(prompt) :]


def test_no_dummy_space_between_prompt_and_completion(llama_like_tokenizer) -> None:
    tokenizer = llama_like_tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello")["input_ids"]) == ["<s>", "▁hello"]
    prompt = tokenizer("say ")["input_ids"]
    whole = tokenizer("say hello</s>")["input_ids"]
    assert whole[: len(prompt)] != prompt
    encoded = encode_one(tokenizer, Preference("say ", "hello", "foo"))
    assert encoded.not_prefix
    assert encoded.prompt_ids == prompt
    for ids_, text in zip(encoded.completion_ids, ("hello", "foo"), strict=True):
        tokens = tokenizer.convert_ids_to_tokens(ids_)
        assert "".join(tokens) == f"{text}</s>"  # and no "▁" before it
        assert tokenizer.decode((prompt + ids_)[1:]) == f"say {text}</s>"


def test_prefix_spaces_of_byte_level_tokenizers_are_left_out(byte_bpe_tokenizer) -> None:
    tokenizer = clone(byte_bpe_tokenizer)
    spaced = tokenizer.backend_tokenizer
    spaced.pre_tokenizer.add_prefix_space = True
    assert tokenizer("hello")["input_ids"] == byte_bpe_tokenizer(" hello")["input_ids"]
    assert encoder_without_dummy_prefix(tokenizer)("hello") == byte_bpe_tokenizer("hello")["input_ids"]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_metaspace_prefixes_are_left_out(scheme: str, llama_like_tokenizer) -> None:
    tokenizer = clone(llama_like_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    assert tokenizer.tokenize("hello") == ["▁hello"]
    assert "".join(tokenizer.convert_ids_to_tokens(encoder_without_dummy_prefix(tokenizer)("hello"))) == "hello"


class SlowTokenizer(PreTrainedTokenizer):
    """One token a character behind a dummy space, in Python."""

    def __init__(self, **kwargs) -> None:
        self.characters = ["<unk>", "</s>", "▁", "\n", *"abcdefghijklmnopqrstuvwxyz"]
        super().__init__(unk_token="<unk>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def get_vocab(self) -> dict[str, int]:
        return {character: i for i, character in enumerate(self.characters)}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return list("▁" + text.replace(" ", "▁"))

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self.characters[index]


def test_slow_tokenizers_lose_the_dummy_prefix_too() -> None:
    tokenizer = SlowTokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("ab", add_special_tokens=False)) == ["▁", "a", "b"]
    alone = encoder_without_dummy_prefix(tokenizer)("ab")
    assert tokenizer.convert_ids_to_tokens(alone) == ["a", "b"]


def test_special_tokens_appended_to_the_prompt_are_taken_off(word_tokenizer) -> None:
    tokenizer = clone(word_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<user> $A </s>", special_tokens=[("<user>", 2), ("</s>", 1)]
    )
    assert tokenizer("w1")["input_ids"] == [2, 4, 1]
    encoded = encode_one(tokenizer, Preference("w1 ", "w2 ", "w3 "))
    assert encoded == EncodedRow([2, 4], ([5, 1], [6, 1]), not_prefix=False)


THINKING = (
    "{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} "
    "{% else %}<assistant> {{ m.content }} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> w9 w10{% endif %}"
)


def test_a_generation_prompt_that_the_conversation_drops_is_kept(word_tokenizer) -> None:
    """Some templates open the answer with an empty thought that the whole conversation does not have."""
    tokenizer = clone(word_tokenizer, THINKING)
    encoded = encode_one(tokenizer, Preference([USER], [YES], [{**NO, "content": "w9 w2"}]))
    assert encoded.not_prefix
    assert encoded.prompt_ids == ids("<user>", "hi", "<assistant>", "w9", "w10")
    # The second completion starts like the thought; where they part is not where it starts.
    assert encoded.completion_ids == (ids("yes", "</s>"), ids("w9", "w2", "</s>"))


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (None, Truncated([5, 6, 1, 9], cut=False, eos_lost=False)),
        (6, Truncated([5, 6, 1, 9], cut=False, eos_lost=False)),
        (5, Truncated([5, 6, 1], cut=True, eos_lost=False)),  # EOS is still there; what followed it is gone
        (4, Truncated([5, 6], cut=True, eos_lost=True)),
        (2, Truncated([], cut=True, eos_lost=True)),
    ],
)
def test_truncation_keeps_the_start(max_length: int | None, expected: Truncated) -> None:
    assert truncate([2, 3], [5, 6, 1, 9], max_length, eos_id=1) == expected


def test_truncation_without_a_known_eos_loses_the_end() -> None:
    assert truncate([2], [5, 6], 2, eos_id=1) == Truncated([5], cut=True, eos_lost=True)
    assert truncate([2], [5, 6], 2, eos_id=None) == Truncated([5], cut=True, eos_lost=True)


def test_eos_inside_a_conversation_does_not_count_as_its_end() -> None:
    assert truncate([2], [5, 1, 6, 1], 4, eos_id=1) == Truncated([5, 1, 6], cut=True, eos_lost=True)


def test_use_does_not_change_the_fingerprint(llama_like_tokenizer) -> None:
    fresh = RecordTokenizer(clone(llama_like_tokenizer))
    used = RecordTokenizer(clone(llama_like_tokenizer))
    used.encode([Preference("say ", "hello", "foo")])
    assert Hasher.hash(fresh) == Hasher.hash(used)
    assert Hasher.hash(fresh) != Hasher.hash(RecordTokenizer(clone(llama_like_tokenizer, "{{ messages }}")))
