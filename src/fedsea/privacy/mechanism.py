"""What a mechanism is: what happens to hidden states on their way out of the client.

A new one is a frozen dataclass whose fields are its options, in a file of its own, and a line in `parse.py`.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from fedsea.errors import UsageError


class Magnitude(float):
    """How large a model's hidden states `h_A` are: the mean |h_A| of an element, a number like any other.

    Parameters
    ----------
    mean
        Mean |h_A| of an element.
    norm
        Mean L2 norm of a token's state, in the same unit.
    """

    norm: float

    def __new__(cls, mean: float, norm: float) -> Self:
        self = super().__new__(cls, mean)
        self.norm = norm
        return self


@dataclass(frozen=True)
class Channel:
    """What a mechanism is to whoever looks at its output: states of bounded norm with Gaussian noise on them.

    Whatever a mechanism does after the noise is left out: it can take information away, never add any.

    Attributes
    ----------
    clip
        Largest L2 norm of a token's state before the noise; infinite if nothing bounds it.
    std
        The noise's standard deviation on every element, in the unit of the states; 0 for none.
    width
        Numbers of a state where it meets clip and noise; None for as many as the model's have.
    """

    clip: float
    std: float
    width: int | None = None


class Noise(ABC):
    """A mechanism. Equal mechanisms have an equal `repr`, and `parse_mechanism(str(mechanism))` is `mechanism`.

    Attributes
    ----------
    name
        What users call it.
    adds_noise
        Whether it draws noise. A chain may do so once.
    follows_states
        Whether a training may change its strength as states grow or shrink.
    """

    name: ClassVar[str]
    adds_noise: bool = True
    follows_states: bool = False

    @property
    def width(self) -> int | None:
        """Numbers that are left of a state before it is protected and leaves; None for all of them."""
        return None

    @property
    @abstractmethod
    def alters(self) -> bool:
        """Whether states leave as anything else than what they are; with a noise of 0 they do not."""

    @property
    @abstractmethod
    def channel(self) -> Channel:
        """What it is to whoever looks at its output.

        Raises
        ------
        UsageError
            If it is relative to a model and not calibrated.
        """

    def calibrated(self, measure: Callable[[], Magnitude]) -> "Noise":
        """The mechanism for a model whose states `measure()` measures; most do not depend on it."""
        return self

    @abstractmethod
    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        """Protect hidden states.

        Parameters
        ----------
        hidden
            `h_A`, `[tokens, hidden]`; with a narrow cut what that leaves of it, `[tokens, width]`.
        normals
            Gives standard normal draws, float32, `[tokens, hidden]`: the same for the same state.

        Returns
        -------
        Tensor
            What may leave, `[tokens, hidden]`, same dtype. Gradients flow to `hidden`.
        """

    def __str__(self) -> str:
        """As users write it: `gaussian:std=0.5`."""
        options = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return f"{self.name}:{','.join(f'{name}={value!r}' for name, value in options)}"


class RelativeNoise(Noise):
    """A mechanism whose strength is relative to the model's states: it has to be calibrated before it is of use.

    The states are measured once, when the model is loaded, on a fixed public text (`measure_magnitude`), so one level
    means one strength for one model and partition, whatever is said later.
    """

    @property
    def channel(self) -> Channel:
        """Not known before `calibrated`."""
        raise self._not_calibrated()

    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        """Not possible before `calibrated`."""
        raise self._not_calibrated()

    def _not_calibrated(self) -> UsageError:
        return UsageError(f"{self} has to be calibrated to the model first: call .calibrated(measure)")


def require_not_negative(value: float, what: str) -> None:
    """Check a strength.

    Raises
    ------
    UsageError
        If it is negative or not finite.
    """
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"{what} must be a number, 0 or more; got {value}")


def require_positive(value: float, what: str) -> None:
    """Check a bound.

    Raises
    ------
    UsageError
        If it is not finite, 0 or negative.
    """
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{what} must be a number above 0; got {value}")
