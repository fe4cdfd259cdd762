"""A GGUF file's tokenizer splits text as the model's own does, or the file is refused by name."""

import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Tokenizer

from fedsea.checkpoints import load_tokenizer, open_checkpoint
from fedsea.errors import ModelNotFoundError
from tests.checkpoints.test_packaged_model import needs_smollm2
from tests.support.gguf_files import PAIR, WORD, gguf, write_gguf

pytestmark = pytest.mark.usefixtures("conversions")
TEXTS = [
    "In 2024 there were 12,345 cats, and it's 3½ for the 1st.",
    "Here is the list:\n\n1. Apples\n\n22. Pears\n",
    "x = [\n    1,\n\t22,\n]\r\n\r\n",
    "a   1\nb  22  \n  ",
    "Café déjà vu, Zürich, e\u0301te\u0301, I'LL, don't, HelloWorld/HTTPServer://x ",
    "北京 2008年, ١٢٣ और नमस्ते 👍🏽 ...",
]
DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
# As the models' own tokenizer.json have it.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(regex: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, **sizes))


@pytest.fixture
def load(model: LlamaForCausalLM, tmp_path: Path) -> Any:
    def load(**keys: Any) -> Any:
        write_gguf(model, tmp_path / "m.gguf", tokenizer=keys)
        return open_checkpoint(tmp_path / "m.gguf").tokenizer()

    return load


def pieces(pre: Any, text: str) -> list[tuple[str, tuple[int, int]]]:
    found: list[tuple[str, tuple[int, int]]] = pre.pre_tokenize_str(text)
    return found


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("smollm", DIGITS),
        ("starcoder", DIGITS),
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        ("llama-bpe", split_by(LLAMA_3)),
        ("qwen2", Qwen2Tokenizer().backend_tokenizer.pre_tokenizer),
        ("tekken", split_by(TEKKEN)),
    ],
)
def test_text_is_split_as_the_models_own_tokenizer_splits_it(load: Any, name: str, right: Any) -> None:
    backend = load(pre=name).backend_tokenizer
    for text in TEXTS:
        assert pieces(backend.pre_tokenizer, text) == pieces(right, text)


def test_the_split_that_a_file_names_is_not_just_gpt2s(load: Any) -> None:
    def words(name: str | None, text: str) -> list[str]:
        return [text[start:end] for _, (start, end) in pieces(load(pre=name).backend_tokenizer.pre_tokenizer, text)]

    assert words("smollm", "\n\n1. x 345") == ["\n\n", "1", ".", " x", " ", "3", "4", "5"]
    assert words("llama-bpe", "12345 cats!\n\n x") == ["123", "45", " cats", "!\n\n", " x"]
    assert words("qwen2", "I'LL 45") == ["I", "'LL", " ", "4", "5"]
    assert words("tekken", "HelloWorld 45") == ["Hello", "World", " ", "4", "5"]
    # A file that names none is split as llama.cpp splits it.
    assert words(None, "a12345 =x") == words("default", "a12345 =x") == ["a", "123", "45", " ", "=", "x"]


def test_qwen2_composes_accents_and_others_leave_them(load: Any) -> None:
    assert isinstance(Qwen2Tokenizer().backend_tokenizer.normalizer, normalizers.NFC)
    assert isinstance(load(pre="qwen2").backend_tokenizer.normalizer, normalizers.NFC)
    assert load(pre="llama-bpe").backend_tokenizer.normalizer is None


def test_words_of_the_vocabulary_are_taken_whole_where_the_model_was_trained_so(load: Any) -> None:
    byte_of = {chr(0x100 + byte): byte for byte in range(33)}
    pair, word = (bytes(byte_of[letter] for letter in token).decode() for token in (PAIR, WORD))
    assert load(pre="gpt-2").tokenize(pair) == [PAIR]
    assert load(pre="gpt-2").tokenize(word) == list(WORD)
    assert load(pre="llama-bpe").tokenize(word) == [WORD]


@pytest.mark.parametrize(
    ("keys", "ids"),
    [
        ({"pre": "gpt-2"}, []),
        ({"pre": "gpt-2", "add_bos_token": True}, [0]),
        ({"pre": "llama-bpe"}, [0]),
        ({"pre": "llama-bpe", "add_bos_token": False}, []),
        ({"pre": "gpt-2", "add_bos_token": True, "add_eos_token": True}, [0, 1]),
    ],
)
def test_a_text_begins_and_ends_as_the_file_says(load: Any, keys: dict[str, Any], ids: list[int]) -> None:
    assert load(**keys)("")["input_ids"] == ids


@pytest.mark.parametrize("first_space", [None, True, False])
def test_a_sentencepiece_vocabulary_adds_a_first_space_unless_the_file_says_no(
    load: Any, first_space: bool | None
) -> None:
    letters = ["<unk>", "<s>", "</s>", "▁", "a", "▁a", *(f"<0x{byte:02X}>" for byte in range(58))]
    tokenizer = load(
        model="llama",
        pre="default",
        tokens=letters,
        token_type=[gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.NORMAL] * 3]
        + [gguf.TokenType.BYTE] * 58,
        scores=[0.0] * 3 + [-2.0, -3.0, -1.0] + [0.0] * 58,
        merges=None,
        unknown_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        add_space_prefix=first_space,
    )
    assert tokenizer("a a")["input_ids"] == ([1, 4, 5] if first_space is False else [1, 5, 5])
    assert tokenizer.decode([5, 5]) == (" a a" if first_space is False else "a a")


@pytest.mark.parametrize("name", ["superbpe", "bloom", "no-such-type"])
def test_a_split_that_is_not_known_is_refused_by_name(load: Any, name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=re.escape(f"'{name}' (tokenizer.ggml.pre)")) as raised:
        load(pre=name)
    assert "\n" not in str(raised.value)


@needs_smollm2
def test_default_model_has_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    tokenizer = load_tokenizer("smollm2-135m")
    right = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    right.pre_tokenizer = DIGITS
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == right.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("\n\n1.") == ["ĊĊ", "1", "."]
