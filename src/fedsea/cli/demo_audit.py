"""`fedsea demo --audit`: what a provider reads, with and without protection."""

from shlex import quote
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsea.cli.terminal import escape, print_json, show_commands, table

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.audit import Report
    from fedsea.demo.screen import Screen


def show_audit(name: str, screen: "Screen", console: Console, *, threads: int, as_json: bool) -> None:
    """Run the demonstration and show what it has measured, as it comes."""
    with screen.step("Loading PyTorch and transformers"):
        from fedsea.audit import finite
        from fedsea.demo.audit import run_audit_demo
    console.print("The provider knows the public model. What can it read of text that it is never sent?\n")
    reports = []
    for report in run_audit_demo(name, screen, threads=threads):
        _texts(report, console)
        reports.append(report)
    if as_json:
        print_json(finite([report.to_json() for report in reports]))
    else:
        console.print(_table(reports))
        _conclude(name, console)


def _texts(report: "Report", console: Console) -> None:
    """What was sent, and what the search made of it: right tokens bold, wrong ones dim and in angle brackets."""
    (finding,) = (one for one in report.findings if one.attack == "search")
    for ids, prompt, recovery in zip(report.ids, report.prompts, finding.recoveries, strict=True):
        sent = "".join(report.words[token] for token in ids[:prompt])
        console.print(f"  [bold]sent[/bold]  {escape(' '.join(sent.split()))}")
        read = Text("  ").append("read  ", style="bold")
        for token, guess in list(zip(ids, recovery.tokens, strict=True))[:prompt]:
            word = "▯" if guess is None else report.words[guess].replace("\n", " ")
            if guess == token:
                read.append(word, style="bold yellow")
            else:
                read.append(f"‹{word.strip()}›", style="dim")
        console.print(read)
    console.print()


def _table(reports: "list[Report]") -> Table:
    from fedsea.audit import share

    names = (">text, by search", ">answer, by read-out", ">any attacker, at most*", ">loss of the model")
    caption = "noise as a multiple of the mean |h_A|   * of the text, estimated, by attacks yet unknown too"
    shown = table("protection", *names, title="What the provider reads", caption=caption, boxed=True)
    for report in reports:
        found = {finding.attack: finding for finding in report.findings}
        shown.add_row(
            "none" if report.noise_level == 0 else f"noise, {report.noise_level:.3g} ×",
            share(found["search"].prompt["tokens"].mean),
            share(found["read-out"].answer["tokens"].mean),
            share(report.limits.any_attacker),
            "–" if report.loss is None else f"{report.loss:.2f} nats",
        )
    return shown


def _conclude(name: str, console: Console) -> None:
    console.print(
        "\nNoise strong enough to hide the text costs the model its use, until it is fine-tuned under it; and it "
        "does not hide the answer, which the provider computes itself. docs/trust.md says what helps."
    )
    show_commands(
        console,
        "With your own texts, and a page to show[/bold] (docs/privacy.md):",
        f"fedsea audit {quote(name)} --data my.txt --report report.html",
        f"fedsea calibrate {quote(name)} --max-recovery 0.05",
        f"fedsea chat {quote(name)} --server localhost:7070 --credentials credentials/client-a --show-leakage",
    )
