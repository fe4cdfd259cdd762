"""Gaussian noise relative to the model's states."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from fedsea.privacy.gaussian import GaussianNoise
from fedsea.privacy.mechanism import Magnitude, Noise, RelativeNoise, require_not_negative


@dataclass(frozen=True)
class RelativeGaussianNoise(RelativeNoise):
    """Gaussian noise whose standard deviation is `level` times the mean |h_A| of the model at hand.

    Raises
    ------
    UsageError
        If `level` is negative or not finite.
    """

    name: ClassVar[str] = "relative"
    level: float = 0.0

    def __post_init__(self) -> None:
        require_not_negative(self.level, "the noise level")

    @property
    def alters(self) -> bool:
        """Unless `level` is 0."""
        return self.level != 0

    def calibrated(self, measure: Callable[[], Magnitude]) -> Noise:
        """`GaussianNoise` with the standard deviation that this level means here."""
        return GaussianNoise(self.level * measure())
