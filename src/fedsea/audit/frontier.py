"""The frontier of a mechanism: what is read, and what it costs, over its strength."""

from collections.abc import Iterator, Sequence
from html import escape

from fedsea.audit.report import Report
from fedsea.audit.svg import Curve, chart
from fedsea.errors import UsageError
from fedsea.privacy import parse_mechanism
from fedsea.privacy.strength import with_strength

X_LABEL = "noise: standard deviation, × mean |h_A| (logarithmic from 1 on)"
PARTS = {"prompt": "Share of the text's tokens that is read", "answer": "Share of the answer's tokens that is read"}


def frontier(reports: Sequence[Report]) -> Iterator[str]:
    """Charts as `<figure>` elements: for each mechanism that was audited at several strengths."""
    families: dict[str, list[Report]] = {}
    for report in reports:
        families.setdefault(family(report.asked), []).append(report)
    for name, members in families.items():
        ordered = sorted(members, key=lambda one: one.noise_level)
        if len({report.noise_level for report in ordered}) < 2:
            continue
        yield f"<h2>Strength, leakage and cost: {escape(name)}</h2>"
        for part, title in PARTS.items():
            curves = [*_attacks(ordered, part), *(_bounds(ordered) if part == "prompt" else [])]
            if curves:
                yield _figure(title, chart(title, X_LABEL, "tokens read", curves, percent=True))
        losses = _losses(ordered)
        if losses:
            title = "Loss of the model on the same texts"
            yield _figure(title, chart(title, X_LABEL, "nats a token", losses))


def family(mechanism: str) -> str:
    """A mechanism without its strength, for a title: `relative-clipped-gaussian:clip=1.0`."""
    try:
        bare = str(with_strength(parse_mechanism(mechanism), 0.0))
    except UsageError:  # it adds no noise
        return mechanism
    for strength in (",level=0.0", ",std=0.0", ":level=0.0", ":std=0.0"):
        bare = bare.replace(strength, "")
    return bare


def _attacks(reports: Sequence[Report], part: str) -> Iterator[Curve]:
    for place, finding in enumerate(reports[0].findings):
        found = [(report.noise_level, getattr(report.findings[place], part).get("tokens")) for report in reports]
        points = [(level, one.low, one.mean, one.high) for level, one in found if one is not None]
        if points:
            yield Curve(finding.attack, points)


def _bounds(reports: Sequence[Report]) -> Iterator[Curve]:
    found = [(report.noise_level, report.limits.of_text) for report in reports]
    points = [(level, one.accuracy, one.accuracy, one.accuracy) for level, one in found if one is not None]
    if points:
        yield Curve("any attacker, at most (estimate)", points, bound=True)


def _losses(reports: Sequence[Report]) -> list[Curve]:
    points = [(one.noise_level, one.loss, one.loss, one.loss) for one in reports if one.loss is not None]
    public = [
        (one.noise_level, one.public_loss, one.public_loss, one.public_loss)
        for one in reports
        if one.public_loss is not None
    ]
    if not points or not public:
        return []
    return [Curve("with this protection", points), Curve("public model, unprotected", public, bound=True)]


def _figure(caption: str, svg: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
