"""Mechanisms one after the other."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from fedsea.errors import UsageError
from fedsea.privacy.mechanism import Channel, Magnitude, Noise


@dataclass(frozen=True)
class Chain(Noise):
    """Mechanisms one after the other: `Chain((Clip(30), GaussianNoise(4)))` clips first, then adds noise.

    Relative ones are calibrated to the states as the model makes them, wherever they stand.

    Parameters
    ----------
    parts
        Two or more mechanisms. Only one of them may add noise: there is one draw for a state, and noise that is added
        twice from one draw would not be what its strengths say.

    Raises
    ------
    UsageError
        If there are fewer than two parts, more than one adds noise, a narrow cut is not the first, or adaptive noise
        comes after something else than one.
    """

    name: ClassVar[str] = "chain"
    parts: tuple[Noise, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise UsageError("a chain of mechanisms has two or more")
        if sum(part.adds_noise for part in self.parts) > 1:
            raise UsageError(f"{self} adds noise more than once; give it once, with the standard deviation of the sum")
        if any(part.width is not None for part in self.parts[1:]):
            raise UsageError(f"{self} narrows states that were protected already; write narrow-cut first, and once")
        if any(part.follows_states and before.width is None for before, part in pairwise(self.parts)):
            # A bound that stays, before one that moves: the ratio of clip to noise would no longer be what it was.
            raise UsageError(f"{self} bounds states before adaptive does; leave that out, adaptive clips by itself")

    @property
    def width(self) -> int | None:
        """That of the first part, if it is a narrow cut."""
        return self.parts[0].width

    @property
    def adds_noise(self) -> bool:  # type: ignore[override]
        """If one of its parts does."""
        return any(part.adds_noise for part in self.parts)

    @property
    def alters(self) -> bool:
        """If one of its parts does."""
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
        """The chain of the calibrated parts."""
        return Chain(tuple(part.calibrated(measure) for part in self.parts))

    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        """One part after the other, in float32, rounded once."""
        exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        for part in self.parts:
            exact = part.apply(exact, normals)
        return exact.to(hidden.dtype)

    def __str__(self) -> str:
        """As users write it: `clip:norm=30+gaussian:std=4`."""
        return "+".join(str(part) for part in self.parts)
