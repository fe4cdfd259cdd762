"""The weighted mean of adapters, of which each trainer may have other layers."""

from collections.abc import Iterable

import torch
from torch import Tensor


class WeightedMean:
    """For each name sum(weight * value) / sum(weight) over the values that were added for it, summed in float64."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, value: Tensor, weight: float) -> None:
        """One more value of a name."""
        part = value.detach().to(torch.float64) * weight
        self._sums[name] = self._sums[name] + part if name in self._sums else part
        self._weights[name] = self._weights.get(name, 0.0) + weight

    @property
    def names(self) -> list[str]:
        """Those that have a value."""
        return list(self._sums)

    def of(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The means of some names, float32, on the CPU."""
        return {name: (self._sums[name] / self._weights[name]).float().cpu() for name in names}
