"""LLaMA 2 and 3, and what has their architecture (SmolLM2)."""

from fedsea.parts.family import Family


class Llama(Family):
    """Of transformers' `llama` module."""

    name = "llama"
    prefix = "Llama"
