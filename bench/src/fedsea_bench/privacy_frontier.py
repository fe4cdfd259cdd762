"""Whether a mechanism exists under which next to nothing is read and the task is still learnt: leakage against utility.

For each mechanism, strength and seed a model is fine-tuned under it through a real block server, scored under it, and
what it sends is attacked (`privacy_point`). What is judged is the best of all attacks by attackers who know the public
weights and, of a narrow cut, both maps. Beside them is what the client's own blocks do without a provider: a mechanism
that hides everything is worth something only above that.

PLOTS/privacy-frontier.jsonl   a line for each point that is done: read afterwards, so that an interrupted run goes on
PLOTS/privacy-frontier.png     the drawing
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedsea.errors import FedSEAError
from fedsea.tasks import get_task
from fedsea_bench.plots import drawing
from fedsea_bench.privacy_point import ALONE, RANK, Outcome, Point, Size, measure
from fedsea_bench.results import Line
from fedsea_bench.sweep import Sweep
from fedsea_bench.task_case import TaskCase
from fedsea_bench.workbench import Workbench

TASK, LOSS = "cb", "answer_loss"
KEPT, READ = 0.97, 10.0  # of the noise-free score, at least; points above `prior`, at most
FULL = Size(
    steps=120,
    batch_size=4,
    lr=1e-3,
    max_tokens=112,
    examples=None,
    texts=6,
    tokens=24,
    with_adapter=("search",),
    attacks=("prior", "nearest", "search", "search-map", "read-out"),
)
QUICK = Size(
    steps=2, batch_size=2, lr=1e-3, max_tokens=96, examples=4, texts=2, tokens=8, attacks=("prior", "nearest", "search")
)
SEEDS = 3

# Families that are varied in strength, each after so many input layers; `{}` stands for the strength.
Curve = tuple[str, int]
CURVES: Mapping[Curve, Sequence[float]] = {
    ("relative:level={}", 1): (4.5, 10.0),
    ("relative-clipped-gaussian:clip=1,level={}", 1): (10.0, 20.0),
    ("narrow-cut:rank=2+relative-clip:norm=1+relative:level={}", 1): (0.5,),
}
QUICK_CURVES: Mapping[Curve, Sequence[float]] = {
    ("relative:level={}", 1): (10.0,),
    ("narrow-cut:rank=8+relative-clip:norm=1+relative:level={}", 1): (2.0,),
}
NOISE_FREE = Point("", 1)
CUTS_ALONE, QUICK_CUTS_ALONE = ((1, 1), (4, 4)), ((1, 1),)  # input and output blocks of a client that sends nothing


@dataclass(frozen=True)
class Place:
    """Where a mechanism of some strength, or a client alone, is: over the seeds, beside training without noise."""

    point: Point  # of the first seed
    outcomes: tuple[Outcome, ...]  # one a seed
    kept: float  # its mean score, as a share of the mean noise-free score of the same seeds
    learnt: float | None  # the same of what is above the most frequent label's; None where noise-free has nothing

    @property
    def leaked(self) -> float:
        """Points of token accuracy that the best attack reads above `prior`, mean over the seeds."""
        return statistics.mean(one.above_prior for one in self.outcomes)

    def scores(self, metric: str) -> str:
        scores, losses = (" ".join(f"{one.metrics[name]:.3f}" for one in self.outcomes) for name in (metric, LOSS))
        return f"{metric} {scores}, answer loss {losses}"

    def __str__(self) -> str:
        return f"{self.point.mechanism}, p = {self.point.input_layers}"


def frontier(bench: Workbench) -> Iterator[Line]:
    """Each point, the best of them, and the drawing."""
    quick, data = bench.settings.quick, bench.settings.data
    target = f">= {KEPT:g}"
    name = f"frontier, {TASK}: share of the noise-free score that is kept with at most {READ:g} points read above prior"
    if data is None:
        reason = "give --data, a folder with a folder for CB"
        yield Line.skipped(name, "x", target=target, reason=reason)
        return
    curves, cuts, size, seeds = (
        (QUICK_CURVES, QUICK_CUTS_ALONE, QUICK, 1) if quick else (CURVES, CUTS_ALONE, FULL, SEEDS)
    )
    task = get_task(TASK)
    metric = task.metrics[0]
    case = TaskCase(TASK, data / task.title, bench.settings.model, size.max_tokens, size.examples)
    plots = bench.settings.plots
    kept = plots / "privacy-frontier.jsonl" if plots is not None else None
    sweep = Sweep(kept, {"model": bench.settings.model, "size": asdict(size)}, Point, Outcome)

    def made(point: Point) -> Outcome:
        with bench.step(f"fine-tuning and attacks: {point}"):
            return measure(bench, case, point, size)

    found = {point: sweep.measured(point, made) for point in points(curves, cuts, seeds)}
    free = noise_free(found)
    if not free:
        raise FedSEAError("the training without noise broke off, so there is no score to compare with")
    places = places_of(found, metric)
    protected, alone = ([one for one in places if (one.point.mechanism == ALONE) is lone] for lone in (False, True))
    words = _words(bench, size, list(free.values()), metric)
    yield from (_line(place, metric, words) for place in protected)
    yield from (_line_alone(place, metric, words) for place in alone)
    yield best_line(name, target, protected)
    yield least_line(protected)
    if plots is not None:
        # What the most frequent label keeps of the score, whatever the question: nothing is learnt for it.
        majority = next(iter(free.values())).majority
        constant = majority / (statistics.mean(one.metrics[metric] for one in free.values()) or 1.0)
        draw(curves, protected, alone, constant, plots / "privacy-frontier.png", bench.settings.model)


def points(curves: Mapping[Curve, Sequence[float]], cuts: Sequence[tuple[int, int]], seeds: int) -> Iterator[Point]:
    """All of them: a first seed of everything, then a second."""
    for seed in range(seeds):
        yield Point(NOISE_FREE.mechanism, NOISE_FREE.input_layers, seed)
        for input_layers, output_layers in cuts:
            yield Point(ALONE, input_layers, seed, output_layers)
        for (family, input_layers), strengths in curves.items():
            for strength in strengths:
                yield Point(family.format(f"{strength:g}"), input_layers, seed)


def noise_free(found: Mapping[Point, Outcome]) -> dict[int, Outcome]:
    return {point.seed: one for point, one in found.items() if not point.mechanism and not one.error}


def places_of(found: Mapping[Point, Outcome], metric: str) -> list[Place]:
    """Of everything that was trained to the end with a seed of which the training without noise was, too."""
    free = noise_free(found)
    by_place: dict[Point, dict[int, Outcome]] = {}
    for point, one in found.items():
        if point.mechanism and point.seed in free and not one.error:
            by_place.setdefault(replace(point, seed=0), {})[point.seed] = one
    places = []
    for point, outcomes in by_place.items():
        score = statistics.mean(one.metrics[metric] for one in outcomes.values())
        without = statistics.mean(free[seed].metrics[metric] for seed in outcomes)
        majority = free[next(iter(outcomes))].majority
        learnt = (score - majority) / (without - majority) if without > majority else None
        kept = score / without if without else 0.0  # where nothing was learnt, nothing is kept
        places.append(Place(point, tuple(outcomes.values()), kept, learnt))
    return places


def _line(place: Place, metric: str, words: str) -> Line:
    first = place.outcomes[0]
    read = ", ".join(f"{name} {statistics.mean(one.read[name] for one in place.outcomes):.3f}" for name in first.read)
    known = [value for one in place.outcomes if (value := one.above_prior_with_adapter) is not None]
    above = f", {place.learnt:.2f} of what that has above the most frequent label" if place.learnt is not None else ""
    parts = [
        f"{place.kept:.3f} of the noise-free {metric} kept{above}",
        place.scores(metric),
        f"read: {read} (best: {first.best})",
        f"{statistics.mean(known):.1f} points with the adapter known" if known else "",
        f"bound {max(one.bound for one in place.outcomes):.2f} ({max(one.bits for one in place.outcomes):.2f} bits)",
        words,
    ]
    points = [one.above_prior for one in place.outcomes]
    name = f"frontier, {place}: points that the best attack reads above prior"
    return Line.of(name, place.leaked, "points", samples=points, conditions="; ".join(filter(None, parts)))


def _cuts(place: Place) -> str:
    return f"the client alone, p = {place.point.input_layers}, q = {place.point.output_layers}"


def _line_alone(place: Place, metric: str, words: str) -> Line:
    said = f"nothing is sent: a mechanism that hides the text must do better; {place.scores(metric)}; {words}"
    return Line.of(f"frontier, {_cuts(place)}: share of the score kept", place.kept, "x", conditions=said)


def best_line(name: str, target: str, places: Sequence[Place]) -> Line:
    """What is kept of the score where next to nothing is read."""
    hidden = [place for place in places if place.leaked <= READ]
    if not hidden:
        least = min(places, key=lambda place: place.leaked, default=None)
        reason = f"no mechanism keeps the attacks that low; the least is {least.leaked:.1f} ({least})" if least else ""
        return Line.skipped(name, "x", target=target, reason=reason or "every training broke off")
    best = max(hidden, key=lambda place: place.kept)
    note = f"{best}: {best.leaked:.1f} points read; {len(best.outcomes)} seeds; best of {len(hidden)} such"
    return Line.of(name, best.kept, "x", target=target, conditions=note)


def least_line(places: Sequence[Place]) -> Line:
    """What is read where nearly all of the score is kept."""
    name = f"frontier, {TASK}: least points read above prior where {KEPT:.0%} of the noise-free score is kept"
    good = [place for place in places if place.kept >= KEPT]
    if not good:
        return Line.skipped(name, "points", target=f"<= {READ:g}", reason="no mechanism keeps so much")
    best = min(good, key=lambda place: place.leaked)
    above = [one.above_prior for one in best.outcomes]
    note = f"{best}: {best.kept:.3f} kept; least of {len(good)} such points"
    return Line.of(name, best.leaked, "points", target=f"<= {READ:g}", samples=above, conditions=note)


def _words(bench: Workbench, size: Size, free: Sequence[Outcome], metric: str) -> str:
    without, losses = (" ".join(f"{one.metrics[name]:.3f}" for one in free) for name in (metric, LOSS))
    return (
        f"without noise {without}, loss {losses}; most frequent label {free[0].majority:.3f}; "
        f"{size.steps} steps of {size.batch_size} texts of at most {size.max_tokens} tokens, lr {size.lr:g}, LoRA of "
        f"rank {RANK} on {', '.join(size.modules)} of all parts, {size.dtype}; "
        f"attacked: {size.texts} validation texts, {size.tokens} tokens each after the template, in float32; "
        f"{bench.settings.model}"
    )


def draw(
    curves: Mapping[Curve, Sequence[float]],
    protected: Sequence[Place],
    alone: Sequence[Place],
    constant: float,
    path: Path,
    model: str,
) -> None:
    """Draw leakage against utility, a curve a family, as a PNG; `constant` is what one answer to everything keeps."""
    with drawing(path, 7.5, 5) as ((axes,),):
        axes.fill_between([KEPT, 10], -10, READ, color="tab:green", alpha=0.15, label="the target")
        axes.axhline(READ, color="grey", linestyle="--", linewidth=1)
        axes.axvline(KEPT, color="grey", linestyle="--", linewidth=1)
        axes.axvline(constant, color="grey", linestyle=":", linewidth=1, label="always the most frequent label")
        for (family, input_layers), strengths in curves.items():
            by_point = {Point(family.format(f"{strength:g}"), input_layers): strength for strength in strengths}
            mine = [place for place in protected if place.point in by_point]
            if mine:
                style, label = "s-" if family.startswith("relative:") else "o-", family.format("…")
                shown = ([place.kept for place in mine], [place.leaked for place in mine])
                axes.plot(*shown, style, label=f"{label}, p = {input_layers}")
            for place in mine:
                at, strength = (place.kept, place.leaked), f"{by_point[place.point]:g}"
                axes.annotate(strength, at, (4, 4), textcoords="offset points", fontsize=7)
        for place, marker in zip(alone, "*Pd", strict=False):
            axes.plot([place.kept], [0.0], marker, color="black", label=f"{_cuts(place)}: nothing sent")
        shares = [place.kept for place in (*protected, *alone)]
        axes.set(
            xlabel=f"share of the noise-free score kept ({TASK})",
            ylabel="read above prior by the best attack (points of token accuracy)",
            title=f"{model}, fine-tuned under the mechanism",
            ylim=(-5, 105),
            xlim=(min([0.5, *shares]) - 0.03, max([1.0, *shares]) + 0.05),
        )
        axes.legend(fontsize="x-small", loc="center left")
