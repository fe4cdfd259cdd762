"""`fedsea demo --federation`: three clinics train one adapter, and what it shows."""

import dataclasses
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fedsea.cli.terminal import escape, print_json, show_commands, table

if TYPE_CHECKING:
    from fedsea.demo.federation import FederationDemoReport, RoundFigures
    from fedsea.demo.screen import Screen

WHAT = {
    "sequential": "one after the other",
    "client-batch": "one batch of all, one adapter",
    "server-hierarchical": "side by side, an adapter each",
}


def show_federation(
    name: str, screen: "Screen", console: Console, *, threads: int, output: Path | None, as_json: bool
) -> None:
    """Run the demonstration and show what it has measured."""
    from fedsea.demo.federation import CLINICS, ROUNDS, STEPS, run_federation_demo

    console.print(
        f"Three clinics, {sum(map(len, CLINICS.values()))} lines of their own rules, none of which leaves its clinic. "
        f"{ROUNDS} rounds of {STEPS} steps, by each of three strategies.\n"
    )
    live = Live(console=console, auto_refresh=False, transient=True)
    reported: set[tuple[str, int]] = set()

    def on_change(mode: str, rounds: "list[RoundFigures]", doing: str) -> None:
        if console.is_terminal:
            live.start()
            live.update(_table(rounds, f"{mode}: {doing}" if doing != "done" else ""), refresh=True)
            return
        for figures in rounds:
            if (figures.mode, figures.number) not in reported:
                reported.add((figures.mode, figures.number))
                console.print(
                    f"{figures.mode}, round {figures.number}: {figures.clients} clients, loss {figures.loss:.3f}, "
                    f"{figures.seconds:.1f} s"
                )

    try:
        report = run_federation_demo(name, screen, threads=threads, output=output, on_change=on_change)
    finally:
        live.stop()
    if as_json:
        print_json(dataclasses.asdict(report), default=str)
    else:
        _show(report, console)


def _show(report: "FederationDemoReport", console: Console) -> None:
    console.print()
    console.print(_table(list(report.rounds), ""))
    whole = ", ".join(f"{mode} {seconds:.0f} s" for mode, seconds in report.seconds.items())
    console.print(
        f"From start to end, Flower's work included: {whole}. Hidden states and gradients went to the block server, "
        "adapters of input and output blocks to the coordinator, and text nowhere."
    )
    if report.adapter is not None:
        console.print(f"The adapter is in {escape(str(report.adapter))}: PEFT loads it.")
    show_commands(
        console,
        "Between machines[/bold] (docs/federation.md):",
        f"fedsea federation up hospitals --model {quote(report.model)} --clients ward-a,ward-b --task cb "
        "--listen 0.0.0.0 --host hub.example.org",
        "fedsea federation join ward-a --task cb --data /data/ward-a",
        "fedsea federation status hospitals --watch",
    )


def _table(rounds: "list[RoundFigures]", doing: str) -> Table:
    numbers = (">round", ">clients", ">loss", ">MB up", ">MB down", ">seconds", ">of them training")
    shown = table("strategy", *numbers, title="Rounds", caption=escape(doing), boxed=True)
    for figures in rounds:
        first = figures.number == 1
        shown.add_row(
            f"{figures.mode}\n[dim]{WHAT[figures.mode]}[/dim]" if first else "",
            str(figures.number),
            str(figures.clients),
            f"{figures.loss:.3f}",
            f"{figures.bytes_up / 1e6:.1f}",
            f"{figures.bytes_down / 1e6:.1f}",
            f"{figures.seconds:.1f}",
            f"{figures.trained:.1f}",
        )
    return shown
