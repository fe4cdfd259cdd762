"""What differs between model families. A further family is one entry here and one line in the tests' list.

A family qualifies when its model has the usual shape (embedding, decoder layers, final norm, head) and its layers take
hidden states, a mask, rotary embeddings and a cache, as transformers' LLaMA does.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from fedsea.errors import ModelNotFoundError


@dataclass(frozen=True)
class Family:
    """transformers' own modules of a model family.

    Attributes
    ----------
    layer
        `layer(config, index)`, a decoder layer.
    rotary
        `rotary(config)`, the rotary embedding.
    norm
        `norm(hidden_size, eps)`, the final norm.
    window
        `window(config, index)`: tokens that layer `index` looks back on, itself included, or None for all.
    """

    layer: Callable[..., nn.Module]
    rotary: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    window: Callable[[Any, int], int | None]


def _no_window(_config: Any, _layer: int) -> int | None:
    return None


def _same_window(config: Any, _layer: int) -> int | None:
    window: int | None = config.sliding_window
    return window


def _window_by_layer_type(config: Any, layer: int) -> int | None:
    window: int | None = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
    return window


_FAMILIES: dict[str, tuple[str, Callable[[Any, int], int | None]]] = {
    # model_type: (prefix of the class names, how far a layer looks back)
    "llama": ("Llama", _no_window),
    "mistral": ("Mistral", _same_window),
    "qwen2": ("Qwen2", _window_by_layer_type),
    "qwen3": ("Qwen3", _window_by_layer_type),
}


def turning_point(config: PreTrainedConfig) -> int | None:
    """Tokens up to which a text is computed with other rotary frequencies than a longer one (longrope); None if none.

    As in transformers, the length is that of the longest row after a forward pass, and counts for all its tokens; what
    the cache holds stays as it was computed.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope" or rope["short_factor"] == rope["long_factor"]:
        return None
    turn: int = rope["original_max_position_embeddings"]
    return turn


def narrowest_window(config: PreTrainedConfig) -> int | None:
    """Tokens that the layer that looks back least looks back on; None if all layers look back on all tokens."""
    window = family_of(config).window
    windows = (window(config, layer) for layer in range(config.num_hidden_layers))
    return min((one for one in windows if one is not None), default=None)


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model, by its configuration's `model_type`.

    Raises
    ------
    ModelNotFoundError
        If FedSEA does not know the family.
    """
    if config.model_type not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise ModelNotFoundError(
            f"models of the family {config.model_type!r} are not supported yet; supported: {known}"
        )
    prefix, window = _FAMILIES[config.model_type]
    module = importlib.import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    return Family(
        layer=getattr(module, f"{prefix}DecoderLayer"),
        rotary=getattr(module, f"{prefix}RotaryEmbedding"),
        norm=getattr(module, f"{prefix}RMSNorm"),
        window=window,
    )
