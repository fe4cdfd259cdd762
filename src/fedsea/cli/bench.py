"""`fedsea bench`: figures that anyone can measure again."""

from pathlib import Path
from typing import Annotated

import typer

from fedsea.cli.options import Threads
from fedsea.errors import UsageError

app = typer.Typer(help="Measure what FedSEA claims, on this machine.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    # Without a callback, typer would take a group of one command for that command.
    pass


@app.command()
def inference(
    model: Annotated[str, typer.Option(help="The model to measure with.")] = "smollm2-135m",
    quick: Annotated[
        bool, typer.Option("--quick", help="Under a minute on two cores: fewer repetitions, smaller cases.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="TOPIC", help="Measure this only; may be given several times.")
    ] = None,
    threads: Threads = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the lines as a JSON list.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the lines as a Markdown table.")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw curves as PNG files.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a measured target is missed; by default that is a result.")
    ] = False,
) -> None:
    """Private inference beside the whole model: exactness, speed, bytes, memory. A full run takes about ten minutes."""
    for file in (json_file, markdown):
        if file is not None and not file.parent.is_dir():
            raise UsageError(f"there is no folder {file.parent} to write {file.name} into")
    import torch
    from rich.console import Console

    from fedsea.bench.inference import run
    from fedsea.bench.results import markdown_table, write_json
    from fedsea.bench.workbench import Settings

    settings = Settings(model, quick, threads or torch.get_num_threads(), plots)
    console = Console()
    if quick:
        console.print("Quick: fewer repetitions and smaller cases; figures are rougher than those of a full run.")
    report = run(settings, console, only or ())
    console.print(report.summary())
    if json_file is not None:
        write_json(report.lines, json_file)
    if markdown is not None:
        markdown.write_text(markdown_table(report.lines))
    if strict and report.failed:
        raise typer.Exit(1)
