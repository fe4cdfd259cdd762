"""Qwen2: the configuration says which layers have a window."""

from typing import Any

from fedsea.parts.family import Family


class Qwen2(Family):
    """Of transformers' `qwen2` module."""

    name = "qwen2"
    prefix = "Qwen2"

    def window(self, config: Any, layer: int) -> int | None:
        window: int | None = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
        return window
