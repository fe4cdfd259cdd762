"""How text is split before a tokenizer's merges, by the name that a GGUF file gives (`tokenizer.ggml.pre`).

A GGUF file holds vocabulary and merges, and of the rest of its tokenizer only a name. The split decides which merges
can happen at all: with another one the same text becomes other tokens, which the model has hardly seen. transformers
takes GPT-2's for a name that it does not know.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from fedsea.checkpoints.gguf_file import GgufFile
from fedsea.errors import ModelNotFoundError

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What the format's own program falls back on.
_UNNAMED = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True)
class PreTokenizer:
    """What a name stands for, of a byte-level tokenizer."""

    splits: tuple[str, ...]  # regular expressions by which text is split, one after another
    composed: bool = False  # whether characters are composed first (Unicode NFC)
    whole_words: bool = False  # whether a word that is in the vocabulary is taken whole, whatever the merges say
    begins: bool = False  # whether a text begins with the first token of all texts, where the file does not say


_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA_3 = PreTokenizer((_LLAMA3,), whole_words=True, begins=True)
KNOWN: dict[str, PreTokenizer] = {
    "default": PreTokenizer(_UNNAMED),
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "qwen2": PreTokenizer((_QWEN2,), composed=True),
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,)),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, begins=True),
}


def complete_tokenizer(tokenizer: Any, file: GgufFile) -> None:
    """Make of the tokenizer that transformers builds from a GGUF file the one that the file describes."""

    def read(key: str) -> Any:
        return file.read(f"tokenizer.ggml.{key}")

    file.mark("tokenizer.ggml.", "tokens", "scores", "token_type", "merges", "unknown_token_id")  # by transformers
    kind, name = read("model"), read("pre") or "default"
    if kind == "gpt2":
        if name not in KNOWN:
            raise ModelNotFoundError(
                f"how its tokenizer splits text is called {name!r} (tokenizer.ggml.pre), which is not supported; "
                f"supported: {', '.join(KNOWN)}. Use the model in Hugging Face layout"
            )
        begins = _complete_byte_level(tokenizer.backend_tokenizer, KNOWN[name])
    elif kind == "llama" and name in ("default", "llama-spm"):
        begins = True
        if read("add_space_prefix") is False:
            _without_first_space(tokenizer.backend_tokenizer)
    else:
        raise ModelNotFoundError(
            f"its tokenizer is {kind!r} with the pre-tokenizer {name!r} (tokenizer.ggml.model, .pre), which is not "
            "supported. Use the model in Hugging Face layout"
        )
    said = read("add_bos_token")
    tokenizer.add_bos_token = tokenizer.bos_token is not None and bool(begins if said is None else said)
    tokenizer.add_eos_token = tokenizer.eos_token is not None and bool(read("add_eos_token"))


def _without_first_space(backend: Tokenizer) -> None:
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _complete_byte_level(backend: Tokenizer, pre: PreTokenizer) -> bool:
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in pre.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.normalizer = normalizers.NFC() if pre.composed else None
    model = backend.model
    model.ignore_merges = pre.whole_words
    backend.model = model
    return pre.begins
