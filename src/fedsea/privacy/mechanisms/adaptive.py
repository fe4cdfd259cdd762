"""A noise that follows a training, at a leakage that does not.

A text that is learnt from is seen once in each pass over the texts: a look. How much a look may tell depends on the
ratio of clip to noise alone. Call `p` the square of that ratio, in units of that at the level which the user has set.
`N` looks with `p_1 + ... + p_N = N` tell no more than `N` looks at that level:

- Of states that stay the same, the noise of all looks together is that of one of variance `s^2 / (p_1 + ... + p_N)`.
- Of states that change, the bits of each look add up. `log(1 + p * x)` is concave in `p`: equal looks tell the most.
- Renyi divergences of Gaussians are linear in `p`, so the epsilon is that of `N` equal looks. It stays so where `p` is
  chosen in sight of the looks before (Feldman and Zrnic, Individual Privacy Accounting via a Renyi Filter, 2021).

So the sum is what `LookBudget` keeps. Two more things have to hold. All texts of a pass have the same `p`: a schedule
by steps would tell more of those texts that come in the precise steps. And clip and noise grow or shrink together where
they follow the size of states.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fedsea.errors import UsageError
from fedsea.privacy.chain import Chain
from fedsea.privacy.mechanism import (
    Channel,
    Magnitude,
    Noise,
    Unit,
    require_not_negative,
    require_positive,
    whole_number,
    written_as,
)
from fedsea.privacy.mechanisms.clip import relative_clipped_gaussian

FLOOR = 0.25  # each look's `p` at least, so that none is wasted behind noise that nothing is learnt through
GRAIN = 2**20  # `p` is a multiple of 1 / GRAIN, so that sums are exact
SCALE_STEP = 0.25  # scales are powers of two, in such steps of the exponent
SCALE_STEPS = 32  # in either direction: all that a scale can tell of what it was measured on is one of 65 values


@written_as("adaptive", clip=1.0, level=1.0, epochs=1)
@dataclass(frozen=True)
class AdaptiveGaussianNoise(Noise):
    """`relative_clipped_gaussian` that a training may make finer in one epoch and coarser in another.

    What does not recalibrate it (`fedsea.training.recalibration`), chat and evaluation among it, has the strength of
    `level`.

    Parameters
    ----------
    clip
        Multiple of the mean L2 norm of a token's state.
    level
        The noise's standard deviation, as a multiple of the mean |h_A| of states that are not clipped: that at which
        `epochs` epochs would tell as much as those that the training takes.
    epochs
        That are planned, each with noise of its own. Those beyond have the strength of `level`.

    Raises
    ------
    UsageError
        If `clip` is not a number above 0, `level` is negative or not finite, or `epochs` is not a whole number from 1.
    """

    adaptive = True
    clip: float
    level: float
    epochs: int

    def __post_init__(self) -> None:
        require_positive(self.clip, "the norm to clip to")
        require_not_negative(self.level, "the noise level")
        object.__setattr__(self, "epochs", whole_number(self.epochs, "the epochs of an adaptive noise"))

    @property
    def unit(self) -> Unit:
        """Always relative."""
        return Unit.RELATIVE

    @property
    def strength(self) -> float:
        """The level."""
        return self.level

    def with_strength(self, strength: float) -> Noise:
        """With another level."""
        return dataclasses.replace(self, level=strength)

    @property
    def channel(self) -> Channel:
        """Not known before it is calibrated."""
        return self.require_absolute().channel

    def calibrated(self, measure: Callable[[], Magnitude]) -> Noise:
        """The clip and the Gaussian noise that `clip` and `level` mean here."""
        return relative_clipped_gaussian(self.clip, self.level).calibrated(measure)

    def updated(self, precision: float, scale: float) -> Noise:
        """With noise of `1 / precision` times its variance, and clip and noise times `scale`."""
        return dataclasses.replace(self, clip=scale * self.clip, level=scale * self.level / math.sqrt(precision))

    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        """Not possible before it is calibrated."""
        return self.require_absolute().apply(hidden, normals)


def adaptive_part(noise: Noise) -> AdaptiveGaussianNoise | None:
    """The adaptive noise that a mechanism, not calibrated, is or has in it; None without one."""
    parts = noise.parts if isinstance(noise, Chain) else (noise,)
    return next((part for part in parts if isinstance(part, AdaptiveGaussianNoise)), None)


def rounded_scale(ratio: float) -> float:
    """How much larger states have become, as one of few values.

    States depend on weights, and those on the texts that were learnt from: what follows them should tell little.
    A ratio that is no positive number counts as 1: the training itself says what is wrong with such states.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        return 1.0
    steps = round(math.log2(ratio) / SCALE_STEP)
    return float(2.0 ** (SCALE_STEP * max(-SCALE_STEPS, min(SCALE_STEPS, steps))))


class LookBudget:
    """The accountant of a training: what the planned looks have told, and what is left, in units of one at the level.

    Whatever is asked for, `spent` never sums up to more than `looks`.

    Parameters
    ----------
    looks
        That are planned.
    spent
        The precision of each look that was begun, where a training goes on.

    Raises
    ------
    UsageError
        If more is spent than there was.
    """

    def __init__(self, looks: int, spent: tuple[float, ...] = ()) -> None:
        if len(spent) > looks or sum(spent) > looks or any(not 0 < one <= looks for one in spent):
            raise UsageError(f"{sum(spent):g} of {looks} looks are spent, in {len(spent)}; begin the training anew")
        self.looks, self.spent = looks, list(spent)

    @property
    def left(self) -> float:
        """What all further planned looks may tell together."""
        return self.looks - sum(self.spent)

    @property
    def later(self) -> int:
        """Planned looks that were not begun."""
        return self.looks - len(self.spent)

    def spend(self, share: float) -> float:
        """Begin a planned look.

        Parameters
        ----------
        share
            Which share of what is left it would have, in [0, 1]. The last one has all.

        Returns
        -------
        float
            Its precision: as asked for, as far as this look and those to come have `FLOOR` each.
        """
        assert self.later > 0, "no look is left"
        most = self.left - FLOOR * (self.later - 1)
        wanted = self.left if self.later == 1 else self.left * share
        precision = math.floor(min(max(wanted, FLOOR), most) * GRAIN) / GRAIN
        self.spent.append(precision)
        return precision
