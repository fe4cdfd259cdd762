"""The paper's claim, made again: what a learned decoder reads, by noise and by the number of input layers.

The paper (arXiv 2505.15683) trains its attack to give, from each state, the token *after* the state's own, and reports
metrics near zero. That is `paper-decoder`; `decoder` is the same network trained for the state's own token. Both see
the same frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedsea.audit.attacks.decoder import Decoder
from fedsea.audit.attacks.paper_decoder import PaperDecoder
from fedsea.audit.attacks.prior import Prior
from fedsea.audit.scores import Score
from fedsea.partition import Partition
from fedsea.privacy import RelativeGaussianNoise
from fedsea_bench.plots import drawing
from fedsea_bench.privacy_case import PAPER_LEVEL, Case, known
from fedsea_bench.results import SHARE, Line
from fedsea_bench.workbench import Workbench

LEVELS, QUICK_LEVELS = (0.0, 1.0, PAPER_LEVEL, 4.5, 10.0), (0.0, PAPER_LEVEL)
DEPTHS, QUICK_DEPTHS = (0, 1, 2, 3), (0, 1)
STEPS, QUICK_STEPS = 60, 8
NEAR_ZERO = 0.05  # what "near zero" is taken to mean


@dataclass(frozen=True)
class Point:
    """What the decoders read at one noise level, and what is guessed without them."""

    level: float
    ours: Score
    paper: Score
    prior: Score


def paper_claim(bench: Workbench) -> Iterator[Line]:
    """Both decoders at each number of input layers and noise level, and whether the paper's reads nearly nothing."""
    case, quick = Case.of(bench), bench.settings.quick
    steps = QUICK_STEPS if quick else STEPS
    curves: dict[int, list[Point]] = {}
    for p in QUICK_DEPTHS if quick else DEPTHS:
        curves[p] = []
        partition = Partition(p, 1)
        auditor = case.auditor(bench, partition)
        for level in QUICK_LEVELS if quick else LEVELS:
            with bench.step(f"decoders at partition ({p}, 1), noise level {level:g}"):
                observed = auditor.observe(RelativeGaussianNoise(level))
                attacks = (Decoder(steps), PaperDecoder(steps), Prior())
                point = Point(level, *(auditor.attack(one, observed).prompt["tokens"] for one in attacks))
            curves[p].append(point)
            conditions = (
                f"each trained for {steps} steps of 8 x 64 tokens; guessed without them {point.prior.mean:.3f}; "
                f"{case.words(bench, partition)}"
            )
            for attack, found in (("decoder", point.ours), ("paper-decoder", point.paper)):
                name = f"{attack} at p = {p}, noise level {level:g}: share of tokens read"
                yield Line.of(name, found.mean, SHARE, samples=known(found), conditions=conditions)
    yield from _claim(curves)
    if bench.settings.plots is not None:
        draw(curves, bench.settings.plots / "privacy-paper.png", bench.settings.model)


def _claim(curves: dict[int, list[Point]]) -> Iterator[Line]:
    noisy = [point for points in curves.values() for point in points if point.level]
    note = "its metrics are near zero under noise; over all p and levels above 0"
    name = "the paper's claim: share of tokens that its own attack reads under noise, largest"
    read = [point.paper.mean for point in noisy]
    yield Line.largest(name, read, SHARE, target=f"<= {NEAR_ZERO:g}", conditions=note)
    depths = f"p = {', '.join(map(str, curves))}"
    name = "the same attack without any noise: share of tokens read, largest"
    read = [points[0].paper.mean for points in curves.values()]
    note = f"{depths}; where this is near zero too, it is not the noise that does it"
    yield Line.largest(name, read, SHARE, conditions=note)
    read = [point.ours.mean for point in noisy if point.level == PAPER_LEVEL]
    name = f"a decoder trained for the state's own token, at noise level {PAPER_LEVEL:g}: smallest share read"
    yield Line.of(name, min(read), SHARE, samples=read, conditions=f"{depths}, in this order")


def draw(curves: dict[int, list[Point]], path: Path, model: str) -> None:
    """Draw what each decoder reads over the noise level, a panel for each number of input layers, as a PNG."""
    columns = len(curves)
    with drawing(path, 3.2 * columns + 0.6, 3.4, columns=columns, sharey=True) as (grid,):
        title = f"{model}: the paper's attack and the same one trained for the state's own token"
        grid[0].figure.suptitle(title, fontsize="medium")
        for axes, (p, points) in zip(grid, curves.items(), strict=True):
            places = range(len(points))
            for label, style, chosen in (
                ("decoder (own token)", "o-", [point.ours for point in points]),
                ("paper-decoder (next token)", "s-", [point.paper for point in points]),
            ):
                errors = [[one.mean - one.low for one in chosen], [one.high - one.mean for one in chosen]]
                axes.errorbar(places, [one.mean for one in chosen], errors, fmt=style, capsize=2, label=label)
            axes.plot(places, [point.prior.mean for point in points], "k:", label="prior (sees nothing)")
            axes.set(ylim=(-0.03, 1.03), title=f"p = {p}", xlabel="noise level (x mean |h_A|)")
            axes.set_xticks(places, [f"{point.level:g}" for point in points])
        grid[0].set_ylabel("share of tokens read")
        grid[-1].legend(fontsize="x-small", loc="center left")
