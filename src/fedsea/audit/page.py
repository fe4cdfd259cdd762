"""An audit as one page that needs nothing else: for a security officer, on a screen or on paper.

The template escapes whatever comes from texts, models or the command line; the page loads nothing and runs nothing.
"""

import datetime
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

import fedsea
from fedsea.audit.attacks import FLOOR
from fedsea.audit.charts import frontiers
from fedsea.audit.decision import decide
from fedsea.audit.limits import Limit
from fedsea.audit.report import Finding, Report, Scores, brief, interval, mean, share
from fedsea.audit.scores import Score
from fedsea.files import write_text

LIBRARIES = ("torch", "transformers")
WORDS = {
    "tokens": "tokens read",
    "exact": "exact texts",
    "rougeL": "ROUGE-L",
    "bleu4": "BLEU-4",
    "details": "names, numbers",
    "similarity": "similar in meaning",
}
"""What the page calls the scores that it shows, in the order of its columns."""


@dataclass(frozen=True)
class Row:
    """A row of a table: its name, what more there is to say of it, and its figures."""

    name: str
    more: str
    cells: Sequence[str]
    floor: bool = False


@dataclass(frozen=True)
class Table:
    """A table of figures."""

    head: Sequence[str]
    rows: Sequence[Row]
    caption: str


def write_page(reports: Sequence[Report], command: str, file: Path) -> None:
    """Write `page` to a file; a UsageError if it cannot be written."""
    write_text(file, page(reports, command))


def page(reports: Sequence[Report], command: str) -> str:
    """Reports of one model and the same texts as HTML, with the command that made them as it is typed."""
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            reports=reports,
            first=reports[0],
            decision=decide(reports),
            frontiers=frontiers(reports),
            comparison=_comparison(reports),
            command=command,
            versions=", ".join(_versions()),
            now=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


@cache
def environment() -> Environment:
    """The templates. They escape whatever they are given; a name that they are not given is an error."""
    loader = PackageLoader("fedsea.audit", "")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters |= {"brief": brief, "layers": _layers}
    found.globals |= {"attack_table": _attack_table, "limit_table": _limit_table, "text_rows": _text_rows}
    return found


def _layers(count: int) -> str:
    return "no layer" if count == 0 else "1 layer" if count == 1 else f"{count} layers"


def _versions() -> Iterator[str]:
    yield f"fedsea {fedsea.__version__}"
    yield f"Python {platform.python_version()}"
    for name in LIBRARIES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"no {name}"


def _attack_table(report: Report) -> Table:
    answered, learnt = any(report.answers), report.learnt is not None
    names = [name for name in WORDS if any(name in finding.prompt for finding in report.findings)]
    head = ["attack", WORDS["tokens"], "95 %", *(WORDS[name] for name in names if name != "tokens")]
    head += [*(["answer's tokens"] if answered else []), *(["learnt tokens"] if learnt else []), "seconds a token"]

    def cells(prompt: Scores, answer: Scores, labels: Score | None, seconds: str) -> list[str]:
        tokens = prompt.get("tokens")
        found = [mean(tokens), interval(tokens), *(mean(prompt.get(name)) for name in names if name != "tokens")]
        return [
            *found,
            *([mean(answer.get("tokens"))] if answered else []),
            *([mean(labels)] if learnt else []),
            seconds,
        ]

    rows = [
        Row(
            finding.attack,
            f"knows {finding.knows}",
            cells(finding.prompt, finding.answer, finding.labels.get("labels"), f"{finding.seconds_per_token:.3f}"),
            floor=finding.attack == FLOOR,
        )
        for finding in report.findings
    ]
    knows = "no attack: the model's own guess of each token from the true tokens before it"
    predicted = cells(report.predicted["prompt"], report.predicted["answer"], None, "")
    rows.append(Row("predicted by context", knows, predicted, floor=True))
    caption = "Means over texts; the interval is of the mean, by resampling the texts."
    if any(finding.attack.endswith("decoder") for finding in report.findings):
        colluder = f" and {report.colluder} texts of a colluding client" if report.colluder else ""
        caption += f" Decoders learnt from public text{colluder}."
    return Table(head, rows, caption)


def _limit_table(report: Report) -> Table:
    observations = report.limits.observations
    over = f" over {observations} observations with fresh noise" if observations > 1 else ""
    return Table(
        ["kind of text", "bits a token, at most", "tokens named, at most"],
        [Row(limit.source, "", _limit_cells(limit)) for limit in report.limits.limits],
        f"For any attacker with any method{over}; 100 % rules nothing out.",
    )


def _limit_cells(limit: Limit) -> list[str]:
    sure = {True: "guarantee", False: "estimate"}
    bits = "no bound" if limit.bits == float("inf") else f"{limit.bits:.3g}"
    return [
        f"{bits} ({sure[limit.bits_guaranteed]})",
        f"{share(limit.accuracy)} ({sure[limit.accuracy_guaranteed]})",
    ]


def _comparison(reports: Sequence[Report]) -> Table:
    head = ["protection", "noise, × mean |h_A|", "best attack", "tokens read", "95 %"]
    head += ["any attacker, at most (estimate)", "loss, nats a token"]
    rows = []
    for report in reports:
        best, limit = report.best(), report.limits.of_text
        tokens = None if best is None else best.tokens("prompt")
        cells = [f"{report.noise_level:.3g}", "–" if best is None else best.attack, mean(tokens), interval(tokens)]
        cells += [
            share(None if limit is None else limit.accuracy),
            "–" if report.loss is None else f"{report.loss:.2f}",
        ]
        rows.append(Row(brief(report.spec), report.headline, cells))
    caption = f"Blind guessing has a loss of {reports[0].blind_loss:.2f}."
    if reports[0].public_loss is not None:
        caption += f" The public model's on these texts, without protection, is {reports[0].public_loss:.2f}."
    return Table(head, rows, caption)


@dataclass(frozen=True)
class Said:
    """A text as it was sent or read: pieces, each with the HTML element that says how it was read ("" as sent)."""

    name: str
    prompt: Sequence[tuple[str, str]]
    answer: Sequence[tuple[str, str]]
    right: str = ""


def _text_rows(report: Report, place: int) -> Iterator[Said]:
    """One of the texts: as it was sent, and as each attack has read it."""
    ids, prompt = report.ids[place], report.prompts[place]
    sent = [(_visible(report.words[token]), "") for token in ids]
    yield Said("sent", sent[:prompt], sent[prompt:])
    for finding in report.findings:
        pieces = list(_read(report, finding, place))
        right = sum(kind == "b" for _, kind in pieces)
        yield Said(finding.attack, pieces[:prompt], pieces[prompt:], f"{right} of {len(ids) - report.known}")


def _read(report: Report, finding: Finding, place: int) -> Iterable[tuple[str, str]]:
    for at, (token, guess) in enumerate(zip(report.ids[place], finding.recoveries[place].tokens, strict=True)):
        if guess is None or at < report.known:
            yield "_", "u"
        else:
            yield _visible(report.words[guess]), "b" if guess == token else "i"


def _visible(text: str) -> str:
    """A token as it is shown: what cannot be seen, or would change how the rest is shown, by a sign of its own."""
    return "".join(one if one.isprintable() else "⏎" if one == "\n" else "·" for one in text) or "·"
