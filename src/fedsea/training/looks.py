"""How a training with adaptive noise divides what its looks may tell: pass by pass, and never more than there is.

Before the first step of a pass over the texts, its look is decided: its share of the budget (`LookBudget`) by how far
the training is and how its loss goes, and its scale by how large the states of a public text are under the input blocks
as they are now. It holds for all of the pass. What is decided is on disk before any text leaves under it, so that
whoever goes on after a crash does not spend it again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from fedsea.client.model import SplitModelForCausalLM
from fedsea.errors import UsageError
from fedsea.privacy import AdaptiveGaussianNoise, Magnitude, Noise, adaptive_part
from fedsea.privacy.mechanisms.adaptive import LookBudget, rounded_scale

FIRST_OVER_LAST = 4.0  # late precision costs: `fedsea bench privacy --only adaptive`
PROGRESS = 0.01  # by which share the loss has to be lower than a pass before, or else it stagnates
FINER = 2.0  # the next look's share, relative to those after it, is so many times as large then


@dataclass(frozen=True)
class Look:
    """How states are protected in a pass over the texts.

    Attributes
    ----------
    precision
        The noise's standard deviation is divided by its square root. 1 for that of the level.
    scale
        What clip and noise are multiplied by, as the states have become larger or smaller.
    """

    precision: float
    scale: float


class Looks:
    """The looks of a training.

    Parameters
    ----------
    model
        Whose mechanism is adaptive, and which is trained.
    mechanism
        The adaptive part of it.
    first_over_last
        Precision of the first planned pass over that of the last, were the loss to fall all the time; in between in
        equal steps of its logarithm.

    Attributes
    ----------
    budget
        What was spent.
    decided
        The look of each pass that was begun; those beyond the planned ones, too.
    begun
        Steps that have begun, so that their texts may have been seen.
    """

    def __init__(
        self,
        model: SplitModelForCausalLM,
        mechanism: AdaptiveGaussianNoise,
        *,
        first_over_last: float = FIRST_OVER_LAST,
    ) -> None:
        self._model, self._spec, channel = model, model.protection.spec, model.noise.channel
        # What the states were measured to be when the model was loaded.
        self._loaded = Magnitude(channel.std / (mechanism.level or 1.0), channel.clip / mechanism.clip)
        self.planned, self._first_over_last = mechanism.epochs, first_over_last
        self.budget = LookBudget(self.planned)
        self.decided: list[Look] = []
        self.begun = 0
        self._losses: list[tuple[float, int]] = []  # of each pass: the sum over its steps, and how many there were

    @classmethod
    def of(cls, model: SplitModelForCausalLM) -> Self | None:
        """Those of a model whose mechanism is adaptive; None for any other."""
        mechanism = adaptive_part(model.protection.spec)
        return cls(model, mechanism) if mechanism is not None else None

    def decide(self, passes: range) -> bool:
        """Decide the looks of all passes up to the last of these; returns whether there were any to decide."""
        new = len(self.decided) < passes.stop
        while len(self.decided) < passes.stop:
            scale = rounded_scale(self._model.protection.measure().norm / self._loaded.norm)
            precision = self.budget.spend(self._share()) if self.budget.later else 1.0
            self.decided.append(Look(precision, scale))
        return new

    def begin(self, step: int, passes: range) -> None:
        """Have the model protect a step that takes texts of these passes, which are decided.

        Texts of two passes may be in one step: they have the coarser of the two looks, so none is seen better than it
        is to be. A step that is done again is a further look at its texts, so it is no finer than the level.
        """
        precisions = [self.decided[number].precision for number in passes]
        if step < self.begun:
            precisions.append(1.0)
        self.begun = max(self.begun, step + 1)
        scale = self.decided[passes[-1]].scale
        self._protect(self._noise(Look(min(precisions), scale)), self._lasting(scale))

    def end(self) -> None:
        """All that leaves from now on has the strength of the level."""
        self._protect(None, self._model.noise)

    def learnt(self, passes: range, loss: float) -> None:
        """Take note of the loss of a step that began in the first of these passes."""
        while len(self._losses) <= passes.start:
            self._losses.append((0.0, 0))
        total, steps = self._losses[passes.start]
        self._losses[passes.start] = (total + loss, steps + 1)

    def _protect(self, look: Noise | None, lasting: Noise) -> None:
        protection = self._model.protection
        protection.noise, protection.in_training = lasting, look

    def _lasting(self, scale: float) -> Noise:
        """What protects all that is no planned look: the level, where the states are now."""
        return self._noise(Look(1.0, scale))

    def _noise(self, look: Look) -> Noise:
        return self._spec.updated(look.precision, look.scale).calibrated(lambda: self._loaded)

    def _share(self) -> float:
        """Of what is left, for the next planned look."""
        number = len(self.decided)
        steps = max(1, self.planned - 1)
        now, *later = (math.pow(self._first_over_last, -after / steps) for after in range(self.budget.later))
        now *= FINER if self._stagnates(number) else 1.0
        return now / (now + math.fsum(later))

    def _stagnates(self, number: int) -> bool:
        """Whether the pass before `number` has hardly a lower loss than the one before it."""
        means = [total / steps for total, steps in self._losses[max(0, number - 2) : number] if steps]
        return len(means) == 2 and not means[1] < (1 - PROGRESS) * means[0]

    def state(self) -> dict[str, Any]:
        """All that is needed to go on, as JSON."""
        return {
            "decided": [[look.precision, look.scale] for look in self.decided],
            "losses": [list(one) for one in self._losses],
            "begun": self.begun,
        }

    def load(self, state: Mapping[str, Any] | None, recorded: int, seen: int) -> bool:
        """Go on from `state`.

        Parameters
        ----------
        recorded
            Steps whose figures were recorded; one more may have begun.
        seen
            Passes that these steps are of.

        Returns
        -------
        bool
            Whether more steps have begun than `state` knows of.

        Raises
        ------
        UsageError
            If it is none, says that more was spent than there was, or does not know of all passes that were seen.
        """
        try:
            assert state is not None
            decided = [Look(float(precision), float(scale)) for precision, scale in state["decided"]]
            losses = [(float(total), int(steps)) for total, steps in state["losses"]]
            begun = int(state["begun"])
        except (AssertionError, KeyError, TypeError, ValueError):
            raise UsageError(
                "the checkpoint does not say what its looks have told; it cannot be gone on with"
            ) from None
        if seen > len(decided):  # a checkpoint before the last, as that is damaged
            raise UsageError(
                f"the checkpoint knows of {len(decided)} looks at the texts, {seen} were taken: what the others have "
                "told is lost, so the training cannot be gone on with; begin anew, in another --output"
            )
        self.budget = LookBudget(self.planned, tuple(look.precision for look in decided[: self.planned]))
        self.decided, self._losses = decided, losses
        if decided:
            self._protect(None, self._lasting(decided[-1].scale))
        self.begun = max(self.begun, begun, recorded + 1)
        return self.begun > begun
