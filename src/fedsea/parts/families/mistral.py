"""Mistral: all layers look back on the same window, where there is one."""

from typing import Any

from fedsea.parts.family import Family


class Mistral(Family):
    """Of transformers' `mistral` module."""

    name = "mistral"
    prefix = "Mistral"

    def window(self, config: Any, layer: int) -> int | None:
        window: int | None = config.sliding_window
        return window
