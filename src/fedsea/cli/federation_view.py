"""A federation's state as tables and lines."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedsea.cli.terminal import escape
from fedsea.federation.coordinator.status import FederationStatus
from fedsea.text import printable

LAST_ROUNDS = 8


def tables(status: FederationStatus) -> Group:
    """The whole state, for a terminal."""
    return Group(Text(headline(status), style="bold"), _clients(status), _rounds(status))


def headline(status: FederationStatus) -> str:
    """One line: which federation, which round, what is going on."""
    parts = [status.name, status.model, status.mode, f"round {status.round} of {status.rounds}"]
    if not status.doing:
        parts.append("not begun")
    elif status.doing == "done":
        parts.append("done")
    elif status.running:
        parts.append(status.doing)
    else:
        parts.append(f"stopped while {status.doing}")
    return printable("  ".join(part for part in parts if part))


def round_line(report: dict[str, Any]) -> str:
    """One line for a round that is done."""
    clients = ", ".join(f"{name} {its['train-loss']:.4f}" for name, its in sorted(report["clients"].items()))
    line = f"round {report['round']}: " + (
        f"loss {_loss(report['loss'])} ({clients})" if clients else "no client trained"
    )
    line += f", {_megabytes(report['bytes_up'])} up, {_megabytes(report['bytes_down'])} down, {report['seconds']:.1f} s"
    if report.get("stragglers"):
        line += f", not waited for: {', '.join(report['stragglers'])}"
    for name, why in report.get("dropped", {}).items():
        line += f"; without {name}: {why}"
    return line


def evaluation_line(report: dict[str, Any]) -> str:
    """One line for a round's evaluation."""
    metrics = report["evaluation"].get("metrics", {})
    return f"round {report['round']} evaluated: " + (_metrics(metrics) or "by no client")


def _clients(status: FederationStatus) -> Table:
    table = _table(["client", "state"], ["rounds", "loss", "MB up", "MB down"], ["note"])
    for name, client in sorted(status.clients.items()):
        state = client.state if client.steps is None else f"{client.state}, {client.steps} steps"
        notes = [client.note, f"not waited for in {client.straggled} rounds" if client.straggled else ""]
        table.add_row(
            escape(name),
            escape(state),
            str(client.rounds),
            _loss(client.loss),
            f"{client.bytes_up / 1e6:.2f}",
            f"{client.bytes_down / 1e6:.2f}",
            escape("; ".join(filter(None, notes))),
        )
    return table


def _rounds(status: FederationStatus) -> Table:
    table = _table([], ["round", "clients", "loss", "MB up", "MB down", "seconds"], ["evaluation", "left out"])
    for report in status.reports[-LAST_ROUNDS:]:
        table.add_row(
            str(report["round"]),
            str(len(report["clients"])),
            _loss(report["loss"]),
            f"{report['bytes_up'] / 1e6:.2f}",
            f"{report['bytes_down'] / 1e6:.2f}",
            f"{report['seconds']:.1f}",
            escape(_metrics(report.get("evaluation", {}).get("metrics", {}))),
            escape(", ".join(report.get("dropped", {}))),
        )
    return table


def _table(first: list[str], numbers: list[str], last: list[str]) -> Table:
    table = Table(*first)
    for name in numbers:
        table.add_column(name, justify="right")
    for name in last:
        table.add_column(name)
    return table


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _metrics(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in sorted(metrics.items()) if isinstance(value, int | float))
