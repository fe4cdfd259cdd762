"""Scaling the loss of a float16 model, so that small gradients do not vanish."""

from collections.abc import Sequence

INITIAL_EXPONENT, GROWTH_STEPS, MAX_EXPONENT = 16, 1000, 24


class LossScale:
    """The power of two that the loss is multiplied by; its exponent crosses the wire with each gradient.

    Halved when a gradient overflows (that step is left out), doubled after many that did not. Attributes: `exponent`.
    """

    def __init__(self) -> None:
        self.set(None)

    def state(self) -> list[int]:
        """All that it remembers: the exponent, and the steps since the last that overflowed."""
        return [self.exponent, self._good]

    def set(self, state: Sequence[int] | None) -> None:
        """Go on from what `state` gave; None begins anew."""
        self.exponent, self._good = state if state is not None else (INITIAL_EXPONENT, 0)

    def overflowed(self) -> None:
        self.exponent, self._good = self.exponent - 1, 0

    def succeeded(self) -> None:
        self._good += 1
        if self._good >= GROWTH_STEPS and self.exponent < MAX_EXPONENT:
            self.exponent, self._good = self.exponent + 1, 0
