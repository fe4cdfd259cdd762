"""What both a session's steps and a run's operations are checked for, against the model that the server holds."""

from fedsea.errors import LimitExceededError, PartitionError, ProtocolError
from fedsea.parts import MiddleBlocks


def check_layers(middle: MiddleBlocks, layers: range) -> None:
    """Check that the server holds some layers.

    Raises
    ------
    PartitionError
        If it does not.
    """
    held = middle.layers
    if layers and not (held.start <= layers.start and layers.stop <= held.stop):
        raise PartitionError(
            f"the server holds layers {held.start}:{held.stop}, the partition's middle is {layers.start}:{layers.stop}"
        )


def check_states(width: int, narrow: int, hidden_size: int) -> None:
    """Check how many numbers a state that came has.

    Raises
    ------
    ProtocolError
        If they are not as many as the narrow cut leaves (`narrow`, 0 for none), or as the model's have.
    """
    if width != (narrow or hidden_size):
        what = f"the run's narrow cut has rank {narrow}" if narrow else f"the model's hidden size is {hidden_size}"
        raise ProtocolError(f"{what}, the states that came have {width} numbers")


def check_length(tokens: int, max_tokens: int) -> None:
    """Check how long a row is.

    Raises
    ------
    LimitExceededError
        If it is longer than the model allows.
    """
    if tokens > max_tokens:
        raise LimitExceededError(f"a row of {tokens} tokens is longer than the model's {max_tokens} positions")
