"""Shapes of well-known models, and of tiny ones for tests, by the names that `random:` takes."""

from typing import Any

PREFIX = "random:"


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


_LLAMA_2 = {
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": _rope(10000.0),
}
_TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": _rope(10000.0),
    "initializer_range": 0.2,  # at the usual 0.02 so small a model gives every token nearly the same logits
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _LLAMA_2
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-2-13b": _LLAMA_2
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama-2-70b": _LLAMA_2
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _rope(500000.0),
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _rope(100000.0),
        "tie_word_embeddings": True,
    },
    "tiny": _TINY | {"model_type": "llama"},
    "tiny-llama3": _TINY
    | {
        "model_type": "llama",
        "rope_parameters": _rope(
            10000.0,
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    },
    "tiny-mistral": _TINY | {"model_type": "mistral", "head_dim": 16, "sliding_window": 32},
    "tiny-qwen2": _TINY
    | {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 32,
        "max_window_layers": 3,
        "layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 3,
    },
    "tiny-qwen3": _TINY | {"model_type": "qwen3", "head_dim": 32},
}
