"""Gaussian noise that is strong where it costs the model little."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsea.errors import UsageError
from fedsea.privacy.gaussian import on_grid
from fedsea.privacy.mechanism import Channel, Magnitude, Noise, RelativeNoise, require_not_negative
from fedsea.privacy.shape import Shape, best_shape


@dataclass(frozen=True)
class ShapedNoise(RelativeNoise):
    """Gaussian noise that tells as much as `relative` of the same level, in the shape that costs the loss least.

    As much of public texts, that is: `shape.py` says of what, and how the shape follows from their states and from the
    loss's gradient there. For the gradient the block server is asked when the model is loaded: it runs the texts
    forward and backward.

    Once calibrated it holds its shape. That is no part of what it is called or equal to: it follows from the model, the
    partition and the level.

    Raises
    ------
    UsageError
        If `level` is negative or not finite.
    """

    name: ClassVar[str] = "shaped"
    level: float = 0.0

    def __post_init__(self) -> None:
        require_not_negative(self.level, "the noise level")

    @property
    def alters(self) -> bool:
        """Unless `level` is 0."""
        return self.level != 0

    @property
    def shape(self) -> Shape | None:
        """What it was calibrated to; None before, and for a level of 0."""
        return self.__dict__.get("_shape")

    @property
    def content(self) -> bytes:
        """With the shape: one level has another one wherever it is calibrated anew."""
        return super().content + (self.shape.content if self.shape is not None else b"")

    @property
    def channel(self) -> Channel:
        """Nothing bounds the states, and noise differs by direction."""
        if not self.alters:
            return Channel(math.inf, 0.0)
        if self.shape is None:
            raise self._not_calibrated()
        return Channel(math.inf, self.shape.white, shape=self.shape)

    def calibrated(self, measure: Callable[[], Magnitude]) -> Noise:
        """The same with its shape for the model at hand.

        Raises
        ------
        UsageError
            If nobody can say how the model's loss depends on its states.
        """
        if not self.alters:
            return self
        magnitude = measure()
        if magnitude.sensitivity is None:
            raise UsageError(f"{self} needs to know how the model's loss depends on its states, not only their size")
        made = dataclasses.replace(self)
        # Past the fields: what a mechanism is called and compared by are its options.
        made.__dict__["_shape"] = best_shape(magnitude.sensitivity(), self.level * magnitude)
        return made

    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        """`hidden` + the shaped `normals`, computed in float32, on a grid (`on_grid`)."""
        if not self.alters:
            return hidden
        if self.shape is None:
            raise self._not_calibrated()
        exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        # Shaped where it is drawn, so that the shape need not be on every device.
        noised = exact + self.shape.noise(normals().to("cpu", torch.float32)).to(exact)
        return on_grid(noised, self.shape.least).to(hidden.dtype)
