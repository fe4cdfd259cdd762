"""Line charts as SVG for a page of its own style: shares or losses over a mechanism's strength."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, TOP, BOTTOM = 56, 14, 50
SIGN = 30  # what stands before a curve's name
CHARACTER = 7.0  # width of a label's character, at most on average, in any sans-serif font
LINE = 14  # height of a label
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "1 2")


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes
    ----------
    name
        What stands at its end.
    points
        (strength, low, value, high), by rising strength; low and high are the ends of the error bar.
    bound
        Whether it is drawn as a bound: grey, without markers.
    """

    name: str
    points: Sequence[tuple[float, float, float, float]]
    bound: bool = False


def chart(title: str, x_label: str, y_label: str, curves: Sequence[Curve], *, percent: bool = False) -> str:
    """A chart as an `<svg>` element. Strengths run evenly up to about 1 and logarithmically from there.

    Curves differ in colour (classes `c0`, `c1`, ... of the page's style), in dashes and in markers, and each has its
    name at its end.
    """
    right = SIGN + max((CHARACTER * len(curve.name) for curve in curves), default=0)
    edge = WIDTH - right
    xs = sorted({point[0] for curve in curves for point in curve.points})
    top = 1.0 if percent else rounded_up(max((point[3] for curve in curves for point in curve.points), default=1.0))
    widest = math.log1p(xs[-1]) or 1.0 if xs else 1.0

    def across(x: float) -> float:
        return LEFT + math.log1p(x) / widest * (edge - LEFT)

    def down(y: float) -> float:
        return TOP + (1 - min(y, top) / top) * (HEIGHT - TOP - BOTTOM)

    floor = HEIGHT - BOTTOM
    parts = [f"<title>{escape(title)}</title>"]
    for step in range(5):
        value = top * step / 4
        label = f"{100 * value:.0f} %" if percent else f"{value:.3g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{edge:.1f}" y1="{down(value):.1f}" y2="{down(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(value) + 4:.1f}" text-anchor="end">{label}</text>')
    taken = -math.inf
    for x in xs:
        label = f"{x:.3g}"
        parts.append(f'<line class="axis" x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{floor}" y2="{floor + 4}"/>')
        if across(x) - taken > CHARACTER * (len(label) + 1):
            taken = across(x)
            parts.append(f'<text x="{taken:.1f}" y="{floor + 17}" text-anchor="middle">{label}</text>')
    middle = LEFT + (edge - LEFT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f"translate(13 {TOP + (floor - TOP) / 2:.1f}) rotate(-90)"
    parts.append(f'<text transform="{turned}" text-anchor="middle">{escape(y_label)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{edge:.1f}"/>')
    for number, curve in enumerate(curves):
        kind = "bound" if curve.bound else f"c{number % 6}"
        places = [(across(x), down(low), down(value), down(high)) for x, low, value, high in curve.points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, _low, y, _high in places)
        parts.append(f'<g class="{kind}"><polyline points="{line}" stroke-dasharray="{DASHES[number % 6]}"/>')
        for x, low, y, high in places:
            if low - high > 1:
                parts.append(
                    f'<path d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6"/>'
                )
            if not curve.bound:
                parts.append(_marker(number, x, y))
        parts.append("</g>")
    ends = [down(curve.points[-1][2]) for curve in curves]
    for number, (curve, y) in enumerate(zip(curves, spaced(ends, TOP + 4, floor), strict=True)):
        kind = "bound" if curve.bound else f"c{number % 6}"
        x = edge + 12
        parts.append(f'<g class="{kind}">{"" if curve.bound else _marker(number, x, y)}')
        parts.append(f'<path d="M{x - 8:.1f} {y:.1f}h16" stroke-dasharray="{DASHES[number % 6]}"/>')
        parts.append(f'</g><text x="{x + 14:.1f}" y="{y + 4:.1f}">{escape(curve.name)}</text>')
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg">\n{body}\n</svg>'


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


def _marker(number: int, x: float, y: float) -> str:
    """A sign at a point: a disc, a square, a triangle, a diamond, a ring, a cross."""
    shapes = (
        f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
        f"M{x - 3.5:.1f} {y - 3.5:.1f}h7v7h-7z",
        f"M{x:.1f} {y - 4.5:.1f}l4.5 8h-9z",
        f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z",
        f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
        f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8",
    )
    hollow = ' fill="none"' if number % 6 >= 4 else ' class="full"'
    return f'<path{hollow} d="{shapes[number % 6]}"/>'
