"""The parts of a model, for the tests of this room."""

from typing import Any

import torch

from fedsea import Partition
from fedsea.checkpoints import open_checkpoint
from fedsea.parts import InputBlocks, MiddleBlocks, OutputBlocks


def parts(partition: Partition, name: str = "tiny") -> list[Any]:
    """A, B if there is one, and C."""
    checkpoint = open_checkpoint(f"random:{name}")
    middle, dtype = partition.middle(checkpoint.config.num_hidden_layers), torch.float32
    built = [MiddleBlocks.from_checkpoint(checkpoint, middle, dtype=dtype)] if middle else []
    first, last = (kind.from_checkpoint(checkpoint, partition, dtype=dtype) for kind in (InputBlocks, OutputBlocks))
    return [first, *built, last]
