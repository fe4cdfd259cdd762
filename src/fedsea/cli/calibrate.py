"""`fedsea calibrate`: the mechanism and the strength that keep an attack below a target."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.audit import SAMPLES, SessionPlan, read_texts
from fedsea.cli.audit import Looks, Texts
from fedsea.cli.options import AsJson, Model, prepare_torch
from fedsea.cli.spread import spread
from fedsea.cli.terminal import print_json, progress_bar, table, tell
from fedsea.errors import UsageError
from fedsea.flags import Flag, Threads
from fedsea.tasks import get_task

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.audit import Calibration, TaskData, Trial

WIDTH = 120  # where there is no terminal
FAMILIES = ("relative", "relative-clipped-gaussian")


@dataclasses.dataclass(frozen=True)
class CostOptions:
    """What the cost in utility is measured on."""

    task: Annotated[
        str | None,
        Flag(
            "Measure what noise costs on this task, as fedsea evaluate.",
            metavar="TASK",
            default="loss on the attacked texts",
        ),
    ] = None
    data: Annotated[
        str | None, Flag("The task's data: a file, a folder with its splits, or hub:NAME.", metavar="PATH")
    ] = None
    limit: Annotated[int, Flag("Use the first N examples of the validation split only.", min=1, metavar="N")] = 64

    def check(self) -> None:
        """Check that the task has data, and what its score needs."""
        if (self.task is None) != (self.data is None):
            raise UsageError("give --task TASK and --data PATH, both or neither")
        if self.task is not None:
            get_task(self.task).check_packages()

    def read(self, model: str) -> "TaskData | None":
        """The task's examples; None if there is no task."""
        if self.task is None or self.data is None:
            return None
        from fedsea.audit import TaskData
        from fedsea.checkpoints import load_tokenizer

        task = get_task(self.task)
        return TaskData(task, task.read(self.data, "validation")[: self.limit], load_tokenizer(model))


@spread
def calibrate(
    model: Model,
    plan: SessionPlan,
    costs: CostOptions,
    max_recovery: Annotated[
        float, Flag("The largest share of tokens that the attack may read, such as 0.05.", metavar="SHARE")
    ],
    audit_data: Annotated[
        Path | None,
        Flag(
            "Texts to attack: one a line, or a .jsonl file with messages, text, or prompt and answer.",
            metavar="FILE",
            default="a few invented ones",
        ),
    ] = None,
    attack: Annotated[str, Flag("The attack to protect against, as for fedsea audit.", metavar="NAME")] = "search",
    mechanism_family: Annotated[
        list[str] | None,
        Flag(
            "A mechanism whose strength is searched, such as relative-clipped-gaussian:clip=0.5; may be given several "
            "times, to compare.",
            metavar="MECHANISM",
            default=", ".join(FAMILIES),
        ),
    ] = None,
    precision: Annotated[float, Flag("Stop the search where two strengths differ by less than this share.")] = 0.1,
    texts: Texts = None,
    looks: Looks = 1,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Find the --noise under which an attack reads no more of MODEL's texts than a target, at the least cost.

    Attackers do not have the adapter.
    """
    from fedsea.checkpoints.names import check_adapter, check_model
    from fedsea.tasks.metrics import require_rouge

    check_model(model)
    check_adapter(plan.adapter)
    require_rouge()
    attacked = SAMPLES if audit_data is None else read_texts(audit_data)
    costs.check()
    from fedsea.privacy import parse_family

    chosen = [parse_family(one) for one in mechanism_family or FAMILIES]
    data = costs.read(model)
    prepare_torch("cpu", threads)
    from fedsea.audit import Goal
    from fedsea.audit import calibrate as search

    goal = Goal(max_recovery, attack, precision)
    plan = dataclasses.replace(plan, texts=attacked[:texts], observations=looks)
    with progress_bar() as progress:
        found = search(model, plan, goal, chosen, data, progress=progress, on_trial=lambda one: _tell(one, attack))
    if as_json:
        print_json(_as_json(found))
    else:
        _show(found, costs.task)
    if found.best is None:
        raise typer.Exit(1)


def _tell(trial: "Trial", attack: str) -> None:
    from fedsea.audit import share

    got = trial.recovery
    loss = "" if trial.loss is None else f", loss {trial.loss:.2f}"
    between = f"{share(got.low)} … {share(got.high)}"
    tell(f"{trial.mechanism}: {attack} reads {share(got.mean)} ({between}){loss}", prefix="")


def _as_json(found: "Calibration") -> dict[str, Any]:
    from fedsea.audit import finite

    best = found.best
    mechanism = None if best is None or best.found is None else best.found.mechanism
    whole: dict[str, Any] = finite({"mechanism": mechanism, **dataclasses.asdict(found)})
    return whole


def _show(found: "Calibration", task: str | None) -> None:
    from rich.console import Console

    from fedsea.audit import share

    names = [name for name in found.unprotected_metrics if name != "perplexity"]  # the answer loss says it as well
    headings = [f"{found.goal.attack} reads", "any, at most", *(names or ["loss"])]
    shown = table("mechanism", *(f">{name}" for name in headings))
    for column in shown.columns:
        column.no_wrap = True
    for outcome in found.outcomes:
        trial = outcome.found
        if trial is None:
            continue
        got = trial.recovery
        read = [f"{share(got.mean)} (to {share(got.high)})", share(trial.any_attacker)]
        shown.add_row(trial.mechanism, *read, *_figures(names, outcome.metrics, outcome.cost))
    shown.add_row("none", "", "", *_figures(names, found.unprotected_metrics, found.unprotected), style="dim")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(shown)
    where = "the attacked texts" if task is None else f"{task}'s right answers"
    console.print(
        f"\nLoss in nats a token, on {where}; of blind guessing {found.blind_loss:.2f}. “any, at most” is an "
        "estimate for any attacker.",
        style="dim",
    )
    for outcome in found.outcomes:
        if outcome.found is None:
            console.print(f"Not reachable: {outcome.reason}.", markup=False)
        elif outcome.useless:
            console.print(f"Of no use: {outcome.found.mechanism}, as good as blind guessing or worse.", markup=False)
    _conclude(found)


def _conclude(found: "Calibration") -> None:
    from fedsea.audit import OPTIONS

    target = f"at most {100 * found.goal.max_recovery:g} % of the tokens read by {found.goal.attack}"
    best = found.best
    if best is not None and best.found is not None:
        cost = (
            ""
            if best.cost is None or found.unprotected is None
            else (f" It costs: a loss of {best.cost:.2f} instead of {found.unprotected:.2f} nats a token.")
        )
        print(f"\nDecision: send with --noise {best.found.mechanism}\nfor {target}.{cost}")
        print("Other attacks, and the answer, were not tried: fedsea audit does that, with --answer-tokens 32.")
        return
    reached = any(outcome.found is not None for outcome in found.outcomes)
    why = "what reaches it leaves a model of no use" if reached else "not reachable with these mechanisms"
    print(f"\nDecision: do not send. {target[0].upper()}{target[1:]}: {why}.")
    for option in OPTIONS:
        print(f"  – {option}")


def _figures(names: list[str], metrics: dict[str, float], cost: float | None) -> list[str]:
    if metrics:
        return [f"{metrics[name]:.3f}" for name in names]
    return ["–" if cost is None else f"{cost:.2f}"]
