"""A federation's state as tables and lines."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedsea.cli.terminal import escape, table
from fedsea.federation import FederationStatus
from fedsea.text import printable

LAST_ROUNDS = 8


def tables(status: FederationStatus) -> Group:
    """The whole state, for a terminal."""
    return Group(Text(_headline(status), style="bold"), _clients(status), _rounds(status))


def _headline(status: FederationStatus) -> str:
    """One line: which federation, which round, what is going on."""
    doing = status.doing or "not begun"
    if status.doing not in ("", "done") and not status.running:
        doing = f"stopped while {doing}"
    parts = [status.name, status.model, status.mode, f"round {status.round} of {status.rounds}", doing]
    return printable("  ".join(part for part in parts if part))


def round_lines(status: FederationStatus) -> Iterator[str]:
    """A line for each round that is done, and one for its evaluation."""
    for report in status.reports:
        yield _round_line(report)
        if "evaluation" in report:
            metrics = report["evaluation"].get("metrics", {})
            yield f"round {report['round']} evaluated: {_metrics(metrics) or 'by no client'}"


def _round_line(report: dict[str, Any]) -> str:
    clients = ", ".join(f"{name} {its['train-loss']:.4f}" for name, its in sorted(report["clients"].items()))
    line = f"round {report['round']}: " + (
        f"loss {_loss(report['loss'])} ({clients})" if clients else "no client trained"
    )
    line += f", {_mb(report['bytes_up'])} MB up, {_mb(report['bytes_down'])} MB down, {report['seconds']:.1f} s"
    if report.get("stragglers"):
        line += f", not waited for: {', '.join(report['stragglers'])}"
    for name, why in report.get("dropped", {}).items():
        line += f"; without {name}: {why}"
    return line


def _clients(status: FederationStatus) -> Table:
    shown = table("client", "state", ">rounds", ">loss", ">MB up", ">MB down", "note", boxed=True)
    for name, client in sorted(status.clients.items()):
        state = client.state if client.steps is None else f"{client.state}, {client.steps} steps"
        notes = [client.note, f"not waited for in {client.straggled} rounds" if client.straggled else ""]
        shown.add_row(
            escape(name),
            escape(state),
            str(client.rounds),
            _loss(client.loss),
            _mb(client.bytes_up),
            _mb(client.bytes_down),
            escape("; ".join(filter(None, notes))),
        )
    return shown


def _rounds(status: FederationStatus) -> Table:
    numbers = (">round", ">clients", ">loss", ">MB up", ">MB down", ">seconds")
    shown = table(*numbers, "evaluation", "left out", boxed=True)
    for report in status.reports[-LAST_ROUNDS:]:
        shown.add_row(
            str(report["round"]),
            str(len(report["clients"])),
            _loss(report["loss"]),
            _mb(report["bytes_up"]),
            _mb(report["bytes_down"]),
            f"{report['seconds']:.1f}",
            escape(_metrics(report.get("evaluation", {}).get("metrics", {}))),
            escape(", ".join(report.get("dropped", {}))),
        )
    return shown


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _metrics(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in sorted(metrics.items()) if isinstance(value, int | float))
