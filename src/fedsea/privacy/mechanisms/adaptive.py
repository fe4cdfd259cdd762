"""Gaussian noise behind a clip, both relative, that a training may recalibrate (`fedsea.training.recalibration`)."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fedsea.privacy.chain import Chain
from fedsea.privacy.mechanism import (
    Channel,
    Magnitude,
    Noise,
    Unit,
    require_not_negative,
    require_positive,
    whole_number,
    written_as,
)
from fedsea.privacy.mechanisms.clip import relative_clipped_gaussian


@written_as("adaptive", clip=1.0, level=1.0, epochs=1)
@dataclass(frozen=True)
class AdaptiveGaussianNoise(Noise):
    """`relative_clipped_gaussian` that a training may make finer in one epoch and coarser in another.

    Parameters
    ----------
    clip, level
        As `relative_clipped_gaussian` has them: the strength at which `epochs` epochs would tell as much as those that
        the training takes, and of all that does not recalibrate it, chat and evaluation among it.
    epochs
        That are planned, each with noise of its own. Those beyond have the strength of `level`.

    Raises
    ------
    UsageError
        If `clip` is not a number above 0, `level` is negative or not finite, or `epochs` is not a whole number from 1.
    """

    adaptive, noise_option = True, "level"
    clip: float
    level: float
    epochs: int

    def __post_init__(self) -> None:
        require_positive(self.clip, "the norm to clip to")
        require_not_negative(self.level, "the noise level")
        object.__setattr__(self, "epochs", whole_number(self.epochs, "the epochs of an adaptive noise"))

    @property
    def unit(self) -> Unit:
        return Unit.RELATIVE

    @property
    def channel(self) -> Channel:
        return self.require_absolute().channel

    def calibrated(self, measure: Callable[[], Magnitude]) -> Noise:
        """The clip and the Gaussian noise that `clip` and `level` mean here."""
        return relative_clipped_gaussian(self.clip, self.level).calibrated(measure)

    def updated(self, precision: float, scale: float) -> Noise:
        """With noise of `1 / precision` times its variance, and clip and noise times `scale`."""
        return dataclasses.replace(self, clip=scale * self.clip, level=scale * self.level / math.sqrt(precision))

    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        return self.require_absolute().apply(hidden, normals)


def adaptive_part(noise: Noise) -> AdaptiveGaussianNoise | None:
    """The adaptive noise that a mechanism, not calibrated, is or has in it; None without one."""
    parts = noise.parts if isinstance(noise, Chain) else (noise,)
    return next((part for part in parts if isinstance(part, AdaptiveGaussianNoise)), None)
