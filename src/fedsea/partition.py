"""Where the two cuts are, and which weights of the whole model live on which side of them."""

import re
from dataclasses import dataclass
from typing import Annotated

from fedsea.errors import PartitionError
from fedsea.flags import Flag

_LAYER = re.compile(r"([a-z_]\w*(?:\.[a-z_]\w*)*)\.(\d{1,6})\.(.+)", re.ASCII)
# A narrow cut's two halves: at the client, after the input blocks; at the block server, before the middle blocks.
PROJECT, LIFT = "narrow_cut.project.weight", "narrow_cut.lift.weight"


def layer_path(name: str) -> tuple[str, int, str] | None:
    """A weight's name as the path of the layers, the layer's number, and its name in there; None outside of layers.

    `model.layers.3.mlp.up_proj.weight` -> `model.layers`, 3, `mlp.up_proj.weight`. A decoder-only model of transformers
    has one list outside of its layers' own modules: the layers.
    """
    found = _LAYER.fullmatch(name)
    return (found[1], int(found[2]), found[3]) if found is not None else None


def layer_of(name: str) -> int | None:
    """The decoder layer that a weight of the whole model belongs to; None for embedding, final norm and head."""
    found = layer_path(name)
    return found[1] if found is not None else None


def in_middle(name: str, middle: range) -> bool:
    """Whether a trained weight is the block server's: of a layer in the middle, or the lift of a narrow cut."""
    return name == LIFT or layer_of(name) in middle


def require_layers(layers: range, count: int) -> None:
    """PartitionError if a model of `count` layers does not have these."""
    if not layers or layers.start < 0 or layers.stop > count:
        raise PartitionError(f"layers {layers.start}:{layers.stop} are not in the model, which has 0:{count}")


@dataclass(frozen=True)
class Partition:
    """The two cuts of a model.

    Parameters
    ----------
    input_layers
        `p`, the decoder layers that the client runs after the embedding; 0 for the embedding only.
    output_layers
        `q`, the decoder layers that the client runs before the final norm and the head.

    Raises
    ------
    PartitionError
        If a count is negative.
    """

    input_layers: Annotated[int, Flag("Decoder layers at the client, after the embedding.", min=0)] = 1
    output_layers: Annotated[int, Flag("Decoder layers at the client, before the head.", min=0)] = 1

    def __post_init__(self) -> None:
        for name, count in (("input_layers", self.input_layers), ("output_layers", self.output_layers)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise PartitionError(f"{name} must be a whole number of layers, 0 or more; got {count!r}")

    def middle(self, num_layers: int) -> range:
        """The decoder layers of the middle blocks; a PartitionError if there are fewer than the client is to run."""
        if self.input_layers + self.output_layers > num_layers:
            raise PartitionError(
                f"{self.input_layers} input and {self.output_layers} output layers "
                f"are more than the model's {num_layers}"
            )
        return range(self.input_layers, num_layers - self.output_layers)

    def input(self, num_layers: int) -> range:
        """The decoder layers of the input blocks."""
        return range(self.middle(num_layers).start)

    def output(self, num_layers: int) -> range:
        """The decoder layers of the output blocks."""
        return range(self.middle(num_layers).stop, num_layers)
