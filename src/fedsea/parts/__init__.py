"""The three parts of a split model, cut from transformers' own models, and the adapters that are put on them."""

from fedsea.parts.adapters import AdapterSpec, adapter_parameters, misfit
from fedsea.parts.blocks import InputBlocks, MiddleBlocks, OutputBlocks
from fedsea.parts.cache import BLOCK, RowCache
from fedsea.parts.check import check_family
from fedsea.parts.rows import Rows

__all__ = [
    "BLOCK",
    "AdapterSpec",
    "InputBlocks",
    "MiddleBlocks",
    "OutputBlocks",
    "RowCache",
    "Rows",
    "adapter_parameters",
    "check_family",
    "misfit",
]
