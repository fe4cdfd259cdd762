"""What a bench prints and writes: lines, each with a figure, its target, and whether it holds.

The JSON form of a run is a list of lines; it serves every bench.
"""

import json
import operator
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from fedsea.errors import UsageError

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, "==": operator.eq}
_TARGET = re.compile(r"(>=|<=|==) (\S+)")
SHARE = "share"  # a unit: from 0 to 1, shown in per cent; its target is a number from 0 to 1
_MARKS = {True: "[green]holds[/]", False: "[red]FAILS[/]"}


def meets(measured: float, target: str) -> bool:
    """Whether a figure meets a target, which is written as a comparison with one number: ">= 0.95"."""
    match = _TARGET.fullmatch(target)
    try:
        if match is not None:
            return _COMPARISONS[match[1]](measured, float(match[2]))
    except ValueError:
        pass
    raise UsageError(f"a target is written like '>= 0.95'; got {target!r}")


@dataclass(frozen=True)
class Line:
    """One figure of a bench, and the form of its JSON."""

    name: str  # what was measured, as "topic: figure"
    measured: float | None  # None if it was not measured here
    unit: str  # "s", "bytes", "x" for a ratio, SHARE
    target: str  # what it must reach, such as ">= 0.95"; empty for a figure that is only reported
    holds: bool | None  # whether it does; None if it was not measured, or has no target
    samples: tuple[float, ...]  # the single values behind the figure, in the order they were taken
    conditions: str  # what a reader must know to repeat or to judge it; why it was skipped, if it was

    @classmethod
    def of(
        cls, name: str, measured: float, unit: str, *, target: str = "", samples: Sequence[float] = (), conditions: str
    ) -> Self:
        holds = meets(measured, target) if target else None
        return cls(name, measured, unit, target, holds, tuple(samples) or (measured,), conditions)

    @classmethod
    def median(cls, name: str, samples: Sequence[float], unit: str, *, target: str = "", conditions: str) -> Self:
        return cls.of(name, statistics.median(samples), unit, target=target, samples=samples, conditions=conditions)

    @classmethod
    def largest(cls, name: str, samples: Sequence[float], unit: str, *, target: str = "", conditions: str) -> Self:
        return cls.of(name, max(samples), unit, target=target, samples=samples, conditions=conditions)

    @classmethod
    def skipped(cls, name: str, unit: str, *, target: str = "", reason: str) -> Self:
        return cls(name, None, unit, target, None, (), f"skipped: {reason}")

    @property
    def verdict(self) -> str:
        """One word: holds, FAILS, skipped or reported."""
        if self.holds is not None:
            return "holds" if self.holds else "FAILS"
        return "skipped" if self.measured is None else "reported"

    @property
    def figure(self) -> str:
        """What was measured, with its unit, for people."""
        return "–" if self.measured is None else f"{self._number(self.measured)} {self._sign}".rstrip()

    @property
    def spread(self) -> str:
        """Lowest and highest sample, and how many there are; empty for a single one."""
        if len(self.samples) < 2:
            return ""
        least, most = self._number(min(self.samples)), self._number(max(self.samples))
        return f"{least} … {most} (n = {len(self.samples)})"

    @property
    def wanted(self) -> str:
        """The target, for people."""
        if self.unit != SHARE or not self.target:
            return self.target or "–"
        comparison, value = self.target.split()
        return f"{comparison} {self._number(float(value))} %"

    @property
    def _sign(self) -> str:
        return "%" if self.unit == SHARE else self.unit

    def _number(self, value: float) -> str:
        return f"{100 * value:.3g}" if self.unit == SHARE else number(value)


def number(value: float) -> str:
    """A figure for people: four significant digits, no exponent where it can be helped."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2e}"


class Report:
    """Collects a bench's lines and prints each as it comes in, as a row of a table as wide as the console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.lines: list[Line] = []

    def add(self, line: Line) -> None:
        # A table that grows needs a terminal. One small table a line, of fixed widths, reads the same in a log.
        table = Table(box=None, show_header=not self.lines, pad_edge=False, expand=True)
        table.add_column("", width=8)
        for title, ratio in (("figure", 8), ("measured", 3), ("target", 2)):
            table.add_column(title, ratio=ratio)
        measured = "–" if line.measured is None else f"[bold]{escape(line.figure)}[/]"
        mark = _MARKS[line.holds] if line.holds is not None else f"[dim]{line.verdict}[/]"
        table.add_row(mark, escape(line.name), measured, escape(line.wanted))
        self.console.print(table)
        below = [line.spread, "" if self.lines and self.lines[-1].conditions == line.conditions else line.conditions]
        if any(below):
            note = Padding("; ".join(filter(None, below)), (0, 0, 0, 10))
            self.console.print(note, style="dim", markup=False, highlight=False)
        self.lines.append(line)

    def summary(self) -> str:
        """How many lines hold, fail, were skipped, and are only reported."""
        counts = dict.fromkeys(("holds", "FAILS", "skipped", "reported"), 0)
        for line in self.lines:
            counts[line.verdict] += 1
        return ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "nothing measured"

    @property
    def failed(self) -> bool:
        return any(line.holds is False for line in self.lines)


def write_json(lines: Iterable[Line], path: Path) -> None:
    """Write lines as a JSON list of objects with the fields of `Line`."""
    path.write_text(json.dumps([asdict(line) for line in lines], indent=2, ensure_ascii=False) + "\n")


def markdown_table(lines: Iterable[Line]) -> str:
    rows = ["| figure | measured | target | | spread | conditions |", "| --- | --- | --- | --- | --- | --- |"]
    for line in lines:
        cells = (line.name, line.figure, line.wanted, line.verdict, line.spread or "–", line.conditions)
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(rows) + "\n"
