"""`fedsea demo --finetune`: split fine-tuning on a real model, and what it shows."""

import dataclasses
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from rich.console import Console

from fedsea.cli.terminal import escape, print_json, progress_bar, show_commands, table

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.demo.finetuning import FineTuningReport
    from fedsea.demo.screen import Screen
    from fedsea.training.loop import Figures

BARS = "▁▂▃▄▅▆▇█"


def show_finetuning(
    name: str, screen: "Screen", console: Console, *, threads: int, output: Path | None, as_json: bool
) -> None:
    """Run the demonstration and show what it has measured."""
    with screen.step("Loading PyTorch, transformers and PEFT"):
        from fedsea.demo.finetuning import RULES, run_finetuning_demo
    console.print(f"{len(RULES)} lines of a clinic's own rules are to be learnt, which must stay there.\n")
    with progress_bar() as progress:

        def on_step(figures: "Figures", steps: int) -> None:
            loss = f"loss {figures.loss:.3f}, {figures.tokens_per_second:.0f} tokens/s"
            progress("training", figures.step, steps, loss)

        report = run_finetuning_demo(name, screen, threads=threads, output=output, on_step=on_step)
    if as_json:
        print_json(dataclasses.asdict(report), default=str)
    else:
        _show(report, console)


def _show(report: "FineTuningReport", console: Console) -> None:
    console.print(f"\n\n[bold]Loss[/bold]  {report.losses[0]:.2f} {curve(report.losses)} {report.losses[-1]:.3f}")
    shown = table("part of the adapter", "where", ">size", title="Who trained what", boxed=True)
    places = ("here", "at the block server, with its optimizer", "here")
    for part, place, size in zip(
        ("input blocks", "middle blocks", "output blocks"), places, report.adapter_bytes, strict=True
    ):
        shown.add_row(part, place, f"{size / 1000:,.0f} kB")
    console.print(shown)
    console.print(
        f"{report.tokens:,} tokens of text in {report.seconds:.0f} s; {report.bytes_up / 1e6:.1f} MB of hidden states "
        f"and gradients went up, {report.bytes_down / 1e6:.1f} MB came down; text, labels and loss stayed here."
    )
    answers = table("", "", title=escape(report.question), boxed=True)
    answers.columns[1].ratio = 1
    answers.add_row("before", escape(report.before.strip()))
    answers.add_row("after", f"[bold]{escape(report.after.strip())}[/bold]")
    answers.add_row("unsplit model, adapter loaded by PEFT", escape(report.whole.strip()))
    console.print(answers)
    if report.adapter is not None:
        console.print(f"The adapter is in {escape(str(report.adapter))}.")
    show_commands(
        console,
        "With your own text[/bold] (docs/finetuning.md):",
        f"fedsea serve {quote(report.model)} --credentials credentials",
        f"fedsea finetune {quote(report.model)} --server localhost:7070 --credentials credentials/client-a "
        "--task chat --data my.jsonl",
    )


def curve(values: list[float]) -> str:
    """Numbers as a line of bars, the highest full."""
    top = max(values) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int(value / top * len(BARS)))] for value in values)
