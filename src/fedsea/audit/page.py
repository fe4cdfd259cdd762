"""An audit as one page that needs nothing else: for a security officer, on a screen or on paper.

The template escapes whatever comes from texts, models or the command line; the page loads nothing and runs nothing.
"""

import datetime
import platform
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

import fedsea
from fedsea.audit.attacks import FLOOR
from fedsea.audit.charts import frontiers
from fedsea.audit.decision import decide
from fedsea.audit.report import CONTEXT, Finding, Report, Scored, brief, interval, mean, share
from fedsea.files import write_text

LIBRARIES = ("torch", "transformers")
COLUMNS: tuple[tuple[str, Scored, str], ...] = (
    ("tokens read", "prompt", "tokens"),
    ("exact texts", "prompt", "exact"),
    ("ROUGE-L", "prompt", "rougeL"),
    ("BLEU-4", "prompt", "bleu4"),
    ("names, numbers", "prompt", "details"),
    ("similar in meaning", "prompt", "similarity"),
    ("answer's tokens", "answer", "tokens"),
    ("learnt tokens", "labels", "labels"),
)


class Row(NamedTuple):
    """A row of a table: its name, what more there is to say of it, and its figures."""

    name: str
    more: str
    cells: Sequence[str]
    floor: bool = False  # whether it is for comparison only


class Table(NamedTuple):
    """A table of figures."""

    head: Sequence[str]
    rows: Sequence[Row]
    caption: str


class Said(NamedTuple):
    """A text as it was sent or read: pieces, each with the HTML element that says how it was read ("" as sent)."""

    name: str
    prompt: Sequence[tuple[str, str]]
    answer: Sequence[tuple[str, str]]
    right: str = ""


def write_page(reports: Sequence[Report], command: str, file: Path) -> None:
    """Write `page` to a file; a UsageError if it cannot be written."""
    write_text(file, page(reports, command))


def page(reports: Sequence[Report], command: str) -> str:
    """Reports of one model and the same texts as HTML, with the command that made them as it is typed."""
    versions = [f"fedsea {fedsea.__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {version(name)}" for name in LIBRARIES]
    return environment().get_template("page.html.j2").render(
        reports=reports,
        first=reports[0],
        decision=decide(reports),
        frontiers=frontiers(reports),
        comparison=_comparison(reports),
        command=command,
        versions=", ".join(versions),
        now=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip


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


def _attack_table(report: Report) -> Table:
    columns = report.columns(COLUMNS, "seconds a token")
    names = [(one.attack, f"knows {one.knows}", one.attack == FLOOR) for one in report.findings]
    names.append((CONTEXT, "no attack: the model's own guess of each token from the true tokens before it", True))
    cells = zip(*(cells for _, cells in columns), strict=True)
    rows = [Row(name, more, row, floor) for (name, more, floor), row in zip(names, cells, strict=True)]
    caption = "Means over texts; the interval is of the mean, by resampling the texts."
    if any(finding.attack.endswith("decoder") for finding in report.findings):
        colluder = f" and {report.colluder} texts of a colluding client" if report.colluder else ""
        caption += f" Decoders learnt from public text{colluder}."
    return Table(["attack", *(heading for heading, _ in columns)], rows, caption)


def _limit_table(report: Report) -> Table:
    observations = report.limits.observations
    over = f" over {observations} observations with fresh noise" if observations > 1 else ""
    rows = []
    for limit in report.limits.limits:
        bits = "no bound" if limit.bits == float("inf") else f"{limit.bits:.3g}"
        cells = [(bits, limit.bits_guaranteed), (share(limit.accuracy), limit.accuracy_guaranteed)]
        rows.append(Row(limit.source, "", [f"{most} ({'guarantee' if sure else 'estimate'})" for most, sure in cells]))
    caption = f"For any attacker with any method{over}; 100 % rules nothing out."
    return Table(["kind of text", "bits a token, at most", "tokens named, at most"], rows, caption)


def _comparison(reports: Sequence[Report]) -> Table:
    head = ["protection", "noise, × mean |h_A|", "best attack", "tokens read", "95 %"]
    head += ["any attacker, at most (estimate)", "loss, nats a token"]
    rows = []
    for report in reports:
        best = report.best()
        name, tokens = ("–", None) if best is None else (best.attack, best.tokens("prompt"))
        loss = "–" if report.loss is None else f"{report.loss:.2f}"
        cells = [f"{report.noise_level:.3g}", name, mean(tokens), interval(tokens)]
        rows.append(Row(brief(report.spec), report.headline, [*cells, share(report.limits.any_attacker), loss]))
    caption = f"Blind guessing has a loss of {reports[0].blind_loss:.2f}."
    if reports[0].public_loss is not None:
        caption += f" The public model's on these texts, without protection, is {reports[0].public_loss:.2f}."
    return Table(head, rows, caption)


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
