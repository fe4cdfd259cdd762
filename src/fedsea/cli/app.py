"""The tree of commands. Their modules import torch and gRPC only once they run, so that help comes at once."""

from importlib.metadata import entry_points
from typing import Annotated

import typer
import typer.core

import fedsea
from fedsea.cli import credentials, federation
from fedsea.cli.audit import audit
from fedsea.cli.calibrate import calibrate
from fedsea.cli.chat import chat
from fedsea.cli.demo import demo
from fedsea.cli.evaluate import evaluate
from fedsea.cli.export_adapter import export_adapter
from fedsea.cli.finetune import finetune
from fedsea.cli.generate import generate
from fedsea.cli.serve import serve
from fedsea.errors import UsageError

typer.core.HAS_RICH = False  # plain help: rich's tables cut words that are longer than a column, such as examples

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def _fedsea(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Use and fine-tune a large language model whose middle runs at a provider. Your text stays with you."""
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


def _bench_is_missing() -> None:
    """Measure what FedSEA claims, on this machine (a package of its own, not installed here)."""
    raise UsageError(
        "fedsea bench is a package of its own, which is not installed here; in a clone of FedSEA's repository: "
        "pip install ./bench"
    )


# The bench imports this package, so this package finds it by its name: a typer.Typer that its entry point names.
_benches = entry_points(group="fedsea.commands", name="bench")
if _benches:
    app.add_typer(next(iter(_benches)).load(), name="bench")
else:
    _any = {"ignore_unknown_options": True, "allow_extra_args": True}
    app.command("bench", context_settings=_any, add_help_option=False)(_bench_is_missing)
