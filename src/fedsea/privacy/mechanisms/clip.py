"""Bounding the norm of each token's state, alone and before Gaussian noise.

Noise on states that may be of any size guarantees nothing: what is large enough shows through. On states of bounded
norm it does, for every text; `bound.py` and `accountant.py` say how much.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsea.privacy.chain import Chain
from fedsea.privacy.mechanism import Channel, Magnitude, Noise, Unit, in_float32, require_positive, written_as
from fedsea.privacy.mechanisms.gaussian import GaussianNoise, RelativeGaussianNoise


def clip_norms(hidden: Tensor, clip: float) -> Tensor:
    """Scale each token's state `[tokens, hidden]` down to an L2 norm of at most `clip`, in float32 (float64 stays).

    The gradient is that of the scaled state: of a state that is clipped, what points along it is taken away.
    """
    exact = in_float32(hidden)
    norms: Tensor = torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    return exact * (clip / norms.clamp(min=clip))


@dataclass(frozen=True)
class Clip(Noise):
    """Each token's state scaled down to an L2 norm of at most `norm`, and no noise.

    Alone it hides next to nothing: a state's direction names its token. It is for chains. UsageError if `norm` is not a
    number above 0.
    """

    norm: float
    unit: Unit = Unit.ABSOLUTE

    def __post_init__(self) -> None:
        require_positive(self.norm, "the norm to clip to")

    @property
    def channel(self) -> Channel:
        return Channel(self.require_absolute().norm, 0.0)

    def calibrated(self, measure: Callable[[], Magnitude]) -> Noise:
        return Clip(self.norm * measure().norm) if self.unit is Unit.RELATIVE else self

    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        return clip_norms(hidden, self.require_absolute().norm).to(hidden.dtype)

    def __str__(self) -> str:
        return f"{'relative-' if self.unit is Unit.RELATIVE else ''}clip:norm={self.norm!r}"


@written_as("clip")
def _clip(norm: float) -> Clip:
    return Clip(norm)


@written_as("relative-clip")
def _relative_clip(norm: float) -> Clip:
    return Clip(norm, Unit.RELATIVE)


@written_as("clipped-gaussian", std=1.0)
def clipped_gaussian(clip: float, std: float) -> Chain:
    """`clip:norm=CLIP+gaussian:std=STD`: what guarantees are stated for."""
    return Chain((Clip(clip), GaussianNoise(std)))


@written_as("relative-clipped-gaussian", clip=1.0, level=1.0)
def relative_clipped_gaussian(clip: float, level: float) -> Chain:
    """`relative-clip:norm=CLIP+relative:level=LEVEL`; the level is one of states that are not clipped."""
    return Chain((Clip(clip, Unit.RELATIVE), RelativeGaussianNoise(level)))
