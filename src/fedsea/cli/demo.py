"""`fedsea demo`: split inference on a real model, and what it shows."""

import dataclasses
import os
import shutil
import signal
import struct
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table

from fedsea.cli.demo_audit import show_audit
from fedsea.cli.demo_federation import show_federation
from fedsea.cli.demo_finetune import show_finetuning
from fedsea.cli.generate import stats_json
from fedsea.cli.options import AsJson
from fedsea.cli.spread import spread
from fedsea.cli.terminal import escape, interrupt_on, print_json, show_commands, table
from fedsea.demo.screen import Screen
from fedsea.errors import UsageError
from fedsea.flags import Flag, Threads
from fedsea.process import TOOLS

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.demo.inference import DemoReport

WIDTH = 96
SEEN_BY_THE_SERVER = "hidden states, from which\nthe text can be recovered"


@spread
def demo(
    model: Annotated[str, Flag("A chat model, named as for the other commands.")] = "smollm2-135m",
    finetune: Annotated[bool, Flag("Fine-tune the model on a few lines instead. Takes two minutes.")] = False,
    federation: Annotated[bool, Flag("Train one adapter with three clients instead. Takes three minutes.")] = False,
    audit: Annotated[bool, Flag("Show what a provider can read of private texts instead. Takes two minutes.")] = False,
    output: Annotated[
        Path | None, Flag("With --finetune or --federation: keep the training in this folder.", metavar="DIR")
    ] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """See how it works: a server and a client on this machine, one question, everything measured."""
    if finetune + federation + audit > 1:
        raise UsageError("one demonstration at a time: --finetune, --federation or --audit")
    if output is not None and not (finetune or federation):
        raise UsageError("--output is for --finetune and --federation; without them nothing is kept")
    from fedsea.checkpoints.names import check_model

    check_model(model)
    if audit:
        from fedsea.tasks.metrics import require_rouge

        require_rouge()
    console = Console(stderr=as_json, highlight=False)
    if console.width > WIDTH or not console.is_terminal:
        console = Console(stderr=as_json, highlight=False, width=WIDTH)
    console.print("[bold]FedSEA[/bold]: a language model whose middle runs in another process, over mutual TLS.\n")
    screen, threads = Screen(console), threads or os.cpu_count() or 1
    # A terminal that closes, or a `kill`, must not leave the block server behind.
    with interrupt_on(signal.SIGTERM, signal.SIGHUP):
        if finetune:
            show_finetuning(model, screen, console, threads=threads, output=output, as_json=as_json)
        elif federation:
            show_federation(model, screen, console, threads=threads, output=output, as_json=as_json)
        elif audit:
            show_audit(model, screen, console, threads=threads, as_json=as_json)
        else:
            _show_inference(model, screen, console, threads=threads, as_json=as_json)


def _show_inference(model: str, screen: Screen, console: Console, *, threads: int, as_json: bool) -> None:
    with screen.step("Loading PyTorch and transformers"):
        from fedsea.demo.inference import run_demo
    report = run_demo(model, screen, threads=threads)
    if as_json:
        print_json(_as_json(report))
    else:
        _show(report, console)


def _show(report: "DemoReport", console: Console) -> None:
    for part in (_holdings(report), _wire(report), _speeds(report)):
        console.print()
        console.print(part)
    console.print()
    same = sum(one == other for one, other in zip(report.tokens, report.whole_tokens, strict=False))
    verdict = "[bold green]equal[/bold green]" if report.equal else "[bold red]different[/bold red]"
    console.print(
        f"Split and whole model, token for token: {verdict} ({same} of {len(report.whole_tokens)} tokens the same)."
    )
    console.print(
        "What crosses is not the text, but it is not encryption either: without noise, as here, the provider "
        "can recover every token. docs/trust.md says what each party can learn, and what noise changes."
    )
    active = shutil.which("fedsea") is not None
    show_commands(
        console,
        "The server is stopped, its certificates are gone. Next:[/bold]",
        *(() if active else (f"source {quote(os.path.relpath(TOOLS / 'activate'))}",)),
        "fedsea credentials init credentials",
        f"fedsea serve {quote(report.model)} --credentials credentials",
        f"fedsea chat {quote(report.model)} --server localhost:7070 --credentials credentials/client-a",
    )
    console.print("[bold]Or teach it something that only you know, in two minutes:[/bold]  fedsea demo --finetune")
    console.print("[bold]Or see what the provider can read of your text, in two:[/bold]  fedsea demo --audit")
    console.print("[bold]Or have three clinics train it together, in three:[/bold]  fedsea demo --federation")


def _holdings(report: "DemoReport") -> Table:
    shown = table("process", "layers", ">weights", "sees", title="Who holds what", boxed=True)
    first, last = report.server_layers.start, report.server_layers.stop
    ends = f"embedding, {_layers(range(first))}, {_layers(range(last, report.num_layers))}, norm, head"
    shown.add_row("client (you)", ends, _mb(report.client_bytes), "text, tokens, logits")
    shown.add_row("block server", _layers(report.server_layers), _mb(report.server_bytes), SEEN_BY_THE_SERVER)
    shown.add_row("[dim]whole model[/dim]", f"[dim]all {report.num_layers} layers[/dim]", _mb(report.whole_bytes), "")
    return shown


def _wire(report: "DemoReport") -> Table:
    token, stats = report.wire_token, report.stats
    raw = token.text.encode()
    shown = table("", ">bytes", "", title="One token of the answer, at home and on the wire", boxed=True)
    shown.add_row("the token's text", f"{len(raw)}", f"[bold]{escape(repr(token.text))}[/bold]  {raw.hex(' ')}")
    crossed = (("what left for it", token.up, token.up_bytes), ("what came back", token.down, token.down_bytes))
    for name, state, size in crossed:
        numbers = "  ".join(f"{number:+.4f}" for number in struct.unpack("<4e", state[:8]))
        shown.add_row(name, f"{size:,}", f"{numbers}  …\n[dim]{state[:8].hex(' ')} …[/dim]")
    shown.add_row(
        "the whole answer",
        f"{stats.bytes_up + stats.bytes_down:,}",
        f"{stats.bytes_up:,} up, {stats.bytes_down:,} down, {stats.round_trips} round trips for "
        f"{stats.prompt_tokens} tokens of the question and {stats.tokens} of the answer, as 16-bit numbers",
    )
    return shown


def _speeds(report: "DemoReport") -> Table:
    shown = table("", ">tokens/s", "", title="Speed on this machine", boxed=True)
    cached = report.stats.tokens_per_second
    shown.add_row("split, two processes", f"{cached:.1f}", f"first token after {report.stats.seconds_to_first:.2f} s")
    whole = report.whole_tokens_per_second
    shown.add_row(
        "whole model, one process", f"{whole:.1f}", f"transformers' generate; the split is {cached / whole:.2f} ×"
    )
    uncached = report.uncached_tokens_per_second
    shown.add_row(
        "split, without the KV cache",
        f"{uncached:.1f}",
        f"{report.uncached_context} tokens of context; the cache gains {cached / uncached:.1f} ×, more in longer texts",
    )
    return shown


def _layers(layers: range) -> str:
    if not layers:
        return "no layer"
    return f"layer {layers.start}" if len(layers) == 1 else f"layers {layers.start} to {layers.stop - 1}"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _as_json(report: "DemoReport") -> dict[str, Any]:
    token = report.wire_token
    return {
        "model": report.model,
        "question": report.question,
        "answer": report.answer,
        "client": {"weight_bytes": report.client_bytes},
        "server": {
            "weight_bytes": report.server_bytes,
            "layers": [report.server_layers.start, report.server_layers.stop],
        },
        "whole": {
            "weight_bytes": report.whole_bytes,
            "layers": report.num_layers,
            "tokens_per_second": report.whole_tokens_per_second,
        },
        "tokens": report.tokens,
        "whole_tokens": report.whole_tokens,
        "equal": report.equal,
        "stats": stats_json(report.stats),
        "uncached": {"context": report.uncached_context, "tokens_per_second": report.uncached_tokens_per_second},
        "wire_token": dataclasses.asdict(token) | {"up": token.up.hex(), "down": token.down.hex()},
    }
