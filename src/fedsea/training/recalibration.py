"""Adaptive noise: a noise of its own for each epoch, at a leakage that does not depend on how it is divided.

A text that is learnt from is seen once in each epoch. How much that tells depends on the ratio of clip to noise alone.
Call `p`, the precision of an epoch, the square of that ratio, in units of that at the level which the user has set. `N`
epochs with `p_1 + ... + p_N = N` tell no more than `N` epochs at that level:

- Of states that stay the same, the noise of all epochs together is that of one of variance `s^2 / (p_1 + ... + p_N)`.
- Of states that change, the bits of each epoch add up. `log(1 + p * x)` is concave in `p`: equal epochs tell the most.
- Epsilon depends on the sum of `p` alone. It stays so where `p` is chosen in sight of the epochs before (Feldman and
  Zrnic, Individual Privacy Accounting via a Renyi Filter, 2021).

So the sum is what `PrecisionBudget` keeps. All texts of an epoch have the same `p`: a schedule by steps would tell more
of those texts that come in the precise steps. Clip and noise grow or shrink together where they follow the size of
states. What is decided for an epoch is on disk before any text leaves under it, so a crash does not spend it again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsea.client import SplitModelForCausalLM
from fedsea.errors import UsageError
from fedsea.privacy import AdaptiveGaussianNoise, Magnitude, Noise, adaptive_part
from fedsea.training.callback import Callback

FLOOR = 0.25  # each epoch's precision at least, so that none is wasted behind noise that nothing is learnt through
GRAIN = 2**20  # precisions are multiples of 1 / GRAIN, so that sums are exact
SCALE_STEP = 0.25  # scales are powers of two, in such steps of the exponent
SCALE_STEPS = 32  # in either direction: all that a scale can tell of what it was measured on is one of 65 values
FIRST_OVER_LAST = 4.0  # late precision costs: `fedsea bench privacy --only adaptive`
PROGRESS = 0.01  # by which share the loss has to be lower than an epoch before, or else it stagnates
FINER = 2.0  # by which the next epoch's share, relative to those after it, is larger then


@dataclass(frozen=True)
class Update:
    """How the noise of an epoch differs from that of the level."""

    precision: float  # the noise's variance is divided by it
    scale: float  # clip and noise are multiplied by it, as the states have become larger or smaller


class PrecisionBudget:
    """What the planned epochs have told, and what is left, in units of one epoch at the level.

    Whatever is wanted, `spent`, the precision of each epoch that was begun, never sums up to more than their number; a
    UsageError if it does already.
    """

    def __init__(self, epochs: int, spent: tuple[float, ...] = ()) -> None:
        if len(spent) > epochs or sum(spent) > epochs or any(not 0 < one <= epochs for one in spent):
            raise UsageError(f"{sum(spent):g} of {epochs} epochs are spent, in {len(spent)}; begin the training anew")
        self.epochs, self.spent = epochs, list(spent)

    @property
    def left(self) -> float:
        """What all further planned epochs may tell together."""
        return self.epochs - sum(self.spent)

    @property
    def later(self) -> int:
        """Planned epochs that were not begun."""
        return self.epochs - len(self.spent)

    def spend(self, share: float) -> float:
        """The precision of the next planned epoch: a share, in [0, 1], of what is left, so that all have `FLOOR`."""
        assert self.later > 0, "no epoch is left"
        most = self.left - FLOOR * (self.later - 1)
        wanted = self.left if self.later == 1 else self.left * share
        precision = math.floor(min(max(wanted, FLOOR), most) * GRAIN) / GRAIN
        self.spent.append(precision)
        return precision


class Recalibration(Callback):
    """Recalibrates adaptive noise before each epoch, by how far the training is, its loss, and the size of its states.

    Parameters
    ----------
    model, mechanism
        The model that is trained, and the adaptive part of its mechanism.
    first_over_last
        Precision of the first planned epoch over that of the last, were the loss to fall all the time; in between in
        equal steps of its logarithm.
    """

    def __init__(
        self, model: SplitModelForCausalLM, mechanism: AdaptiveGaussianNoise, first_over_last: float = FIRST_OVER_LAST
    ) -> None:
        self._model, self._spec, channel = model, model.protection.spec, model.noise.channel
        # What the states were measured to be when the model was loaded.
        self._loaded = Magnitude(channel.std / (mechanism.level or 1.0), channel.clip / mechanism.clip)
        self._first_over_last = first_over_last
        self.budget = PrecisionBudget(mechanism.epochs)
        self.updates: list[Update] = []  # of each epoch that was begun; of those beyond the planned ones, too
        self.begun = 0  # steps that have begun, so that their texts may have been seen
        self._losses: list[tuple[float, int]] = []  # of each epoch: the sum over its steps, and how many there were

    def begin(self, steps: int, epochs: int) -> str:
        """Says so if the training takes another number of epochs than are planned."""
        planned = self.budget.epochs
        if epochs == planned:
            return ""
        rest = "those beyond have the noise of its level. To divide it over all"
        if epochs < planned:
            rest = "what is left stays unspent. To use it"
        return f"{steps} steps are {epochs} epochs, the mechanism plans for {planned}; {rest}: epochs={epochs}"

    def before_step(self, step: int, epochs: range) -> bool:
        """Set the noise of a step, after deciding the updates of its epochs that are new.

        Texts of two epochs in one step have the coarser noise of the two, so none is seen better than it is to be. A
        step that is done again tells more of its texts, so it is no finer than the level.
        """
        new = len(self.updates) < epochs.stop
        while len(self.updates) < epochs.stop:
            scale = rounded_scale(self._model.protection.measure().norm / self._loaded.norm)
            self.updates.append(Update(self.budget.spend(self._share()) if self.budget.later else 1.0, scale))
        precisions = [self.updates[number].precision for number in epochs]
        if step < self.begun:
            precisions.append(1.0)
        self.begun = max(self.begun, step + 1)
        scale = self.updates[epochs[-1]].scale
        self._protect(self._noise(Update(min(precisions), scale)), self._noise(Update(1.0, scale)))
        return new

    def after_step(self, epochs: range, loss: float) -> None:
        """Count the loss for the epoch in which the step began."""
        while len(self._losses) <= epochs.start:
            self._losses.append((0.0, 0))
        total, steps = self._losses[epochs.start]
        self._losses[epochs.start] = (total + loss, steps + 1)

    def end(self) -> None:
        """All that leaves from now on has the strength of the level."""
        self._protect(None, self._model.noise)

    def state(self) -> dict[str, Any]:
        """What was decided, what the losses were, and which steps have begun."""
        updates = [[update.precision, update.scale] for update in self.updates]
        losses = [list(one) for one in self._losses]
        return {"recalibration": {"updates": updates, "losses": losses, "begun": self.begun}}

    def load(self, state: Mapping[str, Any], step: int, recorded: int, epochs: int) -> str:
        """Go on with what is left; a UsageError if the checkpoint does not say what was spent, or says too much."""
        try:
            held = state.get("recalibration") or state["looks"]  # as version 0.2.0 wrote it
            pairs = held["updates"] if "updates" in held else held["decided"]
            updates = [Update(float(precision), float(scale)) for precision, scale in pairs]
            losses = [(float(total), int(steps)) for total, steps in held["losses"]]
            begun = int(held["begun"])
        except (KeyError, TypeError, ValueError):
            why = "the checkpoint does not say how precise its noise was"
            raise UsageError(f"{why}; the training cannot be resumed from it") from None
        if epochs > len(updates):  # a checkpoint before the last, as that is damaged
            why = f"the checkpoint knows of {len(updates)} epochs, {epochs} were begun: it lacks the others' noise"
            raise UsageError(f"{why}, so the training cannot be resumed; begin anew, in another --output")
        planned = self.budget.epochs
        self.budget = PrecisionBudget(planned, tuple(update.precision for update in updates[:planned]))
        self.updates, self._losses = updates, losses
        if updates:
            self._protect(None, self._noise(Update(1.0, updates[-1].scale)))
        self.begun = max(self.begun, begun, recorded + 1)
        if self.begun == begun or recorded == step:
            return ""
        again = f"steps {step + 1} to {recorded} are done again"
        return f"{again}, with the level's noise at least: a further look at their texts"

    def _protect(self, training: Noise | None, lasting: Noise) -> None:
        """Protect forward passes of the training, and what else leaves (chat, evaluation)."""
        protection = self._model.protection
        protection.noise, protection.in_training = lasting, training

    def _noise(self, update: Update) -> Noise:
        return self._spec.updated(update.precision, update.scale).calibrated(lambda: self._loaded)

    def _share(self) -> float:
        """Of what is left, for the next planned epoch."""
        number, steps = len(self.updates), max(1, self.budget.epochs - 1)
        now, *later = (math.pow(self._first_over_last, -after / steps) for after in range(self.budget.later))
        now *= FINER if self._stagnates(number) else 1.0
        return now / (now + math.fsum(later))

    def _stagnates(self, number: int) -> bool:
        """Whether the epoch before `number` has hardly a lower loss than the one before it."""
        means = [total / steps for total, steps in self._losses[max(0, number - 2) : number] if steps]
        return len(means) == 2 and not means[1] < (1 - PROGRESS) * means[0]


def recalibration_of(model: SplitModelForCausalLM) -> Recalibration | None:
    """That of a model whose mechanism is adaptive; None for any other."""
    mechanism = adaptive_part(model.protection.spec)
    return Recalibration(model, mechanism) if mechanism is not None else None


def rounded_scale(ratio: float) -> float:
    """How much larger states have become, as one of few values.

    States depend on weights, and those on the texts that were learnt from: what follows them should tell little.
    A ratio that is no positive number counts as 1: the training itself says what is wrong with such states.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        return 1.0
    steps = round(math.log2(ratio) / SCALE_STEP)
    return float(2.0 ** (SCALE_STEP * max(-SCALE_STEPS, min(SCALE_STEPS, steps))))
