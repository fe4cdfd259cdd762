"""Whether noise with a shape costs the model less than white noise does, where attackers read as much."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch

from fedsea.audit.attack import Attack
from fedsea.audit.attacks.search import Search
from fedsea.audit.attacks.search_map import SearchMap
from fedsea.audit.observation import Knowledge, Subject
from fedsea.audit.utility import protected_model, text_loss
from fedsea.bench.privacy_case import Case, seen
from fedsea.bench.results import Line
from fedsea.bench.workbench import PARTITION, Workbench
from fedsea.privacy import Chain, Clip, Magnitude, Noise, RelativeGaussianNoise, ShapedNoise
from fedsea.privacy.bound import estimated_bound, guaranteed_bound, uniform_source
from fedsea.privacy.calibrate import measure_magnitude, public_states
from fedsea.privacy.shape import Sensitivity

ATTACKS: tuple[type[Attack], ...] = (Search, SearchMap)
LEVELS, QUICK_LEVELS = (4.5, 10.0, 20.0), (10.0,)
DRAWS, QUICK_DRAWS = 8, 2  # of noise, that the loss is averaged over
WHITE = "relative"


class Asked:
    """The block server's answer, which serves all levels."""

    def __init__(self) -> None:
        self._answer: Sensitivity | None = None

    def answer(self, magnitude: Magnitude) -> Sensitivity:
        """What it says; asked for once."""
        if self._answer is None:
            assert magnitude.sensitivity is not None
            self._answer = magnitude.sensitivity()
        return self._answer


@dataclass(frozen=True)
class Shaped(ShapedNoise):
    """`shaped` at several levels, without asking the server each time.

    Parameters
    ----------
    gradient
        False for a shape as if every direction mattered alike to the loss: what the states' covariance is good for.
    """

    asked: Asked = field(default_factory=Asked, compare=False, repr=False)
    gradient: bool = True

    def calibrated(self, measure: Callable[[], Magnitude]) -> Noise:
        """As `shaped` is, to what is remembered."""
        magnitude = measure()

        def remembered() -> Sensitivity:
            found = self.asked.answer(magnitude)
            return found if self.gradient else replace(found, curvature=torch.eye(len(found.covariance)).double())

        return super().calibrated(lambda: Magnitude(magnitude, magnitude.norm, remembered))


def mechanisms() -> dict[str, Callable[[float], Noise]]:
    """What is compared, by name, for any level."""
    asked = Asked()
    return {
        WHITE: RelativeGaussianNoise,
        ShapedNoise.name: lambda level: Shaped(level, asked),
        "shaped without the gradient": lambda level: Shaped(level, asked, gradient=False),
    }


@dataclass(frozen=True)
class Point:
    """A mechanism at a level.

    Attributes
    ----------
    read
        Share of tokens that each attack names.
    loss
        The untrained model's on the same texts, nats a token.
    """

    level: float
    read: tuple[float, ...]
    loss: float

    @property
    def best(self) -> float:
        """What the best attack reads."""
        return max(self.read)


def shaped_costs(bench: Workbench) -> Iterator[Line]:
    """For each mechanism and level what is read and what it costs; then the cost where as much is read."""
    case = Case.of(bench, grid=True)
    levels, draws = (QUICK_LEVELS, QUICK_DRAWS) if bench.settings.quick else (LEVELS, DRAWS)
    attacks = ATTACKS[:1] if bench.settings.quick else ATTACKS
    compared = mechanisms()
    points: dict[str, list[Point]] = {name: [] for name in compared}
    before: Knowledge | None = None
    unprotected = math.nan
    for level in levels:
        for name, make in compared.items():
            with bench.step(f"attacks under {name} at level {level:g}"):
                subjects, knowledge = seen(case.plan(bench, make(level)))
                if before is None:
                    unprotected = _loss(subjects, knowledge, None)
                else:
                    knowledge.take_over(before)
                before = knowledge
                point = Point(level, _read(subjects, knowledge, attacks), _loss(subjects, knowledge, draws))
            points[name].append(point)
            reads = ", ".join(f"{attack.name} {read:.3f}" for attack, read in zip(attacks, point.read, strict=True))
            yield Line.of(
                f"{name} at level {level:g}: share of tokens read by the better search",
                point.best,
                "",
                conditions=f"{reads}; the attacker knows the shape; {case.words(bench)}",
            )
            yield Line.of(
                f"{name} at level {level:g}: loss of the untrained model",
                point.loss,
                "nats a token",
                conditions=f"{unprotected:.3f} without noise; the same texts, {draws} draws of noise",
            )
            guaranteed, estimated = _bits(knowledge)
            yield Line.of(
                f"{name} at level {level:g}: bits a token that a clip at the mean norm guarantees",
                guaranteed,
                "",
                conditions=f"{estimated:.1f} estimated without a clip, for the public text that levels are measured on",
            )
    for name in compared:
        if name == WHITE:
            continue
        pairs = [(point, at_leakage(points[WHITE], point.best)) for point in points[name]]
        both = [(point, white) for point, white in pairs if white is not None]
        ratios = [point.loss / white for point, white in both]
        title = f"{name} / {WHITE}: loss where the better search reads as much"
        if not ratios:
            yield Line.skipped(title, "x", reason=f"{WHITE} reads as much at none of its levels, nor between them")
            continue
        yield Line.median(
            title,
            ratios,
            "x",
            conditions="; ".join(
                f"level {point.level:g}, {point.best:.3f} read: {point.loss:.2f} / {white:.2f}" for point, white in both
            )
            + f"; white noise's between its levels is interpolated; {unprotected:.3f} without noise",
        )
    if bench.settings.plots is not None:
        draw(points, unprotected, bench.settings.plots / "shaped-noise.png", bench.settings.model)


def at_leakage(points: Sequence[Point], read: float) -> float | None:
    """The loss of a mechanism where so much is read, between its points; None outside of them."""
    for one, other in pairwise(sorted(points, key=lambda point: (point.best, -point.loss))):
        if one.best <= read <= other.best:
            share = (read - one.best) / (other.best - one.best) if other.best > one.best else 0.0
            return one.loss + share * (other.loss - one.loss)
    return None


def _read(subjects: Sequence[Subject], knowledge: Knowledge, attacks: Sequence[type[Attack]]) -> tuple[float, ...]:
    known, shares = len(knowledge.start), []
    for kind in attacks:
        attack = kind()
        attack.prepare(knowledge)
        found = attack.run([subject.looks for subject in subjects], knowledge)
        right = [
            guess == token
            for recovery, subject in zip(found, subjects, strict=True)
            for guess, token in zip(recovery.tokens[known:], subject.tokens[known:], strict=True)
        ]
        shares.append(sum(right) / len(right))
    return tuple(shares)


def _loss(subjects: Sequence[Subject], knowledge: Knowledge, draws: int | None) -> float:
    """Mean over draws; None for the model without a mechanism."""
    if draws is None:
        sums = [text_loss(knowledge.whole, subject.tokens) for subject in subjects]
    else:
        with protected_model(knowledge.whole, PARTITION, knowledge.noise, knowledge.wire_dtype) as model:
            sums = [text_loss(model, subject.tokens) for _ in range(draws) for subject in subjects]
    return sum(one for one, _ in sums) / sum(count for _, count in sums)


def _bits(knowledge: Knowledge) -> tuple[float, float]:
    """What states tell: guaranteed behind `relative-clip:norm=1`, and estimated of the public text without it."""
    states = public_states(knowledge.input_blocks, knowledge.checkpoint)[1:]
    clip = Clip(measure_magnitude(knowledge.input_blocks, knowledge.checkpoint).norm)
    source = uniform_source(knowledge.checkpoint.config.vocab_size)
    guaranteed = guaranteed_bound(Chain((clip, knowledge.noise)), states.shape[1], source)
    return guaranteed.bits, estimated_bound(knowledge.noise, states, source).bits


def draw(points: dict[str, list[Point]], unprotected: float, path: Path, model: str) -> None:
    """Draw the loss over what the better search reads, a line a mechanism, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, row in points.items():
        axes.plot([point.best for point in row], [point.loss for point in row], "o-", label=name)
        for point in row:
            axes.annotate(f"{point.level:g}", (point.best, point.loss), textcoords="offset points", xytext=(4, 4))
    axes.axhline(unprotected, color="black", linestyle=":", label="without noise")
    axes.set(xlabel="share of tokens read by the better search", ylabel="loss (nats a token)")
    axes.set_title(f"{model}, by noise level (x mean |h_A|)")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
