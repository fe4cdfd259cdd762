"""Line charts for an audit's page: what is read, and what it costs, over the strength of a mechanism.

What stands where is computed here; `page.html.j2` draws it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedsea.audit.report import Part, Report
from fedsea.privacy import parse_mechanism

WIDTH, HEIGHT = 640, 300
LEFT, TOP, BOTTOM = 56, 14, 50
FLOOR = HEIGHT - BOTTOM  # height of the horizontal axis
SIGN = 30  # what stands before a curve's name
CHARACTER = 7.0  # width of a label's character, at most on average, in any sans-serif font
LINE = 14  # height of a label
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "1 2")
# A disc, a square, a triangle, a diamond; and, not filled, a ring and a cross.
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
    "M-3.5 -3.5h7v7h-7z",
    "M0 -4.5l4.5 8h-9z",
    "M0 -5l5 5l-5 5l-5 -5z",
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
    "M-4 -4l8 8m0 -8l-8 8",
)
PARTS: dict[Part, str] = {
    "prompt": "Share of the text's tokens that is read",
    "answer": "Share of the answer's tokens that is read",
}


@dataclass(frozen=True)
class Curve:
    """A line of a chart."""

    name: str  # stands at its end
    points: Sequence[tuple[float, float, float, float]]  # (strength, low, value, high), by rising strength
    bound: bool = False  # drawn grey, without markers


class Chart:
    """Where the parts of a chart stand. Strengths run evenly up to about 1 and logarithmically from there."""

    width, height, left, top, floor, dashes, markers = WIDTH, HEIGHT, LEFT, TOP, FLOOR, DASHES, MARKERS

    def __init__(self, title: str, y_label: str, curves: Sequence[Curve], *, percent: bool = False) -> None:
        self.title, self.y_label, self.curves, self._percent = title, y_label, curves, percent
        points = [point for curve in curves for point in curve.points]
        self.edge = WIDTH - SIGN - max((CHARACTER * len(curve.name) for curve in curves), default=0)
        self._strengths = sorted({point[0] for point in points})
        self._most = 1.0 if percent else rounded_up(max((point[3] for point in points), default=1.0))

    def x(self, strength: float) -> float:
        """Where a strength stands."""
        widest = math.log1p(self._strengths[-1]) or 1.0
        return LEFT + math.log1p(strength) / widest * (self.edge - LEFT)

    def y(self, value: float) -> float:
        """Where a value stands."""
        return TOP + (1 - min(value, self._most) / self._most) * (FLOOR - TOP)

    @property
    def rows(self) -> Iterator[tuple[float, str]]:
        """Height and label of each horizontal line."""
        for value in (self._most * step / 4 for step in range(5)):
            yield self.y(value), f"{100 * value:.0f} %" if self._percent else f"{value:.3g}"

    @property
    def columns(self) -> Iterator[tuple[float, str]]:
        """Place of each strength, and its label; empty where there is no room for it."""
        free = -math.inf
        for strength in self._strengths:
            x, label = self.x(strength), f"{strength:.3g}"
            shown = x > free
            free = x + CHARACTER * (len(label) + 1) if shown else free
            yield x, label if shown else ""

    @property
    def labels(self) -> list[float]:
        """Height of each curve's name."""
        return spaced([self.y(curve.points[-1][2]) for curve in self.curves], TOP + 4, FLOOR)


def frontiers(reports: Sequence[Report]) -> Iterator[tuple[str, list[Chart]]]:
    """Charts for each mechanism that was audited at several strengths, by its name."""
    families: dict[str, list[Report]] = {}
    for report in sorted(reports, key=lambda one: one.noise_level):
        families.setdefault(parse_mechanism(report.spec).family, []).append(report)
    for name, rising in sorted(families.items()):
        if len({report.noise_level for report in rising}) > 1:
            yield name, list(_charts(rising))


def _charts(reports: Sequence[Report]) -> Iterator[Chart]:
    for part, title in PARTS.items():
        curves = list(_attacks(reports, part))
        limits = [(one.noise_level, one.limits.any_attacker) for one in reports] if part == "prompt" else []
        if (bound := _flat("any attacker, at most (estimate)", limits, bound=True)).points:
            curves.append(bound)
        if curves:
            yield Chart(title, "tokens read", curves, percent=True)
    ours = _flat("with this protection", [(one.noise_level, one.loss) for one in reports])
    public = _flat("public model, unprotected", [(one.noise_level, one.public_loss) for one in reports], bound=True)
    if ours.points and public.points:
        yield Chart("Loss of the model on the same texts", "nats a token", [ours, public])


def _attacks(reports: Sequence[Report], part: Part) -> Iterator[Curve]:
    for name in [finding.attack for finding in reports[0].findings]:
        found = [(one.noise_level, finding.tokens(part)) for one in reports if (finding := one.finding(name))]
        points = [(level, score.low, score.mean, score.high) for level, score in found if score is not None]
        if points:
            yield Curve(name, points)


def _flat(name: str, values: Sequence[tuple[float, float | None]], *, bound: bool = False) -> Curve:
    return Curve(name, [(level, one, one, one) for level, one in values if one is not None], bound)


def rounded_up(value: float) -> float:
    """The top of an axis of four equal steps: at least `value`, and each step a number that is easily read."""
    step = value / 4 or 1.0
    unit = 10.0 ** math.floor(math.log10(step))
    return next(4 * unit * factor for factor in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10, 20) if unit * factor >= step)


def spaced(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Where labels go that should stand at `heights` but must not stand on each other: in the same order, spread."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    found = list(heights)
    least = top
    for index in order:
        found[index] = least = max(found[index], least)
        least += LINE
    most = bottom
    for index in reversed(order):
        found[index] = most = min(found[index], most)
        most -= LINE
    return found
