"""Whether any attack reads more than the bound on everybody's attacks allows."""

from collections.abc import Iterator
from pathlib import Path

from fedsea.audit.limits import Limit
from fedsea.audit.report import Report
from fedsea.errors import FedSEAError
from fedsea.privacy import RelativeGaussianNoise, relative_clipped_gaussian
from fedsea_bench.plots import drawing
from fedsea_bench.privacy_case import Case
from fedsea_bench.results import Line
from fedsea_bench.workbench import Workbench

ATTACKS = ("prior", "nearest", "search", "search-map")
CLIP = 0.5  # x the mean length of a state
LEVELS, QUICK_LEVELS = (2.3, 4.5, 10.0, 20.0, 40.0), (4.5, 40.0)


def bound_holds(bench: Workbench) -> Iterator[Line]:
    """Each attack's accuracy beside the bound, over mechanisms and levels."""
    case = Case.of(bench, grid=True)
    levels = QUICK_LEVELS if bench.settings.quick else LEVELS
    points: dict[str, list[tuple[float, Report, Limit]]] = {}
    auditor = case.auditor(bench, attacks=ATTACKS)
    for level in levels:
        for noise in (RelativeGaussianNoise(level), relative_clipped_gaussian(CLIP, level)):
            with bench.step(f"attacks under {noise}"):
                report = auditor.report(noise)
            points.setdefault(str(noise).partition(":")[0], []).append((level, report, _bound(report)))
    for name, rows in points.items():
        above = [max(_accuracies(report).values()) - bound.accuracy for _level, report, bound in rows]
        note = "; ".join(_in_words(*row) for row in rows) + f"; {case.words(bench)}"
        name = f"{name}: the best attack's share of tokens minus the bound's, largest"
        yield Line.largest(name, above, "", target="<= 0", conditions=note)
    if bench.settings.plots is not None:
        draw(points, bench.settings.plots / "leakage-bound.png", bench.settings.model)


def _bound(report: Report) -> Limit:
    bound = report.limits.of_text
    if bound is None:
        raise FedSEAError("the texts are too short to estimate what any attacker could read of them")
    return bound


def _accuracies(report: Report) -> dict[str, float]:
    return {finding.attack: finding.prompt["tokens"].mean for finding in report.findings}


def _in_words(level: float, report: Report, bound: Limit) -> str:
    found = _accuracies(report)
    best = max(found, key=lambda attack: found[attack])
    return f"level {level:g}: {best} {found[best]:.3f}, bound {bound.accuracy:.3f} ({bound.bits:.1f} bits a token)"


def draw(points: dict[str, list[tuple[float, Report, Limit]]], path: Path, model: str) -> None:
    """Draw accuracy over noise level, of each attack and the bound, a panel a mechanism, as a PNG."""
    with drawing(path, 5 * len(points), 4, columns=len(points)) as (row,):
        for axes, (name, rows) in zip(row, points.items(), strict=True):
            levels = [level for level, _report, _bound in rows]
            for attack in ATTACKS:
                axes.plot(levels, [_accuracies(report)[attack] for _level, report, _bound in rows], "o-", label=attack)
            axes.plot(levels, [bound.accuracy for *_rest, bound in rows], "k--", label="bound on any attack")
            labels = {"ylabel": "share of tokens read", "xlabel": "noise level (x mean |h_A|)"}
            axes.set(xscale="log", ylim=(-0.02, 1.02), title=f"{name}, {model}", **labels)
            axes.set_xticks(levels, [f"{level:g}" for level in levels])
            axes.minorticks_off()
            axes.legend(fontsize="small")
