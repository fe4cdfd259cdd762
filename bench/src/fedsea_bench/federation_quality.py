"""How good a federation's adapter is, round by round: beside one training on all the data, and each client alone.

All of them take the same steps: in a round each client takes a few, `BATCH` texts a step; the centralised one takes
steps of all clients' texts together, and a client alone takes its own. What is compared is the score on the whole
validation split, of which the federation's clients have a part each: Flower averages by numbers of examples. All hold
the base model in `DTYPE`, and adapters in float32.
"""

import itertools
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from fedsea.checkpoints import load_whole_model
from fedsea.errors import FedSEAError, UsageError
from fedsea.federation.owner.shards import Sharding, read_shard
from fedsea.server import ServerProcess
from fedsea.tasks import Example, Task, get_task
from fedsea.training.recipe import Recipe
from fedsea_bench.flower_simulation import missing_ray, simulate
from fedsea_bench.plots import drawing
from fedsea_bench.results import Line
from fedsea_bench.task_case import TaskCase
from fedsea_bench.training_case import ADAPTER_TEXT, RANK, adapter_config, train_whole
from fedsea_bench.workbench import Workbench

TASKS = ("cb", "copa")
CLIENTS, ALPHA, BATCH, LR, MAX_TOKENS, SEED, DTYPE = 4, 0.5, 2, 5e-4, 256, 0, "bfloat16"
MODES = ("client-batch", "server-hierarchical")
CENTRALISED, ALONE = "centralised", "alone"
METRICS = ("accuracy", "answer_loss")


@dataclass(frozen=True)
class Curve:
    label: str  # a way to train together (`MODES`), `centralised`, or `alone` and which client
    points: tuple[tuple[int, dict[str, float]], ...]  # rounds, from 0 (untrained), and the scores after them by name
    examples: int  # that it learns from

    def by_round(self, metric: str) -> tuple[list[int], list[float]]:
        return [number for number, _ in self.points], [scores[metric] for _, scores in self.points]

    def last(self, metric: str) -> float:
        return self.points[-1][1][metric]


@dataclass(frozen=True)
class Size:
    """How much is done: rounds, steps in each, rounds from one score to the next, examples of the validation split."""

    rounds: int
    steps: int
    every: int
    examples: int


FULL, QUICK = Size(8, 8, 2, 56), Size(2, 2, 1, 16)


def federation_quality(bench: Workbench) -> Iterator[Line]:
    """Federated, centralised and alone, on each task."""
    data, size = bench.settings.data, QUICK if bench.settings.quick else FULL
    reason = missing_ray() if data is not None else "give --data, a folder with a folder for each task: CB, COPA"
    curves: dict[str, list[Curve]] = {}
    for name in TASKS:
        if reason or data is None:
            yield Line.skipped(f"{' and '.join(MODES)} / {CENTRALISED}, {name}", "", reason=reason)
            continue
        task = get_task(name)
        with tempfile.TemporaryDirectory(prefix="fedsea-bench-") as folder:
            copy = copy_task(task, data / task.title, Path(folder) / task.title, size.examples)
            case = TaskCase(name, copy, bench.settings.model, MAX_TOKENS)
            curves[name] = list(_curves(bench, case, size))
        yield from quality_lines(bench, task, curves[name], size)
        if bench.settings.plots is not None:
            draw_curves(curves, bench.settings.plots / "federation-quality.png", bench.settings.model)


def quality_lines(bench: Workbench, task: Task, curves: Sequence[Curve], size: Size) -> Iterator[Line]:
    """How the federation's last scores compare with the others'; `curves` are as `draw_curves` takes them."""
    together, (centralised, *alone) = curves[: len(MODES)], curves[len(MODES) :]
    sizes = ", ".join(str(curve.examples) for curve in alone)
    conditions = (
        f"{bench.settings.model}, {CLIENTS} clients with {sizes} examples (Dirichlet {ALPHA:g} by label), FedAvg; "
        f"{size.rounds} rounds of {size.steps} steps of {BATCH} texts a client, lr {LR:g}, {ADAPTER_TEXT}, "
        f"base model in {DTYPE}; first {size.examples} of validation; one seed"
    )
    for curve, metric in itertools.product(together, METRICS):
        ratio = curve.last(metric) / centralised.last(metric)
        by_round = "; ".join(
            f"{one.label} {' '.join(f'{scores[metric]:.3f}' for _, scores in one.points)}"
            for one in (curve, centralised)
        )
        name, target = f"{curve.label} / {CENTRALISED}, {task.name}", ">= 0.95" if metric == "accuracy" else "<= 1.1"
        note = f"by round: {by_round}; {conditions}"
        yield Line.of(f"{name}: {metric} after the last round", ratio, "x", target=target, conditions=note)
        lone = [one.last(metric) for one in alone]
        shares = [curve.last(metric) / one for one in lone]
        name, mean = f"{curve.label} / {ALONE}, {task.name}", curve.last(metric) / statistics.mean(lone)
        note = f"alone {', '.join(f'{one:.3f}' for one in lone)}; {conditions}"
        yield Line.of(f"{name}: {metric}, mean of the clients", mean, "x", samples=shares, conditions=note)


def _curves(bench: Workbench, case: TaskCase, size: Size) -> Iterator[Curve]:
    """Those that are trained together, the centralised one, and each client alone."""
    with bench.step(f"loading the whole of {case.model} as {DTYPE}"):
        whole = load_whole_model(case.model, dtype=getattr(torch, DTYPE), device="cpu")
    start, train, title = (0, _scores(case, whole)), case.read("train"), case.task.title
    for mode in MODES:
        with bench.step(f"{title}: {CLIENTS} clients, {mode}, {size.rounds} rounds of {size.steps} steps"):
            yield Curve(mode, (start, *_federated(bench, case, size, mode)), len(train))
    with bench.step(f"{title}: one training on all the data"):
        points = train_in_one_place(case, whole, train, size, BATCH * CLIENTS, size.every)
    yield Curve(CENTRALISED, (start, *points), len(train))
    for number in range(CLIENTS):
        own = read_shard(case.task, str(case.folder), Sharding("dirichlet", number, CLIENTS, SEED, ALPHA))
        with bench.step(f"{title}: client {number} alone, {len(own)} examples"):
            points = train_in_one_place(case, whole, own, size, BATCH, size.rounds)
        yield Curve(f"{ALONE}, client {number}", (start, *points), len(own))


def _federated(bench: Workbench, case: TaskCase, size: Size, mode: str) -> list[tuple[int, dict[str, float]]]:
    how: dict[str, Any] = {"model": case.model, "task": case.name, "mode": mode, "dtype": DTYPE, "seed": SEED}
    how |= {"clients": CLIENTS, "min_clients": CLIENTS, "shards": f"dirichlet={ALPHA}", "eval_every": size.every}
    how |= {"rounds": size.rounds, "local_steps": size.steps, "batch_size": BATCH, "lr": LR, "lora_rank": RANK}
    # No client is left out because it is slow: that is not what is compared.
    how |= {"max_tokens": MAX_TOKENS, "join_seconds": 600.0, "straggler_seconds": 600.0}
    options, threads = ("--dtype", DTYPE), bench.settings.threads
    with (
        tempfile.TemporaryDirectory(prefix="fedsea-bench-") as folder,
        ServerProcess(case.model, threads=threads, secure=False, options=options) as server,
    ):
        reports = simulate(server, case.folder, Path(folder), CLIENTS, **how)
    if len(reports) < size.rounds:
        raise FedSEAError(f"only {len(reports)} of {size.rounds} rounds were done")
    scored = [report for report in reports if report["round"] % size.every == 0]
    for report in scored:
        evaluation = report.get("evaluation", {})
        if len(evaluation.get("clients", ())) < CLIENTS:
            why = "; ".join(f"{name}: {reason}" for name, reason in evaluation.get("dropped", {}).items())
            raise FedSEAError(f"not all clients have evaluated in round {report['round']}: {why or 'not evaluated'}")
    return [(report["round"], report["evaluation"]["metrics"]) for report in scored]


def train_in_one_place(
    case: TaskCase, whole: Any, train: Sequence[Example], size: Size, batch_size: int, every: int
) -> list[tuple[int, dict[str, float]]]:
    """PEFT on the whole model, as the federation's clients train: the scores after every `every` rounds."""
    recipe = Recipe(size.rounds * size.steps, batch_size, lr=LR, schedule="constant", seed=SEED)
    points = []
    torch.manual_seed(SEED)
    model: Any = get_peft_model(whole, adapter_config())

    def evaluate_at(step: int) -> None:
        if step % (every * size.steps) == 0:
            points.append((step // size.steps, _scores(case, model)))

    try:
        train_whole(model, case.batches(batch_size, SEED, train), recipe, evaluate_at)
    finally:
        model.unload()
        whole.eval()
    return points


def _scores(case: TaskCase, model: Any) -> dict[str, float]:
    found = case.evaluation(model).metrics
    return {metric: found[metric] for metric in METRICS}


def copy_task(task: Task, source: Path, folder: Path, examples: int) -> Path:
    """A task's files with a shorter validation split."""
    folder.mkdir()
    for split, limit in (("train", None), ("validation", examples)):
        names = [name for name in task.files[split] if (source / name).is_file()]  # type: ignore[index]
        if not names:
            raise UsageError(f"{source} has no file {' or '.join(task.files[split])}")  # type: ignore[index]
        with (source / names[0]).open() as stream:
            (folder / names[0]).write_text("".join(itertools.islice(stream, limit)))
    return folder


def draw_curves(curves: dict[str, list[Curve]], path: Path, model: str) -> None:
    with drawing(path, 5 * len(curves), 7, columns=len(curves), rows=len(METRICS)) as grid:
        for column, (name, all_curves) in enumerate(curves.items()):
            for row, metric in enumerate(METRICS):
                axes = grid[row][column]
                lone = [curve for curve in all_curves if curve.label.startswith(ALONE)]
                for number, curve in enumerate(lone):
                    label = f"{ALONE} ({len(lone)} clients)" if not number else None
                    axes.plot(*curve.by_round(metric), color="grey", marker=".", linewidth=1, label=label)
                for label, style in ((CENTRALISED, "--"), *zip(MODES, ("-", "-."), strict=True)):
                    curve = next(curve for curve in all_curves if curve.label == label)
                    axes.plot(*curve.by_round(metric), linestyle=style, marker="o", label=label)
                title = f"{get_task(name).title}, {model}" if not row else ""
                axes.set(
                    xlabel="round", ylabel=metric.replace("answer_loss", "answer loss (nats a token)"), title=title
                )
                if metric == "answer_loss":
                    axes.set_yscale("log")  # of one alone it may be many times that of the others
                axes.legend(fontsize="small")
