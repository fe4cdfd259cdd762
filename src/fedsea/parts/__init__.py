"""The three parts of a split model, built from transformers' own layers."""

from fedsea.parts.blocks import InputBlocks, MiddleBlocks, OutputBlocks
from fedsea.parts.cache import RowCache
from fedsea.parts.rows import Rows

__all__ = ["InputBlocks", "MiddleBlocks", "OutputBlocks", "RowCache", "Rows"]
