"""Qwen3: as Qwen2, with norms of queries and keys, which transformers' modules have."""

from fedsea.parts.families.qwen2 import Qwen2


class Qwen3(Qwen2):
    """Of transformers' `qwen3` module."""

    name = "qwen3"
    prefix = "Qwen3"
