"""The three parts of a split model, built from transformers' own layers, and the adapters that are put on them."""

from fedsea.parts.adapters import AdapterSpec, adapter_parameters, misfit
from fedsea.parts.blocks import InputBlocks, MiddleBlocks, OutputBlocks
from fedsea.parts.cache import RowCache
from fedsea.parts.rows import Rows

__all__ = [
    "AdapterSpec",
    "InputBlocks",
    "MiddleBlocks",
    "OutputBlocks",
    "RowCache",
    "Rows",
    "adapter_parameters",
    "misfit",
]
