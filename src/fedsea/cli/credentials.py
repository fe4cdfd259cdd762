"""`fedsea credentials`: what a block server and its clients need for mutual TLS."""

import dataclasses
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedsea.cli.terminal import escape, print_json
from fedsea.wire.credentials import CredentialsSummary, create_credentials

app = typer.Typer(help="Make and renew the certificates of a block server and its clients.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    # Without a callback, typer would take a group of one command for that command.
    pass


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to create or complete.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="A name or IP address that clients reach the server under; may be given several times."),
    ] = None,
    client: Annotated[
        list[str] | None,
        typer.Option(help="A client's name; may be given several times. Default: those in DIR, else client-a."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Create an authority, and certificates for server, coordinator and clients; or add, renew, keep what is there."""
    summary = create_credentials(directory, hosts=host or (), clients=client or None)
    if as_json:
        print_json(dataclasses.asdict(summary), default=str)
    else:
        _print(summary, Console(highlight=False))


def _print(summary: CredentialsSummary, console: Console) -> None:
    table = Table("for", "outcome", "valid until", "folder")
    for entry in summary.entries:
        table.add_row(entry.name, entry.outcome, f"{entry.expires:%Y-%m-%d}", escape(str(entry.folder)))
    console.print(table)
    authority, server, coordinator, *clients = summary.entries
    console.print(f"The server's certificate is good for: {', '.join(summary.hosts)}")
    console.print(
        f"Start the server:  fedsea serve MODEL --credentials {escape(quote(str(summary.directory)))}", soft_wrap=True
    )
    console.print(
        f"Whoever has {escape(str(coordinator.folder))} directs federated rounds at the server (fedsea federation).",
        soft_wrap=True,
    )
    for entry in clients:
        folder = escape(str(entry.folder))
        console.print(f"Copy to {entry.name}, over a channel you trust:  {folder}", soft_wrap=True)
    if server.outcome == "re-issued":
        console.print("Restart a running server: it still shows its old certificate.")
    console.print(
        f"Never copy {escape(str(authority.folder))}: whoever has it can make credentials for anyone.", soft_wrap=True
    )
