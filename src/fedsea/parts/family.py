"""What differs between model families: which of transformers' modules they are made of, and how far a layer looks back.

A family qualifies when its model has the usual shape (embedding, decoder layers, final norm, head) and its layers take
hidden states, a mask, rotary embeddings and a cache, as transformers' LLaMA does.
"""

import importlib
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedConfig

from fedsea.errors import ModelNotFoundError
from fedsea.registry import Registry


class Family:
    """A model family, by transformers' own modules. A new one is a file in `families/`, and nothing else."""

    name: ClassVar[str]  # the `model_type` of its configurations, with hyphens: the name of its file
    prefix: ClassVar[str]  # what the names of its classes in transformers begin with: `Qwen2` of `Qwen2DecoderLayer`

    def layer(self, config: PreTrainedConfig, index: int) -> nn.Module:
        """A decoder layer, for hidden states `[1, tokens, hidden]`."""
        return self._module("DecoderLayer", config, index)

    def rotary(self, config: PreTrainedConfig) -> nn.Module:
        """The rotary embedding of positions."""
        return self._module("RotaryEmbedding", config)

    def norm(self, hidden_size: int, eps: float) -> nn.Module:
        """The norm after the last layer."""
        return self._module("RMSNorm", hidden_size, eps)

    def window(self, config: Any, layer: int) -> int | None:
        """Tokens that a layer looks back on, itself included; None for all."""
        return None

    def _module(self, kind: str, *arguments: Any) -> nn.Module:
        model_type = self.name.replace("-", "_")
        module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
        made: nn.Module = getattr(module, self.prefix + kind)(*arguments)
        return made


_FAMILIES: Registry[Family] = Registry("fedsea.parts.families", "model family")


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
    """The family of a model, by its configuration's `model_type`; a ModelNotFoundError if FedSEA does not know it."""
    name, known = config.model_type.replace("_", "-"), _FAMILIES.names
    if name not in known:
        why = f"models of the family {config.model_type!r} are not supported yet"
        raise ModelNotFoundError(f"{why}; supported: {', '.join(known)}")
    return _FAMILIES.find(name)()
