"""Gaussian noise, the paper's mechanism.

The paper (FedSEA-LLaMA, section on privacy) reports noise by its mean absolute value `s`. A Gaussian's is
`std * sqrt(2 / pi)`, so `std = s * sqrt(pi / 2)`: its 0.05 is `GaussianNoise(std=0.0627)`. It only means something
beside the signal: 0.05 on LLaMA2-7B, whose mean |h_A| after one layer is about 0.022, is `RelativeGaussianNoise(2.85)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsea.privacy.mechanism import Channel, Magnitude, Noise, Unit, in_float32, require_not_negative, written_as

GRID_BITS = 10  # noise is at least 2^9 steps of its grid
DROPPED = 13  # of a float32's 24 significant bits: float16 has 11


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """Independent Gaussian noise on every element (the paper's mechanism).

    Parameters
    ----------
    std
        Standard deviation; 0 sends states as they are. UsageError if it is negative or not finite.
    unit
        Of `std`; of a relative one `RelativeGaussianNoise` is short.
    """

    noise_option = "std"
    std: float = 0.0
    unit: Unit = Unit.ABSOLUTE

    def __post_init__(self) -> None:
        relative = self.unit is Unit.RELATIVE
        require_not_negative(self.std, "the noise level" if relative else "the noise's standard deviation")

    @property
    def family(self) -> str:
        return "relative" if self.unit is Unit.RELATIVE else "gaussian"

    @property
    def alters(self) -> bool:
        return self.std != 0

    @property
    def channel(self) -> Channel:
        return Channel(math.inf, self.require_absolute().std)

    def calibrated(self, measure: Callable[[], Magnitude]) -> Noise:
        return GaussianNoise(self.std * measure().mean) if self.unit is Unit.RELATIVE else self

    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        """`hidden + std * normals`, computed in float32, on a grid (`on_grid`)."""
        std = self.require_absolute().std
        if std == 0:
            return hidden
        return on_grid(in_float32(hidden) + std * normals().to(hidden.device), std).to(hidden.dtype)

    def __str__(self) -> str:
        return f"relative:level={self.std!r}" if self.unit is Unit.RELATIVE else f"gaussian:std={self.std!r}"


@written_as("gaussian", std=1.0)
def _gaussian(std: float) -> GaussianNoise:
    return GaussianNoise(std)


@written_as("relative", level=1.0)
def RelativeGaussianNoise(level: float = 0.0) -> GaussianNoise:  # noqa: N802
    """Gaussian noise whose standard deviation is `level` times the mean |h_A|; UsageError as `GaussianNoise`."""
    return GaussianNoise(level, Unit.RELATIVE)


def on_grid(noised: Tensor, std: float) -> Tensor:
    """Noised states rounded to a grid that says nothing of how they came about.

    A sum of floats keeps the gaps of what was added, so its last bits tell which of two states cannot have led to it,
    however strong the noise is (Mironov, On Significance of the Least Significant Bits for Differential Privacy, CCS
    2012): one noised state on a float32 wire named its token. So every noised state is rounded twice: to multiples of a
    power of two near `std / 1024`, as a float near 0 has gaps as fine as any, and to the 11 significant bits of
    float16, as the gaps of large states are large. Both are far coarser than what was added, whatever dtype is computed
    in or sent; together they move a state by less than a float16 wire does anyhow.

    Float64 stays as it is: nothing leaves in it, and what is measured in it is to be exact. The gradient is as if
    nothing had been rounded.
    """
    if noised.dtype is torch.float64:
        return noised
    return _OnGrid.apply(noised, 2.0 ** (math.frexp(std)[1] - GRID_BITS))  # type: ignore[no-any-return]


class _OnGrid(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, noised: Tensor, step: float) -> Tensor:
        even = torch.round(noised / step) * step  # the step is a power of two: both are exact
        high = even * (2.0**DROPPED + 1)
        return high - (high - even)  # Veltkamp's: its first bits, rounded to nearest

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
