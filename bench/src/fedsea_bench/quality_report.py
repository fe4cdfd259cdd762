"""What the results of `fedsea bench quality` say: means and standard errors, as lines, tables and a drawing."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fedsea.tasks import get_task
from fedsea_bench.peak import MIB
from fedsea_bench.plots import drawing
from fedsea_bench.quality_plan import UNTRAINED, WHOLE, Plan, Results, Setting, results_of
from fedsea_bench.results import Line, Report
from fedsea_bench.training_case import ADAPTER_TEXT
from fedsea_bench.workbench import PARTITION, described

ANSWER_LOSS = "answer_loss"
SPLIT = Setting("split")


@dataclass(frozen=True)
class Summary:
    """A metric over the seeds: a sample each."""

    samples: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.samples)

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for a single seed."""
        if len(self.samples) < 2:
            return None
        return statistics.stdev(self.samples) / math.sqrt(len(self.samples))

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.error:.4f}" if self.error is not None else "")


def summary(results: Results, task: str, setting: Setting, metric: str) -> Summary | None:
    """A metric of a setting; None if there is no result that has it."""
    samples = [found.metrics[metric] for found in results_of(results, task, setting) if metric in found.metrics]
    return Summary(tuple(samples)) if samples else None


def shown_metrics(task: str) -> list[str]:
    """The metrics of a task that are reported: its own, the main one first, and how likely it finds right answers."""
    return list(dict.fromkeys([*get_task(task).metrics, ANSWER_LOSS]))


def lines(plan: Plan, results: Results) -> Iterator[Line]:
    """Per task: whether the split without noise is as good as the whole model, then every metric of every setting."""
    for task in plan.names:
        conditions = _conditions(plan, results, task)
        main = get_task(task).metrics[0]
        if SPLIT in plan.settings:
            yield _comparison(results, task, main, conditions)
        for metric in shown_metrics(task):
            for setting in [UNTRAINED, *plan.settings]:
                name = f"quality, {task}: {metric}, {setting.name}"
                found = summary(results, task, setting, metric)
                if found is None:
                    broke = {made.error for job, made in results.items() if (job.task, job.setting) == (task, setting)}
                    yield Line.skipped(name, "", reason="; ".join(sorted(filter(None, broke))) or "not measured")
                    continue
                error = f"standard error {found.error:.4f} over the seeds; " if found.error is not None else ""
                yield Line.of(name, found.mean, "", samples=found.samples, conditions=error + conditions)
        yield from _memory(plan, results, task)


def _memory(plan: Plan, results: Results, task: str) -> Iterator[Line]:
    """What a process needs that trains the whole model, or a client's layers."""
    case = f"{plan.batch_size} x {plan.max_tokens} tokens"
    note = f"VmHWM of a fresh process that trains {case}; the server is not counted"
    peaks = {one: max((made.memory for made in results_of(results, task, one)), default=0) for one in plan.settings}
    for setting, peak in peaks.items():
        if peak:
            share = f"{100 * peak / peaks[WHOLE]:.1f} % of the whole model's; " if peaks[WHOLE] else ""
            yield Line.of(f"quality, {task}: peak memory, {setting.name}", peak / MIB, "MiB", conditions=share + note)


def _comparison(results: Results, task: str, metric: str, conditions: str) -> Line:
    name, target = f"quality, {task}: |split - whole| in standard errors, {metric}", "<= 1"
    whole, split = summary(results, task, WHOLE, metric), summary(results, task, SPLIT, metric)
    if whole is None or split is None:
        return Line.skipped(name, "", target=target, reason="a training broke off")
    if not whole.error:
        why = "with one seed there is no standard error" if whole.error is None else "the whole model's seeds all agree"
        return Line.skipped(name, "", target=target, reason=f"{why}: split {split}, whole {whole}")
    note = f"split {split}, whole {whole}; standard error of the whole model's seeds; {conditions}"
    return Line.of(name, abs(split.mean - whole.mean) / whole.error, "", target=target, conditions=note)


def _conditions(plan: Plan, results: Results, task: str) -> str:
    first = results_of(results, task, UNTRAINED)[0]
    main = get_task(task).metrics[0]
    layers = f"{plan.cuts} layers at each end" if plan.cuts != "1" else f"partition {described(PARTITION)}"
    said = [
        f"{plan.model}, {plan.dtype} on {plan.device}, {layers}, 16-bit wire; {ADAPTER_TEXT}, "
        f"{plan.steps} steps of {plan.batch_size} examples, lr {plan.lr:g}, cosine, {plan.seeds} seeds; "
        f"{first.count} examples of validation"
    ]
    if main in first.majority:
        whole = summary(results, task, WHOLE, main)
        said.append(f"always the most frequent label: {main} {first.majority[main]:.4f}")
        if whole is not None and whole.mean - (whole.error or 0) <= first.majority[main]:
            said.append("the whole model does not beat that, so this task says nothing about noise")
    return "; ".join(said)


def tables(plan: Plan, results: Results) -> str:
    """A Markdown table a task: settings down, metrics across, mean ± standard error over the seeds."""
    return "\n".join(_table(plan, results, task) for task in plan.names)


def _table(plan: Plan, results: Results, task: str) -> str:
    metrics = shown_metrics(task)
    first = results_of(results, task, UNTRAINED)[0]
    rows = [[f"**{get_task(task).title}** (n = {first.count})", *metrics, "training loss, last steps"]]
    rows.append(["---"] * len(rows[0]))
    if first.majority:
        cells = [f"{first.majority[metric]:.4f}" if metric in first.majority else "–" for metric in metrics]
        rows.append(["most frequent label", *cells, "–"])
    for setting in [UNTRAINED, *plan.settings]:
        shown = [summary(results, task, setting, metric) for metric in metrics]
        ends = [found.last_loss for found in results_of(results, task, setting) if found.last_loss is not None]
        cells = [str(one) if one is not None else "broke off" for one in shown]
        name = f"split, {setting.mechanism}" if setting.mechanism else setting.name.replace("-noise-", ", noise ")
        rows.append([name, *cells, str(Summary(tuple(ends))) if ends else "–"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def report_quality(plan: Plan, results: Results, folder: Path, console: Console) -> Report:
    """Print the lines, write the tables and the drawing into a folder; returns the lines."""
    report = Report(console)
    for line in lines(plan, results):
        report.add(line)
    (folder / "quality.md").write_text(tables(plan, results))
    draw(plan, results, folder / "quality.png")
    console.print(f"Tables are in {folder / 'quality.md'}, the drawing in {folder / 'quality.png'}.", highlight=False)
    return report


def draw(plan: Plan, results: Results, path: Path) -> None:
    with drawing(path, 4.5 * len(plan.names), 4, columns=len(plan.names)) as (row,):
        for axes, task in zip(row, plan.names, strict=True):
            metric = get_task(task).metrics[0]
            points = _points(plan, results, task, metric)
            levels, means = [level for level, _ in points], [one.mean for _, one in points]
            errors = [one.error or 0.0 for _, one in points]
            axes.errorbar(levels, means, yerr=errors, marker="o", capsize=3, label="split")
            for label, style, height in _references(results, task, metric):
                axes.axhline(height, color="grey", linestyle=style, linewidth=1, label=label)
            axes.set(xlabel="noise level (x mean |h_A|)", ylabel=metric, title=f"{get_task(task).title}, {plan.model}")
            axes.legend(fontsize="small")


def _points(plan: Plan, results: Results, task: str, metric: str) -> Sequence[tuple[float, Summary]]:
    split = [one for one in plan.settings if one.kind == "split" and one.cut == 1 and not one.mechanism]
    found = ((setting.level, summary(results, task, setting, metric)) for setting in split)
    return [(level, one) for level, one in found if one is not None]


def _references(results: Results, task: str, metric: str) -> Iterator[tuple[str, str, float]]:
    whole, untrained = (summary(results, task, setting, metric) for setting in (WHOLE, UNTRAINED))
    if whole is not None:
        yield "PEFT on the whole model", "-", whole.mean
    if untrained is not None:
        yield "untrained", ":", untrained.mean
    majority = results_of(results, task, UNTRAINED)[0].majority
    if metric in majority:
        yield "most frequent label", "--", majority[metric]
