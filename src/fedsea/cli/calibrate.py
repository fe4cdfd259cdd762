"""`fedsea calibrate`: the mechanism and the strength that keep an attack below a target."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli.options import AsJson, Model, Threads, WireDtype, prepare_torch, spread
from fedsea.cli.progress import progress_bar
from fedsea.cli.terminal import print_json, tell
from fedsea.errors import UsageError
from fedsea.partition import Partition

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.audit.calibration import Calibration, TaskData, Trial

WIDTH = 120  # where there is no terminal


@dataclasses.dataclass(frozen=True)
class AttackedTexts:
    """Which texts the attack is made on."""

    audit_data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Texts to attack: a line each, or a .jsonl with messages, text, or prompt and answer.",
            show_default="a few made-up ones",
        ),
    ] = None
    texts: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N texts only.", show_default="all")
    ] = None
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of each text at most.")] = 64
    answer_tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="Tokens of an answer to each text, attacked as well.")
    ] = 0
    looks: Annotated[
        int, typer.Option(min=1, metavar="N", help="How often each text is sent, each time with fresh noise.")
    ] = 1


@dataclasses.dataclass(frozen=True)
class CostOptions:
    """What the cost in utility is measured on."""

    task: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="A task, as for fedsea evaluate.", show_default="loss on the attacked texts"),
    ] = None
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Its data: a file, a folder with its splits, or hub:NAME.")
    ] = None
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="The first N examples of its validation split.")] = 64

    def check(self) -> None:
        """Check the task and what its score needs.

        Raises
        ------
        UsageError
            If there is no such task, data are missing, or a package is.
        """
        from fedsea.tasks import get_task

        if (self.task is None) != (self.data is None):
            raise UsageError("give --task TASK and --data PATH, both or neither")
        if self.task is not None:
            get_task(self.task).check_packages()

    def read(self, model: str) -> "TaskData | None":
        """The task's examples; None if there is no task.

        Raises
        ------
        FedSEAError
            If a task or its data is missing, or cannot be read.
        """
        self.check()
        if self.task is None or self.data is None:
            return None
        from fedsea.audit.calibration import TaskData
        from fedsea.checkpoints import load_tokenizer
        from fedsea.tasks import get_task

        task = get_task(self.task)
        return TaskData(task, task.read(self.data, "validation")[: self.limit], load_tokenizer(model))


@spread
def calibrate(
    model: Model,
    attacked: AttackedTexts,
    costs: CostOptions,
    max_recovery: Annotated[
        float, typer.Option(metavar="SHARE", help="The largest share of tokens that may be read, as 0.05.")
    ],
    attack: Annotated[
        str, typer.Option(metavar="NAME", help="The attack to hold off, as for fedsea audit.")
    ] = "search",
    mechanism_family: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="A mechanism whose strength is to be found, as relative-clipped-gaussian:clip=0.5; several times to "
            "compare.",
            show_default="relative, relative-clipped-gaussian",
        ),
    ] = None,
    input_layers: Annotated[int, typer.Option(min=0, help="Decoder layers at the client, after the embedding.")] = 1,
    output_layers: Annotated[int, typer.Option(min=0, help="Decoder layers at the client, before the head.")] = 1,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A PEFT adapter that the client runs with; attackers have none.")
    ] = None,
    wire_dtype: WireDtype = None,
    precision: Annotated[float, typer.Option(help="Strengths whose ratio is below 1 + this are not told apart.")] = 0.1,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Find the --mechanism under which an attack reads no more of MODEL's texts than a target, at the least cost."""
    from fedsea.audit.samples import SAMPLES, read_texts
    from fedsea.checkpoints.names import check_model
    from fedsea.tasks.metrics import require_rouge

    check_model(model)
    require_rouge()
    texts = list(SAMPLES) if attacked.audit_data is None else read_texts(attacked.audit_data)
    costs.check()
    from fedsea.privacy import parse_family

    chosen = [parse_family(one) for one in mechanism_family or ("relative", "relative-clipped-gaussian")]
    data = costs.read(model)
    prepare_torch("cpu", threads)
    from fedsea.audit.calibration import Goal
    from fedsea.audit.calibration import calibrate as search
    from fedsea.audit.plan import Plan

    goal = Goal(max_recovery, attack, precision)
    plan = Plan(
        model=model,
        texts=texts[: attacked.texts],
        partition=Partition(input_layers, output_layers),
        wire_dtype=wire_dtype,
        tokens=attacked.tokens,
        answer=attacked.answer_tokens,
        observations=attacked.looks,
        attacks=(attack,),
        adapter=adapter,
    )
    with progress_bar() as progress:
        found = search(plan, goal, chosen, data, progress=progress, on_trial=lambda one: _tell(one, attack))
    if as_json:
        print_json(_as_json(found))
    else:
        _show(found, costs.task)
    if found.best is None:
        raise typer.Exit(1)


def _tell(trial: "Trial", attack: str) -> None:
    from fedsea.audit.report import share

    got = trial.recovery
    loss = "" if trial.loss is None else f", loss {trial.loss:.2f}"
    between = f"{share(got.low)} … {share(got.high)}"
    tell(f"{trial.mechanism}: {attack} reads {share(got.mean)} ({between}){loss}", prefix="")


def _as_json(found: "Calibration") -> dict[str, Any]:
    from fedsea.audit.report import finite

    best = found.best
    mechanism = None if best is None or best.found is None else best.found.mechanism
    whole: dict[str, Any] = finite({"mechanism": mechanism, **dataclasses.asdict(found)})
    return whole


def _show(found: "Calibration", task: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from fedsea.audit.report import share

    table = Table(box=None, pad_edge=False)
    names = [name for name in found.unprotected_metrics if name != "perplexity"]  # the answer loss says it as well
    for name in ["mechanism", f"{found.goal.attack} reads", "any, at most", *(names or ["loss"])]:
        table.add_column(name, justify="left" if name == "mechanism" else "right", no_wrap=True)
    for outcome in found.outcomes:
        trial = outcome.found
        if trial is None:
            continue
        got, bound = trial.recovery, trial.any_attacker
        shown = [f"{share(got.mean)} (to {share(got.high)})", "–" if bound is None else share(bound)]
        table.add_row(trial.mechanism, *shown, *_figures(names, outcome.metrics, outcome.cost))
    table.add_row("none", "", "", *_figures(names, found.unprotected_metrics, found.unprotected), style="dim")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)
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
    from fedsea.audit.decision import OPTIONS

    target = f"at most {100 * found.goal.max_recovery:g} % of the tokens read by {found.goal.attack}"
    best = found.best
    if best is not None and best.found is not None:
        cost = (
            ""
            if best.cost is None or found.unprotected is None
            else (f" It costs: a loss of {best.cost:.2f} instead of {found.unprotected:.2f} nats a token.")
        )
        print(f"\nDecision: send with --mechanism {best.found.mechanism}\nfor {target}.{cost}")
        print("Other attacks, and the answer, were not looked at: fedsea audit does, with --answer-tokens 32.")
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
