"""Which mechanism, how strong: what keeps an attack below a target at the least cost in what the model is worth.

Of each family of mechanisms the strength is bisected by what the attack is measured to read: the upper end of its
interval has to be at most the target. Among the families that get there, the one with the least loss is the answer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from fedsea.audit.attacks import FLOOR
from fedsea.audit.observe import Progress
from fedsea.audit.plan import Plan, SessionPlan
from fedsea.audit.report import share
from fedsea.audit.run import Auditor
from fedsea.audit.scores import Score
from fedsea.audit.utility import protected_model
from fedsea.checkpoints import Checkpoint
from fedsea.errors import UsageError
from fedsea.parts import InputBlocks
from fedsea.privacy import Magnitude, Noise, Unit, parse_mechanism
from fedsea.privacy.measure import measure_magnitude
from fedsea.tasks import Example, Task, evaluate

START, LEAST, MOST = 8.0, 2.0**-4, 512.0  # multiples of the mean |h_A|


@dataclass(frozen=True)
class Goal:
    """What a calibration has to reach; UsageError if a number cannot be used, or the attack looks at nothing."""

    max_recovery: float  # the largest share of tokens that the attack may read, above 0 and below 1
    attack: str = "search"
    precision: float = 0.1  # strengths whose ratio is below 1 + this are not told apart

    def __post_init__(self) -> None:
        if not 0 < self.max_recovery < 1:
            raise UsageError(f"the largest recovery must be above 0 and below 1, as 0.05; got {self.max_recovery}")
        if not self.precision > 0:
            raise UsageError(f"the precision must be a number above 0; got {self.precision}")
        if self.attack == FLOOR:
            raise UsageError(f"{FLOOR} looks at nothing that is sent, so no strength changes it; choose another attack")


@dataclass(frozen=True)
class Trial:
    """What the attack read under one mechanism."""

    mechanism: str  # as users write it
    recovery: Score  # share of tokens that it read: of the texts or of their answers, whichever is more
    loss: float | None  # the client's cross entropy of the same texts, nats a token
    any_attacker: float | None  # the estimated bound on what any attack reads


@dataclass(frozen=True)
class Outcome:
    """What became of one family."""

    family: str  # the mechanism, with some strength
    trials: tuple[Trial, ...]  # in the order in which they were made
    found: Trial | None  # the weakest that meets the target; None if none does
    cost: float | None  # cross entropy under it, nats a token: of the task's right answers, else of the texts
    metrics: dict[str, float]  # the task's, under it; empty without a task
    reason: str  # why none meets the target
    useless: bool = False  # whether it takes the model to blind guessing, or beyond


@dataclass(frozen=True)
class Calibration:
    """What a calibration found."""

    goal: Goal
    outcomes: tuple[Outcome, ...]  # of each family
    unprotected: float | None  # the cost without any mechanism; None if there is nothing to measure it on
    unprotected_metrics: dict[str, float]
    blind_loss: float  # of blind guessing, nats a token: what costs no less is of no use

    @property
    def best(self) -> Outcome | None:
        """The family that meets the target at the least cost and leaves a model of use; None if none does."""
        met = [outcome for outcome in self.outcomes if outcome.found is not None and not outcome.useless]
        return min(met, key=lambda one: math.inf if one.cost is None else one.cost, default=None)


@dataclass(frozen=True)
class TaskData:
    """What the cost is measured on: a task's examples, and the model's tokenizer."""

    task: Task
    examples: Sequence[Example]
    tokenizer: Any
    max_tokens: int = 512


def calibrate(
    model: str | Checkpoint,
    plan: SessionPlan,
    goal: Goal,
    families: Sequence[Noise],
    data: TaskData | None = None,
    *,
    progress: Progress = lambda _doing, _done, _all: None,
    on_trial: Callable[[Trial], None] = lambda _trial: None,
) -> Calibration:
    """Find the mechanism and the strength that meet a goal.

    Parameters
    ----------
    model, plan, progress
        As `Auditor` takes them.
    goal
        What is to be met.
    families
        Mechanisms whose strength is to be found (`parse_family`).
    data
        What the cost is measured on; None for the texts that are attacked. The model runs whole and in this process
        for it, as it would behind the mechanism.
    on_trial
        Called with each strength that was tried.

    Raises
    ------
    FedSEAError
        Whatever is wrong with the model, the texts or a mechanism.
    """
    auditor = Auditor(model, Plan(**vars(plan) | {"attacks": (goal.attack,)}), progress)
    return _Search(auditor, goal, data, progress, on_trial).calibration(families)


@dataclass
class _Search:
    """A calibration under way: one auditor for all strengths, and what the task is worth."""

    auditor: Auditor
    goal: Goal
    data: TaskData | None
    progress: Progress
    on_trial: Callable[[Trial], None]
    public_loss: float | None = None
    calibrated: dict[str, str] = field(default_factory=dict)  # mechanisms as they were, by what was asked for

    def calibration(self, families: Sequence[Noise]) -> Calibration:
        outcomes = tuple(self._outcome(family) for family in families)
        unprotected, metrics = self._cost(None, self.public_loss)
        return Calibration(self.goal, outcomes, unprotected, metrics, self._blind_loss)

    def _outcome(self, family: Noise) -> Outcome:
        unit = 1.0 if family.unit is Unit.RELATIVE else self._magnitude.mean
        trials: dict[float, Trial] = {}

        def meets(strength: float) -> bool:
            trials[strength] = self._trial(family.with_strength(strength))
            return trials[strength].recovery.high <= self.goal.max_recovery

        least, most = LEAST * unit, MOST * unit
        strength = weakest(meets, start=START * unit, least=least, most=most, precision=self.goal.precision)
        made = tuple(trials.values())
        if strength is None:
            return Outcome(str(family), made, None, None, {}, self._why_not(made[-1]))
        found = trials[strength]
        cost, metrics = self._cost(found.mechanism, found.loss)
        return Outcome(str(family), made, found, cost, metrics, "", cost is not None and cost >= self._blind_loss)

    def _trial(self, noise: Noise) -> Trial:
        report = self.auditor.report(noise)
        self.public_loss, self.calibrated[report.spec] = report.public_loss, report.mechanism
        (finding,) = report.findings
        scores = [score for score in (finding.tokens("prompt"), finding.tokens("answer")) if score is not None]
        if not scores:
            raise UsageError("the texts have no token that is not public; give longer ones")
        trial = Trial(report.spec, max(scores, key=lambda one: one.high), report.loss, report.limits.any_attacker)
        self.on_trial(trial)
        return trial

    def _why_not(self, last: Trial) -> str:
        """Why a target is not reached: what is still read, and what else it may be due to."""
        read, attack = last.recovery, self.goal.attack
        said = f"with {last.mechanism} {attack} still reads {share(read.mean)} (up to {share(read.high)})"
        if attack == "read-out":
            return (
                f"{said}; the provider computes h_B itself, so noise on h_A hides no answer from public output blocks"
            )
        floor = (
            Auditor(self.auditor.checkpoint, replace(self.auditor.plan, attacks=(FLOOR,))).report().guessed("prompt")
        )
        if floor is None or floor.high <= self.goal.max_recovery:
            return said
        guesses = f"{share(floor.mean)} (up to {share(floor.high)})"
        return f"{said}; without looking, the language model alone guesses {guesses}"

    @property
    def _blind_loss(self) -> float:
        return math.log(self.auditor.checkpoint.config.vocab_size)

    @cached_property
    def _magnitude(self) -> Magnitude:
        checkpoint, partition = self.auditor.checkpoint, self.auditor.plan.partition
        return measure_magnitude(InputBlocks.from_checkpoint(checkpoint, partition, dtype=torch.float32), checkpoint)

    def _cost(self, mechanism: str | None, on_texts: float | None) -> tuple[float | None, dict[str, float]]:
        """The task's cross entropy of right answers, nats a token, and all its metrics; without a task, `on_texts`."""
        data, plan = self.data, self.auditor.plan
        if data is None:
            return on_texts, {}
        doing, noise, wire_dtype = "the task, unprotected", parse_mechanism("0"), torch.float32
        if mechanism is not None:
            doing, noise = f"the task, with {mechanism}", parse_mechanism(self.calibrated[mechanism])
            wire_dtype = self.auditor.wire_dtype
        with protected_model(self.auditor.shared.whole, plan.partition, noise, wire_dtype, plan.adapter) as model:
            result = evaluate(
                model,
                data.tokenizer,
                data.task,
                data.examples,
                max_tokens=data.max_tokens,
                answer_loss=True,
                progress=lambda done, every: self.progress(doing, done, every),
            )
        return result.metrics["answer_loss"], result.metrics


def weakest(
    meets: Callable[[float], bool], *, start: float, least: float, most: float, precision: float
) -> float | None:
    """The least strength that meets a condition which stronger ones meet too, to a ratio of 1 + `precision`.

    It has three digits, and is one that was tried. None if `most` does not meet it; `least` if that does.
    """
    low = high = None
    strength = _rounded(start)
    while low is None or high is None:
        if meets(strength):
            high = strength
            if strength <= least:
                return high
        else:
            low = strength
            if strength >= most:
                return None
        strength = _rounded(strength / 2 if low is None else strength * 2)
    while high / low > 1 + precision and (middle := _rounded(math.sqrt(low * high))) not in (low, high):
        if meets(middle):
            high = middle
        else:
            low = middle
    return high


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
