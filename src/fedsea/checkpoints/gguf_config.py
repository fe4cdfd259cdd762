"""The configuration that the keys of a GGUF file describe."""

import math
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from fedsea.checkpoints.gguf_file import GgufFile
from fedsea.errors import ModelNotFoundError

ROPE_FREQS = "rope_freqs.weight"
_QUERIES = "blk.0.attn_q.weight"
_ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's are written as a llama


def read_config(file: GgufFile) -> PreTrainedConfig:
    """The transformers configuration of the model in a GGUF file."""
    kind = file.architecture
    if kind not in _ARCHITECTURES:
        raise ModelNotFoundError(
            f"GGUF files of the architecture {kind!r} are not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    heads, width = _count(file, "attention.head_count"), _count(file, "embedding_length")
    head_dim = file.shape(_QUERIES)[0] // heads if file.has(_QUERIES) else width // heads
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if file.of_model(key, head_dim) != head_dim:
            raise ModelNotFoundError(f"{kind}.{key} is not the width of a head, {head_dim}, which is not supported")
    if not file.of_model("attention.causal", True):
        raise ModelNotFoundError(f"{kind}.attention.causal is false: it is no causal language model")
    window = file.of_model("attention.sliding_window") or None
    if window and kind != "llama":
        raise ModelNotFoundError(f"{kind}.attention.sliding_window is not supported")
    settings = {
        "model_type": "mistral" if window else kind,
        "hidden_size": width,
        "num_hidden_layers": _count(file, "block_count"),
        "intermediate_size": _count(file, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _count(file, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _count(file, "context_length"),
        "rms_norm_eps": file.required(f"{kind}.attention.layer_norm_rms_epsilon"),
        "vocab_size": _vocabulary(file),
        "tie_word_embeddings": not file.has("output.weight"),
        "bos_token_id": file.read("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(file),
        "pad_token_id": file.read("tokenizer.ggml.padding_token_id"),
    }
    if window:
        settings["sliding_window"] = window
    elif kind != "qwen2":  # whose biases are always there
        settings["attention_bias"] = file.has("blk.0.attn_q.bias")
    if kind == "llama":
        settings["mlp_bias"] = file.has("blk.0.ffn_up.bias")
    settings["rope_parameters"] = _rope(file, head_dim, settings["max_position_embeddings"])
    config: PreTrainedConfig = AutoConfig.for_model(**settings)
    return config


def _count(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.of_model(key, default) if default is not None else file.required(f"{file.architecture}.{key}")
    if not isinstance(value, int) or value < 1:
        raise ModelNotFoundError(f"{file.architecture}.{key} is {str(value)[:40]}, which is not supported")
    return value


def _vocabulary(file: GgufFile) -> int:
    """Rows of the embedding, which count: a vocabulary may be padded."""
    if not file.has("token_embd.weight"):
        raise ModelNotFoundError("it lacks the tensor token_embd.weight")
    rows = file.shape("token_embd.weight")[0]
    if file.of_model("vocab_size", rows) != rows:
        raise ModelNotFoundError(f"{file.architecture}.vocab_size is not the embedding's number of rows, {rows}")
    return rows


def _end_tokens(file: GgufFile) -> int | list[int] | None:
    """An answer ends with the end of a text, of a turn or of a message."""
    ends = [file.read(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    known = list(dict.fromkeys(end for end in ends if end is not None))
    return known if len(known) > 1 else known[0] if known else None


def _rope(file: GgufFile, head_dim: int, context: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(file.of_model("rope.freq_base", 10000.0))}
    kind = file.of_model("rope.scaling.type", "none")
    factor = float(file.of_model("rope.scaling.factor") or file.of_model("rope.scale_linear") or 1.0)
    more = file.of_model("rope.scaling.attn_factor") or file.of_model("rope.scaling.yarn_attn_factor") or 1.0
    if kind == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": int(file.of_model("rope.scaling.original_context_length", context)),
            "beta_fast": float(file.of_model("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(file.of_model("rope.scaling.yarn_beta_slow", 1.0)),
        }
        if more != 1.0:
            rope["attention_factor"] = more * (0.1 * math.log(factor) + 1.0)
    elif kind not in ("none", "linear") or more != 1.0:
        raise ModelNotFoundError(f"{file.architecture}.rope.scaling.type {kind!r} (factor {factor:g}) is not supported")
    elif factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    if not file.has(ROPE_FREQS):
        return rope
    # What Llama 3.1 does to its frequencies: each is divided by a number of its own, whatever the text's length.
    factors = file.tensor(ROPE_FREQS).tolist()
    if rope["rope_type"] != "default" or len(factors) != head_dim // 2:
        raise ModelNotFoundError(f"{ROPE_FREQS} does not fit the model: {len(factors)} numbers, scaling {kind!r}")
    own = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0}
    return rope | own | {"attention_factor": 1.0, "original_max_position_embeddings": context}
