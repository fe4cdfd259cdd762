"""What a mechanism is: what happens to hidden states on their way out of the client, and under which name.

A new one is one new file in `mechanisms/`, with a frozen dataclass whose fields are its options:

    @written_as("my-noise", spread=1.0)
    @dataclass(frozen=True)
    class MyNoise(Noise):
        spread: float
        ...

Users write it as `my-noise:spread=2`. The numbers in `written_as` are for options that may be left out where a command
looks for the strength by itself (`fedsea calibrate`, `fedsea audit --levels`).
"""

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor

from fedsea.errors import UsageError


class Unit(Enum):
    """What a strength is measured in."""

    ABSOLUTE = "absolute"  # the unit of the hidden states
    RELATIVE = "relative"  # multiples of a `Magnitude`: noise of its mean, norms of its norm


@dataclass(frozen=True)
class Magnitude:
    """How large a model's hidden states `h_A` are."""

    mean: float  # mean |h_A| of an element
    norm: float  # mean L2 norm of a token's state, in the same unit


@dataclass(frozen=True)
class Channel:
    """A mechanism as an observer of its output knows it: states of bounded norm with Gaussian noise on them.

    What a mechanism does after the noise is left out: it can take information away, never add any.
    """

    clip: float  # largest L2 norm of a token's state before the noise; infinite if nothing bounds it
    std: float  # of the noise on every element, in the unit of the states; 0 for none
    width: int | None = None  # numbers of a state where it meets clip and noise; None for as many as the model's have


class Noise(ABC):
    """A mechanism. Equal mechanisms have an equal `repr`, and `parse_mechanism(str(mechanism)) == mechanism`."""

    noise_option: ClassVar[str] = ""  # which of its options says how much noise it adds; empty if it adds none
    adaptive: ClassVar[bool] = False  # whether a training may recalibrate it (`updated`)

    @property
    def unit(self) -> Unit:
        """That of its options. What is relative has to be calibrated to a model before it is of use."""
        return Unit.ABSOLUTE

    @property
    def strength(self) -> float | None:
        """How much noise it adds, in its unit; None if it adds none, whatever its options."""
        return getattr(self, self.noise_option) if self.noise_option else None

    def with_strength(self, strength: float) -> "Noise":
        """The same mechanism with another strength; UsageError if it adds no noise, or the strength cannot be used."""
        if not self.noise_option:
            raise UsageError(f"{self} adds no noise, so it has no strength to vary")
        return dataclasses.replace(self, **{self.noise_option: strength})  # type: ignore[type-var]

    @property
    def family(self) -> str:
        """As users write it, without its strength: what is of one family is compared over strengths."""
        return self._written(self.noise_option) if self.noise_option else str(self)

    @property
    def width(self) -> int | None:
        """Numbers that are left of a state before it is protected and leaves; None for all of them."""
        return None

    @property
    def alters(self) -> bool:
        """Whether states leave as anything else than what they are; with a noise of 0 they do not."""
        return True

    @property
    @abstractmethod
    def channel(self) -> Channel:
        """What an observer of its output knows it as; UsageError if it is relative and not calibrated."""

    def calibrated(self, measure: Callable[[], Magnitude]) -> "Noise":
        """The mechanism for a model whose states `measure()` measures, in their unit."""
        return self

    def updated(self, precision: float, scale: float) -> "Noise":
        """With noise of `1 / precision` times its variance, and all strengths times `scale`, if it is adaptive."""
        return self

    @abstractmethod
    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        """Protect hidden states.

        Parameters
        ----------
        hidden
            `h_A`, `[tokens, hidden]`; with a narrow cut what that leaves of it, `[tokens, width]`.
        normals
            Gives standard normal draws, float32, of that shape: the same for the same state.

        Returns
        -------
        Tensor
            What may leave, same shape and dtype. Gradients flow to `hidden`.

        Raises
        ------
        UsageError
            If the mechanism is relative and not calibrated.
        """

    def __str__(self) -> str:
        """As users write it: `gaussian:std=0.5`. This one is for a class that is registered under a name."""
        return self._written("")

    def _written(self, left_out: str) -> str:
        name = next(name for name, form in FORMS.items() if form.make is type(self))
        names = (field.name for field in dataclasses.fields(self) if field.name != left_out)  # type: ignore[arg-type]
        options = ",".join(f"{option}={getattr(self, option)!r}" for option in names)
        return f"{name}:{options}" if options else name

    def require_absolute(self) -> Self:
        """The mechanism itself; UsageError if it is relative: it has to be calibrated first."""
        if self.unit is Unit.RELATIVE:
            raise UsageError(f"{self} has to be calibrated to the model first: call .calibrated(measure)")
        return self


@dataclass(frozen=True)
class Form:
    """How a mechanism is written: `NAME:OPTION=NUMBER,...`."""

    make: Callable[..., Noise]  # takes the options, by their names, as float
    options: tuple[str, ...]
    defaults: Mapping[str, float]  # of options that may be left out where the strength is still to be found


FORMS: dict[str, Form] = {}
"""All names by which users write mechanisms."""

Maker = TypeVar("Maker", bound=Callable[..., Noise])


def written_as(name: str, **defaults: float) -> Callable[[Maker], Maker]:
    """Register what makes a mechanism of the options that are written behind a name: a class, or a function."""

    def register(make: Maker) -> Maker:
        FORMS[name] = Form(make, tuple(inspect.signature(make).parameters), defaults)
        return make

    return register


def in_float32(hidden: Tensor) -> Tensor:
    """What a mechanism computes in, so that half precision is rounded once; float64 stays."""
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


def require_not_negative(value: float, what: str) -> None:
    """Raise UsageError unless a strength is finite and 0 or more."""
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"{what} must be a number, 0 or more; got {value}")


def require_positive(value: float, what: str) -> None:
    """Raise UsageError unless a bound is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{what} must be a number above 0; got {value}")


def whole_number(value: float, what: str) -> int:
    """A whole number from 1; raises UsageError for any other."""
    if not (math.isfinite(value) and value >= 1 and value == int(value)):
        raise UsageError(f"{what} must be a whole number, 1 or more; got {value}")
    return int(value)
