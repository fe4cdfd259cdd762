"""`fedsea audit`: what a provider who knows the public weights reads of a text."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.audit import SAMPLES, Plan, attack_names, read_task, read_texts
from fedsea.cli.options import Model, parse_noise, prepare_torch, require_folders
from fedsea.cli.spread import command_line, spread
from fedsea.cli.terminal import escape, progress_bar, write_json
from fedsea.errors import UsageError
from fedsea.flags import NOISE, Flag, Threads
from fedsea.text import one_line

if TYPE_CHECKING:  # --help needs no torch
    from rich.console import Console

    from fedsea.audit import Decision, Report, Scored
    from fedsea.privacy import Noise


COLUMNS: "tuple[tuple[str, Scored, str], ...]" = (
    ("text read", "prompt", "tokens"),
    ("answer read", "answer", "tokens"),
    ("learnt tokens", "labels", "labels"),
    ("names, numbers", "prompt", "details"),
    ("exact texts", "prompt", "exact"),
    ("meaning", "prompt", "similarity"),
    ("ROUGE-L", "prompt", "rougeL"),
    ("BLEU-4", "prompt", "bleu4"),
)


def _looks(given: object) -> int:
    """A number, or the largest one in the file of a `LookLedger`."""
    text = str(given)
    if not text.isdigit():
        from fedsea.privacy import LookLedger

        if not Path(text).is_file():
            raise UsageError(f"--looks is a number, or the file of another command's --looks; got {text!r}")
        return max(1, LookLedger(text, 0).most_seen())
    if int(text) < 1:
        raise UsageError("--looks must be 1 or more; got 0")
    return int(text)


Texts = Annotated[int | None, Flag("Use the first N texts only.", min=1, metavar="N", default="all")]
Looks = Annotated[
    int,
    typer.Option(
        parser=_looks,
        metavar="N|FILE",
        help="Observations of each text: how often it is sent, each time with fresh noise. A number, or the file of "
        "another command's --looks.",
    ),
]


@spread
def audit(
    model: Model,
    plan: Plan,
    noise: Annotated[list[str] | None, NOISE] = None,
    levels: Annotated[
        str | None,
        Flag(
            "Compare several strengths: of the mechanism --noise, or of noise that is a multiple of the mean |h_A|.",
            metavar="L,L,...",
            default="one only",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        Flag(
            "Texts: one a line, or a .jsonl file with messages, text, or prompt and answer. With --task, its data.",
            metavar="FILE",
            default="a few invented ones",
        ),
    ] = None,
    task: Annotated[
        str | None, Flag("Read --data as fedsea finetune reads the data of this task.", metavar="TASK")
    ] = None,
    texts: Texts = None,
    looks: Looks = 1,
    colluder: Annotated[
        Path | None,
        Flag(
            "Texts of a client who works with the provider. Decoders learn from them.",
            metavar="FILE",
            default="they learn from public text",
        ),
    ] = None,
    attack: Annotated[
        list[str] | None,
        Flag(
            f"{', '.join(attack_names())}; may be given several times.",
            metavar="NAME",
            default="all that fit, but not those that take minutes",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, Flag("Write all results, with the recovered texts, as JSON.", "--json", metavar="FILE")
    ] = None,
    report_file: Annotated[
        Path | None, Flag("Write an HTML page with all results and the recovered texts.", "--report", metavar="FILE")
    ] = None,
    threads: Threads = None,
) -> None:
    """Send texts of yours through a real session of MODEL, or train on them, and show what attacks can read of them.

    --noise may be given several times: then the mechanisms are compared.
    """
    from fedsea.checkpoints.names import check_adapter, check_model
    from fedsea.tasks.metrics import require_rouge

    if task is not None and data is None:
        raise UsageError("--task says how --data is read; give --data PATH as well")
    check_model(model)
    check_adapter(plan.adapter)
    require_folders(json_file, report_file)
    require_rouge()
    attacked = SAMPLES if data is None else read_texts(data) if task is None else read_task(task, str(data))
    plan = dataclasses.replace(
        plan,
        texts=attacked[:texts],
        observations=looks,
        attacks=tuple(attack or ()),
        colluder=() if colluder is None else read_texts(colluder),
    )
    noises = _noises(noise, levels)
    prepare_torch("cpu", threads)
    from fedsea.audit import Auditor, decide, write_page

    reports: list[Report] = []
    with progress_bar() as progress:
        auditor = Auditor(model, plan, progress)
        for place, one in enumerate(noises, 1):
            if len(noises) > 1:
                progress(f"{one} ({place} of {len(noises)})", 0, len(plan.texts))
            reports.append(auditor.report(one))
    if len(reports) == 1:
        show_report(reports[0])
    else:
        compare_reports(reports)
    conclude(decide(reports))
    if report_file is not None:
        write_page(reports, command_line(), report_file)
    if json_file is not None:
        found = [report.to_json() | {"decision": dataclasses.asdict(decide([report]))} for report in reports]
        write_json(found[0] if len(found) == 1 else found, json_file)


def _noises(texts: Sequence[str] | None, levels: str | None) -> "list[Noise]":
    """The mechanisms that are compared, or the only one."""
    if levels is None:
        return [parse_noise(text) for text in texts or [""]]
    try:
        strengths = [float(one) for one in levels.split(",")]
    except ValueError:
        raise UsageError(f"--levels takes numbers with commas between, as 0,1,2.3; got {levels!r}") from None
    for text in texts or []:
        with contextlib.suppress(ValueError):
            float(text.removeprefix("relative:"))
            raise UsageError(f"--levels gives the strengths; leave the number out of --noise {text}")
    from fedsea.privacy import parse_family

    return [parse_family(text).with_strength(strength) for text in texts or ["relative"] for strength in strengths]


def show_report(report: "Report") -> None:
    """Print what each attack reads under one protection."""
    from rich.console import Console

    from fedsea.audit import CONTEXT, brief

    console = Console(highlight=False)
    console.print(f"[bold]{escape(report.verdict)}[/bold]\n{escape(report.limit)}\n")
    attacks = [*(finding.attack for finding in report.findings), CONTEXT]
    left_out = print_columns(console, ("attack", attacks), report.columns(COLUMNS, "s/token"))
    p, q = report.partition.input_layers, report.partition.output_layers
    more = f" Not shown for want of room: {', '.join(left_out)}; --report has them." if left_out else ""
    console.print(
        f"\n{report.model}, partition ({p}, {q}), {brief(report.mechanism)}, {report.wire_dtype} on the wire; "
        f"{len(report.texts)} texts, {report.tokens} tokens. {_cost(report)}Means over texts, and the 95 % interval "
        f"of the first. The last line is no attack: the model's own guess of each token from the true "
        f"tokens before it.{_learnt_from(report)}{more}",
        style="dim",
        markup=False,
    )
    best = report.best()
    if best is not None:
        console.print(f"\n[bold]Sent[/bold]  {escape(one_line(report.texts[0] + report.answers[0]))}")
        console.print(f"[bold]Read[/bold]  {escape(one_line(best.texts[0]))}")


def print_columns(console: "Console", first: tuple[str, list[str]], columns: list[tuple[str, list[str]]]) -> list[str]:
    """Print a table with as many columns as there is room for, in their order; returns the names of the others.

    `first` has name and cells of the column that names the rows.
    """
    from rich.cells import cell_len
    from rich.table import Table

    def width(name: str, cells: list[str]) -> int:
        return max(cell_len(one) for one in (*name.split(), *cells))

    room = console.width - width(*first) - 2
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first[0], width=width(*first))
    shown, left_out = [first[1]], []
    for name, cells in columns:
        needed = width(name, cells) + 2
        if needed > room:
            left_out.append(name)
            continue
        room -= needed
        table.add_column(name, justify="right", width=needed - 2)
        shown.append(cells)
    for row in zip(*shown, strict=True):
        table.add_row(*row)
    console.print(table)
    return left_out


def _learnt_from(report: "Report") -> str:
    """What decoders learnt from; nothing if there are none."""
    if not any(finding.attack.endswith("decoder") for finding in report.findings):
        return ""
    more = f" and {report.colluder} texts of a colluder" if report.colluder else ""
    return f" Decoders learnt from public text{more}."


def _cost(report: "Report") -> str:
    if report.loss is None or report.public_loss is None:
        return ""
    return f"Loss {report.loss:.2f} nats a token, {report.public_loss:.2f} for the public model unprotected. "


def compare_reports(reports: "list[Report]") -> None:
    """For each protection: what each attack reads, what any could, and what it costs; a line each if there is room."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from fedsea.audit import brief, share
    from fedsea.audit.report import mean

    console = Console(highlight=False)
    names = [finding.attack for finding in reports[0].findings]
    columns = [
        (name, [mean(report.findings[place].prompt.get("tokens")) for report in reports])
        for place, name in enumerate(names)
    ]
    columns.append(("any, at most", [share(report.limits.any_attacker) for report in reports]))
    columns.append(("loss", ["–" if report.loss is None else f"{report.loss:.2f}" for report in reports]))
    protections = [brief(report.spec) for report in reports]
    widest = max(map(len, protections)) + sum(max(map(len, (*name.split(), *cells))) + 2 for name, cells in columns) + 2
    if widest <= console.width:
        print_columns(console, ("tokens read, by attack", protections), columns)
    else:
        for place, protection in enumerate(protections):
            console.print(protection, style="bold", markup=False)
            read = ", ".join(f"{name} {cells[place]}".replace(" ", "\N{NO-BREAK SPACE}") for name, cells in columns)
            console.print(Padding(Text(read), (0, 0, 0, 2)))
    console.print(
        "\nShares of the text's tokens that each attack reads. “any, at most” is an estimate that holds for every "
        "attack; the loss is the model's on the same texts, nats a token.",
        style="dim",
    )


def conclude(decision: "Decision") -> None:
    """Print what follows for texts like these."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(f"\nDecision: {decision.sentence}", style="bold"))
    for option in decision.options:
        console.print(Padding(Text(f"– {option}"), (0, 0, 0, 2)))
