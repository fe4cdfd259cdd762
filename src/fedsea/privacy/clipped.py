"""Bounding the norm of each token's state, alone and before Gaussian noise.

Noise on states that may be of any size guarantees nothing: what is large enough shows through. On states of bounded
norm it does, for every text; `bound.py` and `accountant.py` say how much.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsea.privacy.gaussian import add_noise
from fedsea.privacy.mechanism import Channel, Magnitude, Noise, RelativeNoise, require_not_negative, require_positive


def clip_norms(hidden: Tensor, clip: float) -> Tensor:
    """Scale each token's state `[tokens, hidden]` down to an L2 norm of at most `clip`, in float32 (float64 stays).

    States within the bound stay as they are. The gradient is that of the scaled state: of a state that is clipped, what
    points along it is taken away.
    """
    exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    norms: Tensor = torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    return exact * (clip / norms.clamp(min=clip))


@dataclass(frozen=True)
class Clip(Noise):
    """Each token's state scaled down to an L2 norm of at most `norm`, in the unit of the states, and no noise.

    Alone it hides next to nothing: a state's direction names its token. It is for chains.

    Raises
    ------
    UsageError
        If `norm` is not a number above 0.
    """

    name: ClassVar[str] = "clip"
    adds_noise = False
    norm: float

    def __post_init__(self) -> None:
        require_positive(self.norm, "the norm to clip to")

    @property
    def alters(self) -> bool:
        """Always."""
        return True

    @property
    def channel(self) -> Channel:
        """Bounded, without noise."""
        return Channel(self.norm, 0.0)

    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        """The clipped states; nothing is drawn."""
        return clip_norms(hidden, self.norm).to(hidden.dtype)


@dataclass(frozen=True)
class RelativeClip(RelativeNoise):
    """`Clip` to `norm` times the mean L2 norm of the states of the model at hand.

    Raises
    ------
    UsageError
        If `norm` is not a number above 0.
    """

    name: ClassVar[str] = "relative-clip"
    adds_noise = False
    norm: float

    def __post_init__(self) -> None:
        require_positive(self.norm, "the norm to clip to")

    @property
    def alters(self) -> bool:
        """Always."""
        return True

    def calibrated(self, measure: Callable[[], Magnitude]) -> Noise:
        """`Clip` to the norm that this one means here."""
        return Clip(self.norm * measure().norm)


@dataclass(frozen=True)
class ClippedGaussianNoise(Noise):
    """Each token's state scaled down to a bounded L2 norm, then independent Gaussian noise on every element.

    Parameters
    ----------
    clip
        Largest L2 norm of a token's state, in the unit of the hidden states.
    std
        Standard deviation of the noise, in the same unit. 0 clips only.

    Raises
    ------
    UsageError
        If `clip` is not a number above 0, or `std` is negative or not finite.
    """

    name: ClassVar[str] = "clipped-gaussian"
    clip: float
    std: float

    def __post_init__(self) -> None:
        require_positive(self.clip, "the norm to clip to")
        require_not_negative(self.std, "the noise's standard deviation")

    @property
    def alters(self) -> bool:
        """Always: without noise too, states are clipped."""
        return True

    @property
    def channel(self) -> Channel:
        """Bounded states, then noise: what guarantees are stated for."""
        return Channel(self.clip, self.std)

    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        """The clipped states `+ std * normals`, computed in float32 and rounded once."""
        return add_noise(clip_norms(hidden, self.clip), self.std, normals).to(hidden.dtype)


@dataclass(frozen=True)
class RelativeClippedGaussianNoise(RelativeNoise):
    """`ClippedGaussianNoise` relative to the states of the model at hand.

    Parameters
    ----------
    clip
        Multiple of the mean L2 norm of a token's state.
    level
        The noise's standard deviation, as a multiple of the mean |h_A| of states that are not clipped.

    Raises
    ------
    UsageError
        If `clip` is not a number above 0, or `level` is negative or not finite.
    """

    name: ClassVar[str] = "relative-clipped-gaussian"
    clip: float
    level: float

    def __post_init__(self) -> None:
        require_positive(self.clip, "the norm to clip to")
        require_not_negative(self.level, "the noise level")

    @property
    def alters(self) -> bool:
        """Always: without noise too, states are clipped."""
        return True

    def calibrated(self, measure: Callable[[], Magnitude]) -> Noise:
        """`ClippedGaussianNoise` with the norm and the standard deviation that these mean here."""
        magnitude = measure()
        return ClippedGaussianNoise(self.clip * magnitude.norm, self.level * magnitude)
