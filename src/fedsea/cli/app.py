"""The tree of commands. Their modules import torch and gRPC only once they run, so that help comes at once."""

from typing import Annotated

import typer

import fedsea
from fedsea.cli import bench, credentials, federation
from fedsea.cli.audit import audit
from fedsea.cli.calibrate import calibrate
from fedsea.cli.chat import chat
from fedsea.cli.demo import demo
from fedsea.cli.evaluate import evaluate
from fedsea.cli.export_adapter import export_adapter
from fedsea.cli.finetune import finetune
from fedsea.cli.generate import generate
from fedsea.cli.serve import serve

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def _fedsea(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Use and fine-tune a large language model whose middle is run by somebody else, on text that never leaves you."""
    if version:
        print(f"fedsea {fedsea.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(demo)
app.command()(chat)
app.command()(generate)
app.command()(finetune)
app.command()(evaluate)
app.command("export-adapter")(export_adapter)
app.command()(audit)
app.command()(calibrate)
app.command()(serve)
app.add_typer(credentials.app, name="credentials")
app.add_typer(federation.app, name="federation")
app.add_typer(bench.app, name="bench")
