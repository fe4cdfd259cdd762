"""`fedsea demo --audit`: what a provider reads, with and without protection."""

from shlex import quote
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsea.cli.terminal import escape, print_json

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.audit.report import Report
    from fedsea.demo.audience import Audience


def show_audit(name: str, audience: "Audience", console: Console, *, threads: int, as_json: bool) -> None:
    """Run the demonstration and show what it has measured, as it comes."""
    with audience.step("Loading PyTorch and transformers"):
        from fedsea.audit.report import finite
        from fedsea.demo.audit import run_audit_demo
    console.print("The provider knows the public model. What can it read of text that it is never sent?\n")
    demo = run_audit_demo(name, audience, threads=threads, on_report=lambda report: _texts(report, console))
    if as_json:
        print_json(finite([report.to_json() for report in demo.reports]))
    else:
        console.print(_table(demo.reports))
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


def _table(reports: "tuple[Report, ...]") -> Table:
    from fedsea.audit.report import share

    table = Table(title="What the provider reads", title_justify="left", title_style="bold", expand=True)
    table.add_column("protection")
    for name in ("text, by search", "answer, by read-out", "any attacker, at most*", "loss of the model"):
        table.add_column(name, justify="right")
    for report in reports:
        found = {finding.attack: finding for finding in report.findings}
        limit = report.limits.of_text
        table.add_row(
            "none" if report.noise_level == 0 else f"noise, {report.noise_level:.3g} ×",
            share(found["search"].prompt["tokens"].mean),
            share(found["read-out"].answer["tokens"].mean),
            "–" if limit is None else share(limit.accuracy),
            "–" if report.loss is None else f"{report.loss:.2f} nats",
        )
    table.caption = "noise as a multiple of the mean |h_A|   * of the text, estimated, by attacks yet unknown too"
    table.caption_justify = "left"
    return table


def _conclude(name: str, console: Console) -> None:
    console.print(
        "\nNoise strong enough to hide the text costs the model its use, until it is fine-tuned under it; and it "
        "does not hide the answer, which the provider computes itself. docs/trust.md says what helps."
    )
    console.print("\n[bold]With your own texts, and a page to show[/bold] (docs/privacy.md):")
    for command in (
        f"fedsea audit {quote(name)} --data my.txt --report report.html",
        f"fedsea calibrate {quote(name)} --max-recovery 0.05",
        f"fedsea chat {quote(name)} --server localhost:7070 --credentials credentials/client-a --show-leakage",
    ):
        console.print(f"  {escape(command)}", soft_wrap=True)
