"""A narrow cut: few numbers of each state leave, and the middle blocks go on from what can be made of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fedsea.errors import ModelMismatchError, UsageError
from fedsea.privacy.chain import Chain
from fedsea.privacy.mechanism import Channel, Noise, whole_number, written_as


@written_as("narrow-cut")
@dataclass(frozen=True)
class NarrowCut(Noise):
    """`h_A` projected to `rank` numbers by a learned map, before anything else; the block server lifts it again.

    The map has weights, which are trained with the adapter and are the model's (`fedsea.parts.narrow`): states come
    here projected. In a chain it comes first, and what follows works on what is left. UsageError if `rank` is not a
    whole number, 1 or more.
    """

    rank: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", whole_number(self.rank, "the rank of a narrow cut"))

    @property
    def width(self) -> int:
        return self.rank

    @property
    def channel(self) -> Channel:
        return Channel(math.inf, 0.0, self.rank)

    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        """The projected states as they are; UsageError if they are not projected."""
        if hidden.shape[1] != self.rank:
            raise UsageError(
                f"{self} protects states of {self.rank} numbers; project them first, they have {hidden.shape[1]}"
            )
        return hidden


def taken_up(spec: Noise, own: Noise, source: object) -> Noise:
    """How states are to be protected by a model that takes up an adapter with a narrow cut.

    The user's mechanism (`spec`) is done on what the cut leaves. Without one, the model gets the adapter's `own`, its
    noise included. To go without noise, a user names the cut alone. ModelMismatchError if that has another rank than
    the adapter in `source`.
    """
    assert own.width is not None
    if spec.width is not None:
        if spec.width != own.width:
            raise ModelMismatchError(
                f"the adapter in {source} has a narrow cut of rank {own.width}, the mechanism asks for rank "
                f"{spec.width}; leave narrow-cut out, or write narrow-cut:rank={own.width}"
            )
        return spec
    if not spec.alters:
        return own
    return Chain((NarrowCut(own.width), spec))
