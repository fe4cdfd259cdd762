"""`fedsea credentials`: what a block server and its clients need for mutual TLS."""

import dataclasses
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.cli.options import AsJson
from fedsea.cli.spread import spread
from fedsea.cli.terminal import escape, print_json, table
from fedsea.flags import Flag

if TYPE_CHECKING:  # --help needs no gRPC
    from fedsea.wire.credential_files import CredentialsSummary

app = typer.Typer(help="Make and renew the certificates of a block server and its clients.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    # Without a callback, typer would take a group of one command for that command.
    pass


@app.command()
@spread
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to create or complete.")],
    host: Annotated[
        list[str] | None, Flag("A name or IP address by which clients reach the server; may be given several times.")
    ] = None,
    client: Annotated[
        list[str] | None, Flag("A client's name; may be given several times.", default="those in DIR, else client-a")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create an authority, and certificates for server, coordinator and clients; or add, renew, keep existing ones."""
    from fedsea.wire.credential_files import create_credentials

    summary = create_credentials(directory, hosts=host or (), clients=client or None)
    if as_json:
        print_json(dataclasses.asdict(summary), default=str)
    else:
        _print(summary)


def _print(summary: "CredentialsSummary") -> None:
    from rich.console import Console

    made = table("for", "outcome", "valid until", "folder")
    for entry in summary.entries:
        made.add_row(entry.name, entry.outcome, f"{entry.expires:%Y-%m-%d}", escape(str(entry.folder)))
    console = Console(highlight=False, soft_wrap=True)
    console.print(made, soft_wrap=False)
    authority, server, coordinator, *clients = summary.entries
    console.print(f"The server's certificate is valid for: {', '.join(summary.hosts)}")
    console.print(f"Start the server:  fedsea serve MODEL --credentials {escape(quote(str(summary.directory)))}")
    console.print(f"Keep {escape(str(coordinator.folder))} private: it directs federated rounds at the server.")
    for entry in clients:
        console.print(f"Copy to {entry.name}, over a channel you trust:  {escape(str(entry.folder))}")
    if server.outcome == "re-issued":
        console.print("Restart a running server: it still uses its old certificate.")
    console.print(f"Never copy {escape(str(authority.folder))}: it can make credentials for anyone.")
