"""What both a session's steps and a run's operations are checked for, against the model that the server holds."""

from fedsea.errors import LimitExceededError, PartitionError, ProtocolError
from fedsea.parts import MiddleBlocks


def check_layers(middle: MiddleBlocks, layers: range) -> None:
    """PartitionError if the server does not hold the layers."""
    held = middle.layers
    if layers and not (held.start <= layers.start and layers.stop <= held.stop):
        raise PartitionError(
            f"the server holds layers {held.start}:{held.stop}, the partition's middle is {layers.start}:{layers.stop}"
        )


def wrong_width(width: int, narrow: int, hidden_size: int) -> ProtocolError:
    """For a state of other numbers than the narrow cut leaves (0 for none), or the model's have."""
    what = f"the run's narrow cut has rank {narrow}" if narrow else f"the model's hidden size is {hidden_size}"
    return ProtocolError(f"{what}, the states that came have {width} numbers")


def too_long(tokens: int, max_tokens: int) -> LimitExceededError:
    """For a row that is longer than the model allows."""
    return LimitExceededError(f"a row of {tokens} tokens is longer than the model's {max_tokens} positions")
