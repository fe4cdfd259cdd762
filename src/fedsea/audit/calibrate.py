"""Which mechanism, how strong: what keeps an attack below a target at the least cost in what the model is worth.

Of each family of mechanisms the strength is bisected by what the attack is measured to read: the upper end of its
interval has to be at most the target. Among the families that get there, the one with the least loss is the answer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedsea.audit.audit import Audits
from fedsea.audit.observe import Progress
from fedsea.audit.plan import Plan
from fedsea.audit.report import FLOOR, Report, share
from fedsea.audit.scores import Score
from fedsea.audit.utility import protected_model
from fedsea.checkpoints import Checkpoint
from fedsea.checkpoints.whole import whole_model
from fedsea.client.dtypes import wire_dtype_for
from fedsea.errors import UsageError
from fedsea.parts import InputBlocks
from fedsea.privacy import Noise
from fedsea.privacy.measure import measure_magnitude
from fedsea.privacy.strength import is_relative, with_strength
from fedsea.tasks import Example, Task, evaluate
from fedsea.training.export import whole_with_adapter

START, LEAST, MOST = 8.0, 2.0**-4, 512.0  # multiples of the mean |h_A|
FAMILIES = ("relative", "relative-clipped-gaussian")


@dataclass(frozen=True)
class Goal:
    """What is asked for.

    Parameters
    ----------
    max_recovery
        The largest share of tokens that the attack may read, above 0 and below 1.
    attack
        Its name.
    precision
        Strengths whose ratio is below 1 + this are not told apart.

    Raises
    ------
    UsageError
        If a number cannot be used, or the attack looks at nothing.
    """

    max_recovery: float
    attack: str = "search"
    precision: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.max_recovery < 1:
            raise UsageError(f"the largest recovery must be above 0 and below 1, as 0.05; got {self.max_recovery}")
        if not self.precision > 0:
            raise UsageError(f"the precision must be a number above 0; got {self.precision}")
        if self.attack == FLOOR:
            raise UsageError(f"{FLOOR} looks at nothing that is sent, so no strength changes it; choose another attack")


@dataclass(frozen=True)
class Trial:
    """What the attack got under one mechanism.

    Attributes
    ----------
    mechanism
        As users write it.
    recovery
        Share of tokens that it read: of the texts or of their answers, whichever it reads more of.
    loss
        The client's cross entropy of the same texts, nats a token.
    any_attacker
        The estimated bound on what any attack reads.
    """

    mechanism: str
    recovery: Score
    loss: float | None
    any_attacker: float | None


@dataclass(frozen=True)
class Outcome:
    """What became of one family.

    Attributes
    ----------
    family
        The mechanism, with some strength.
    trials
        In the order in which they were made.
    found
        The weakest that meets the target; None if none does.
    cost
        Cross entropy under it, nats a token: of the task's right answers, else of the texts.
    metrics
        The task's, under it; empty without a task.
    reason
        Why there is none; empty if there is.
    useless
        Whether it takes the model to blind guessing, or beyond.
    """

    family: str
    trials: tuple[Trial, ...]
    found: Trial | None
    cost: float | None
    metrics: dict[str, float]
    reason: str
    useless: bool = False


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes
    ----------
    outcomes
        Of each family.
    unprotected
        The cost without any mechanism; None if there is nothing to measure it on.
    unprotected_metrics
        The task's.
    blind_loss
        The loss of blind guessing, nats a token: whose cost is no better is of no use.
    """

    goal: Goal
    outcomes: tuple[Outcome, ...]
    unprotected: float | None
    unprotected_metrics: dict[str, float]
    blind_loss: float

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
    plan: Plan,
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
    plan
        The model, its partition and the texts that are attacked; its mechanism and attacks play no part.
    goal
        What is to be met.
    families
        Mechanisms whose strength is to be found (`parse_family`).
    data
        What the cost is measured on; None for the texts that are attacked. The model runs whole and in this process
        for it, as it would behind the mechanism.
    progress
        Told what is done.
    on_trial
        Told of each strength that was tried.

    Raises
    ------
    FedSEAError
        Whatever is wrong with the model, the texts or a mechanism.
    """
    audits = Audits(replace(plan, attacks=(goal.attack,)), progress)
    costs = None if data is None else TaskCosts(audits.checkpoint, plan, data, progress)
    outcomes, public = [], None
    blind = math.log(audits.checkpoint.config.vocab_size)
    for family in families:
        unit = 1.0 if is_relative(family) else _magnitude(audits)
        trials: dict[float, Trial] = {}

        def meets(strength: float, family: Noise = family, trials: dict[float, Trial] = trials) -> bool:
            nonlocal public
            report = audits.under(with_strength(family, strength))
            public = report.public_loss
            trials[strength] = _trial(report, goal.attack)
            on_trial(trials[strength])
            return trials[strength].recovery.high <= goal.max_recovery

        strength = weakest(meets, start=START * unit, least=LEAST * unit, most=MOST * unit, precision=goal.precision)
        if strength is None:
            last = list(trials.values())[-1]
            reason = _why_not(audits, last, goal)
            outcomes.append(Outcome(str(family), tuple(trials.values()), None, None, {}, reason))
            continue
        found = trials[strength]
        cost, metrics = (found.loss, {}) if costs is None else costs.under(with_strength(family, strength))
        useless = cost is not None and cost >= blind
        outcomes.append(Outcome(str(family), tuple(trials.values()), found, cost, metrics, "", useless))
    unprotected, metrics = (public, {}) if costs is None else costs.under(None)
    return Calibration(goal, tuple(outcomes), unprotected, metrics, blind)


def weakest(
    meets: Callable[[float], bool], *, start: float, least: float, most: float, precision: float
) -> float | None:
    """The least strength that meets a condition which stronger ones meet too, to a ratio of 1 + `precision`.

    It has three digits, and is one that was tried. None if `most` does not meet it; `least` if that does.
    """
    low = high = None
    strength = start = _rounded(start)
    while low is None or high is None:
        if meets(strength):
            high = strength
            if strength <= least:
                return high
            strength = strength / 2 if low is None else strength
        else:
            low = strength
            if strength >= most:
                return None
            strength = strength * 2 if high is None else strength
        strength = _rounded(strength)
    while high / low > 1 + precision:
        middle = _rounded(math.sqrt(low * high))
        if middle in (low, high):
            break
        if meets(middle):
            high = middle
        else:
            low = middle
    return high


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _trial(report: Report, attack: str) -> Trial:
    (finding,) = (one for one in report.findings if one.attack == attack)
    scores = [part["tokens"] for part in (finding.prompt, finding.answer) if "tokens" in part]
    if not scores:
        raise UsageError("the texts have no token that not everybody knows; give longer ones")
    limit = report.limits.of_text
    recovery = max(scores, key=lambda one: one.high)
    return Trial(report.asked, recovery, report.loss, None if limit is None else limit.accuracy)


def _why_not(audits: Audits, last: Trial, goal: Goal) -> str:
    """Why a target is not reached: what is still read, and what else it may be due to."""
    recovery = last.recovery
    said = f"with {last.mechanism} {goal.attack} still reads {share(recovery.mean)} (up to {share(recovery.high)})"
    if goal.attack == "read-out":
        return said + "; the provider computes h_B itself, so noise on h_A hides no answer from public output blocks"
    floor = Audits(replace(audits.plan, attacks=(FLOOR,))).under(audits.plan.noise).findings[0].prompt.get("tokens")
    if floor is not None and floor.high > goal.max_recovery:
        said += f"; without looking, the language model alone guesses {share(floor.mean)} (up to {share(floor.high)})"
    return said


def _magnitude(audits: Audits) -> float:
    blocks = InputBlocks.from_checkpoint(audits.checkpoint, audits.plan.partition, dtype=torch.float32)
    return measure_magnitude(blocks, audits.checkpoint)


class TaskCosts:
    """What a task's right answers and its metrics come to under a mechanism.

    Parameters
    ----------
    checkpoint, plan
        The model, and how it is cut; with the plan's adapter.
    data
        The task.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, data: TaskData, progress: Progress) -> None:
        self._plan, self._data, self._progress = plan, data, progress
        blocks = InputBlocks.from_checkpoint(checkpoint, plan.partition, dtype=torch.float32)
        self._magnitude = measure_magnitude(blocks, checkpoint)
        self._model = whole_model(checkpoint, dtype=torch.float32, device="cpu")
        if plan.adapter is not None:
            self._model = whole_with_adapter(self._model, plan.adapter)
        self._wire = wire_dtype_for(plan.wire_dtype, torch.float32)

    def under(self, noise: Noise | None) -> tuple[float, dict[str, float]]:
        """The answers' cross entropy, nats a token, and all metrics; None for no mechanism."""
        if noise is None:
            return self._measured(self._model, "the task, unprotected")
        calibrated = noise.calibrated(lambda: self._magnitude)
        with protected_model(self._model, self._plan.partition, calibrated, self._wire) as model:
            return self._measured(model, f"the task, with {noise}")

    def _measured(self, model: Any, doing: str) -> tuple[float, dict[str, float]]:
        data = self._data
        result = evaluate(
            model,
            data.tokenizer,
            data.task,
            data.examples,
            max_tokens=data.max_tokens,
            answer_loss=True,
            progress=lambda done, every: self._progress(doing, done, every),
        )
        return result.metrics["answer_loss"], result.metrics
