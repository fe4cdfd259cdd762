"""Gaussian noise, the paper's mechanism.

The paper (FedSEA-LLaMA, section on privacy) reports noise by its mean absolute value `s`. A Gaussian's is
`std * sqrt(2 / pi)`, so `std = s * sqrt(pi / 2)`: its 0.05 is `GaussianNoise(std=0.0627)`. It only means something
beside the signal: 0.05 on LLaMA2-7B, whose mean |h_A| after one layer is about 0.022, is `RelativeGaussianNoise(2.85)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsea.privacy.mechanism import Channel, Noise, require_not_negative


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """Independent Gaussian noise on every element (the paper's mechanism).

    Parameters
    ----------
    std
        Standard deviation, in the unit of the hidden states. 0 sends them as they are.

    Raises
    ------
    UsageError
        If `std` is negative or not finite.
    """

    name: ClassVar[str] = "gaussian"
    std: float = 0.0

    def __post_init__(self) -> None:
        require_not_negative(self.std, "the noise's standard deviation")

    @property
    def alters(self) -> bool:
        """Unless `std` is 0."""
        return self.std != 0

    @property
    def channel(self) -> Channel:
        """Nothing bounds the states."""
        return Channel(math.inf, self.std)

    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        """`hidden + std * normals`, computed in float32."""
        if self.std == 0:
            return hidden
        return add_noise(hidden, self.std, normals).to(hidden.dtype)


def add_noise(hidden: Tensor, std: float, normals: Callable[[], Tensor]) -> Tensor:
    """`hidden + std * normals` in float32 (float64 stays), `[tokens, hidden]`; with `std` 0 nothing is drawn."""
    exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return exact + std * normals().to(hidden.device) if std else exact
