"""Mechanisms one after the other."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from fedsea.errors import UsageError
from fedsea.privacy.mechanism import Channel, Magnitude, Noise, Unit, in_float32


@dataclass(frozen=True)
class Chain(Noise):
    """Mechanisms one after the other: `Chain((Clip(30), GaussianNoise(4)))` clips first, then adds noise.

    Relative ones are calibrated to the states as the model makes them, wherever they stand.

    A chain among its parts stands for theirs. Only one of them may add noise: there is one draw for a state, and noise
    that is added twice from one draw would not be what its strengths say.

    Raises
    ------
    UsageError
        If there are fewer than two parts, more than one adds noise, a narrow cut is not the first, or adaptive noise
        comes after something else than one.
    """

    parts: tuple[Noise, ...]

    def __post_init__(self) -> None:
        flat = [one for part in self.parts for one in (part.parts if isinstance(part, Chain) else (part,))]
        object.__setattr__(self, "parts", tuple(flat))
        if len(self.parts) < 2:
            raise UsageError("a chain of mechanisms has two or more")
        if sum(part.strength is not None for part in self.parts) > 1:
            raise UsageError(f"{self} adds noise more than once; give it once, with the standard deviation of the sum")
        if any(part.width is not None for part in self.parts[1:]):
            raise UsageError(f"{self} narrows states that were protected already; write narrow-cut first, and once")
        if any(part.adaptive and before.width is None for before, part in pairwise(self.parts)):
            # A bound that stays, before one that moves: the ratio of clip to noise would no longer be what it was.
            raise UsageError(f"{self} bounds states before adaptive does; leave that out, adaptive clips by itself")

    @property
    def _noisy(self) -> Noise | None:
        return next((part for part in self.parts if part.strength is not None), None)

    @property
    def unit(self) -> Unit:
        """That of the part that adds noise; without one relative, if a part is."""
        relative = any(part.unit is Unit.RELATIVE for part in ([self._noisy] if self._noisy else self.parts))
        return Unit.RELATIVE if relative else Unit.ABSOLUTE

    @property
    def strength(self) -> float | None:
        return self._noisy.strength if self._noisy else None

    def with_strength(self, strength: float) -> Noise:
        if self._noisy is None:
            return super().with_strength(strength)
        return Chain(tuple(part.with_strength(strength) if part is self._noisy else part for part in self.parts))

    @property
    def family(self) -> str:
        return "+".join(part.family for part in self.parts)

    @property
    def width(self) -> int | None:
        return self.parts[0].width

    @property
    def alters(self) -> bool:
        return any(part.alters for part in self.parts)

    @property
    def channel(self) -> Channel:
        """The noise, on states bounded by what comes before it; what comes after it is left out."""
        clip = math.inf
        for part in self.parts:
            channel = part.channel
            clip = min(clip, channel.clip)
            if channel.std:
                return Channel(clip, channel.std, self.width)
        return Channel(clip, 0.0, self.width)

    def calibrated(self, measure: Callable[[], Magnitude]) -> Noise:
        return Chain(tuple(part.calibrated(measure) for part in self.parts))

    def updated(self, precision: float, scale: float) -> Noise:
        return Chain(tuple(part.updated(precision, scale) for part in self.parts))

    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        """One part after the other, in float32, rounded once."""
        exact = in_float32(hidden)
        for part in self.parts:
            exact = part.apply(exact, normals)
        return exact.to(hidden.dtype)

    def __str__(self) -> str:
        return "+".join(str(part) for part in self.parts)
