"""`fedsea audit`: what a provider who knows the public weights reads of a text."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli.options import (
    ClientOptions,
    Model,
    NoiseLevel,
    NoiseStd,
    Threads,
    WireDtype,
    command_line,
    prepare_torch,
    require_folders,
    spread,
)
from fedsea.cli.progress import progress_bar
from fedsea.cli.terminal import escape
from fedsea.errors import UsageError
from fedsea.partition import Partition
from fedsea.text import one_line

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.audit.audit import Report
    from fedsea.audit.scores import Score
    from fedsea.privacy import Noise


@dataclasses.dataclass(frozen=True)
class AuditedModel:
    """Which model, split where, with what noise."""

    model: Model
    input_layers: Annotated[int, typer.Option(min=0, help="Decoder layers at the client, after the embedding.")] = 1
    output_layers: Annotated[int, typer.Option(min=0, help="Decoder layers at the client, before the head.")] = 1
    noise_std: NoiseStd = None
    noise_level: NoiseLevel = None
    mechanism: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Another protection of what leaves, as for fedsea chat; given several times, they are compared.",
            show_default="no noise",
        ),
    ] = None
    levels: Annotated[
        str | None,
        typer.Option(
            metavar="L,L,...",
            help="Strengths to compare: of --mechanism, or multiples of the mean |h_A|.",
            show_default="one only",
        ),
    ] = None
    wire_dtype: WireDtype = None
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="A PEFT adapter that the client runs with.")] = (
        None
    )
    attacker_has_adapter: Annotated[
        bool, typer.Option("--attacker-has-adapter", help="Attackers have that adapter as well.")
    ] = False

    def noises(self) -> "list[Noise]":
        """How states are protected, as `ClientOptions.noise` gives it; several if they are to be compared.

        Raises
        ------
        UsageError
            If options contradict each other, or one cannot be used.
        """
        from fedsea.privacy.strength import parse_family, with_strength

        if self.levels is None:
            several: list[str | None] = [*self.mechanism] if self.mechanism else [None]
            return [
                ClientOptions(
                    self.model, "", noise_std=self.noise_std, noise_level=self.noise_level, mechanism=one
                ).noise()
                for one in several
            ]
        if self.noise_std is not None or self.noise_level is not None:
            raise UsageError("--levels says how strong the noise is; leave out --noise-std and --noise-level")
        families = [parse_family(one) for one in self.mechanism or ["relative"]]
        return [with_strength(one, strength) for one in families for strength in read_levels(self.levels)]


@spread
def audit(
    model: AuditedModel,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Texts: a line each, or a .jsonl with the column text, or prompt and answer.",
            show_default="a few made-up ones",
        ),
    ] = None,
    texts: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N texts only.", show_default="all")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of each text at most.")] = 64,
    answer_tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="Tokens of an answer to each text, attacked as well.")
    ] = 0,
    looks: Annotated[
        int, typer.Option(min=1, metavar="N", help="How often each text is sent, each time with fresh noise.")
    ] = 1,
    train_steps: Annotated[
        int, typer.Option(min=0, metavar="N", help="Audit a training on the texts, of N steps, instead of sessions.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Texts of a training step.")] = 4,
    colluder: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Texts of a client who tells attackers what they are; decoders learn from them.",
            show_default="they learn from public text",
        ),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="prior, nearest, search, average, search-map, read-out, gradient, optimise, decoder or paper-decoder; "
            "may be given several times.",
            show_default="all that fit, but for optimise and decoders, which take minutes",
        ),
    ] = None,
    threads: Threads = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything, recovered texts too, as JSON.")
    ] = None,
    report_file: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Write a page to show, as HTML, recovered texts too."),
    ] = None,
) -> None:
    """Send texts through a real session of MODEL, or train on them, and say what attacks on what is seen read."""
    noises = model.noises()
    require_folders(json_file, report_file)
    prepare_torch("cpu", threads)
    from fedsea.audit.audit import Audits, Plan
    from fedsea.audit.page import write_page
    from fedsea.audit.samples import SAMPLES, read_texts

    plan = Plan(
        model=model.model,
        texts=(list(SAMPLES) if data is None else read_texts(data))[:texts],
        partition=Partition(model.input_layers, model.output_layers),
        wire_dtype=model.wire_dtype,
        tokens=tokens,
        answer=answer_tokens,
        looks=looks,
        attacks=tuple(attack or ()),
        adapter=model.adapter,
        attacker_has_adapter=model.attacker_has_adapter,
        train_steps=train_steps,
        batch_size=batch_size,
        colluder=[] if colluder is None else read_texts(colluder),
    )
    reports: list[Report] = []
    with progress_bar() as progress:
        audits = Audits(plan, progress)
        for place, noise in enumerate(noises, 1):
            if len(noises) > 1:
                progress(f"{noise} ({place} of {len(noises)})", 0, len(plan.texts))
            reports.append(audits.under(noise))
    if len(reports) == 1:
        _show(reports[0])
    else:
        _compare(reports)
    if report_file is not None:
        write_page(reports, command_line(), report_file)
    if json_file is not None:
        found = [report.to_json() for report in reports]
        write_json(found[0] if len(found) == 1 else found, json_file)


def read_levels(text: str) -> list[float]:
    """Strengths that a user lists: numbers, 0 or more, with commas between.

    Raises
    ------
    UsageError
        If they are not.
    """
    try:
        return [float(one) for one in text.split(",")]
    except ValueError:
        raise UsageError(f"--levels takes numbers with commas between, as 0,1,2.3; got {text!r}") from None


def write_json(value: Any, file: Path) -> None:
    """Write a JSON file.

    Raises
    ------
    UsageError
        If it cannot be written.
    """
    try:
        file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}") from None


def _show(report: "Report") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{escape(report.verdict)}[/bold]\n{escape(report.limit)}\n")
    answered, learnt = any(report.answers), any(finding.labels for finding in report.findings)
    table = Table(box=None, pad_edge=False)
    table.add_column("attack")
    columns = ["tokens", "95 %", "exact texts", "ROUGE-L", "BLEU-4", "names, numbers", "meaning"]
    more = [*(["answer's tokens"] if answered else []), *(["learnt tokens"] if learnt else [])]
    for name in [*columns, *more, "s/token"]:
        table.add_column(name, justify="right")
    for finding in report.findings:
        row = [*_cells(finding.prompt), *([_cell(finding.answer.get("tokens"))] if answered else [])]
        row += [_cell(finding.labels.get("labels"))] if learnt else []
        table.add_row(finding.attack, *row, f"{finding.seconds_per_token:.3f}")
    told = [*_cells(report.told["prompt"]), *([_cell(report.told["answer"].get("tokens"))] if answered else [])]
    told += [""] if learnt else []
    table.add_row("[dim]told all before[/dim]", *told, "", style="dim")
    console.print(table)
    p, q = report.partition.input_layers, report.partition.output_layers
    console.print(
        f"\n{report.model}, partition ({p}, {q}), {report.mechanism}, {report.wire_dtype} on the wire; "
        f"{len(report.texts)} texts, {report.tokens} tokens. {_cost(report)}The last line is no attack: the model's "
        f"own guess of each token if it is told all tokens before it.{_learnt_from(report)}",
        style="dim",
        markup=False,
    )
    best = report.best
    if best is not None:
        console.print(f"\n[bold]Sent[/bold]  {escape(_line(report.texts[0] + report.answers[0]))}", soft_wrap=True)
        console.print(f"[bold]Read[/bold]  {escape(_line(best.texts[0]))}", soft_wrap=True)


def _learnt_from(report: "Report") -> str:
    """What decoders learnt from; nothing if there are none."""
    if not any(finding.attack.endswith("decoder") for finding in report.findings):
        return ""
    told = f" and {report.colluder} texts of a colluder" if report.colluder else ""
    return f" Decoders learnt from public text{told}."


def _cost(report: "Report") -> str:
    if report.loss is None or report.public_loss is None:
        return ""
    return f"Loss {report.loss:.2f} nats a token, {report.public_loss:.2f} for the public model unprotected. "


def _compare(reports: "list[Report]") -> None:
    """A line for each protection: what each attack reads, what any could, and what it costs."""
    from rich.console import Console
    from rich.table import Table

    from fedsea.audit.audit import share

    table = Table(box=None, pad_edge=False)
    table.add_column("tokens read, by attack")
    for name in [*(finding.attack for finding in reports[0].findings), "any, at most", "loss"]:
        table.add_column(name, justify="right")
    for report in reports:
        limit = report.limits.of_text
        shares = [finding.prompt.get("tokens") for finding in report.findings]
        cells = ["–" if one is None else share(one.mean) for one in shares]
        cells += ["–" if limit is None else share(limit.accuracy), "–" if report.loss is None else f"{report.loss:.2f}"]
        table.add_row(report.asked, *cells)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "\n“any, at most” is an estimate that holds for every attack; the loss is the model's on the same texts, nats "
        "a token.",
        style="dim",
    )


def _line(text: str) -> str:
    return one_line(text)


def _cells(scores: "dict[str, Score]") -> list[str]:
    tokens = scores.get("tokens")
    spread_of = "–" if tokens is None else f"{tokens.low:.2f} … {tokens.high:.2f}"
    others = ("exact", "rougeL", "bleu4", "details", "similarity")
    return [_cell(tokens), spread_of, *(_cell(scores.get(name)) for name in others)]


def _cell(value: "Score | None") -> str:
    return "–" if value is None else f"{value.mean:.3f}"
