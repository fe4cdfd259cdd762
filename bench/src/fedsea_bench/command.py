"""`fedsea bench`: figures that anyone can measure again."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.cli.options import prepare_torch, require_folders
from fedsea.cli.spread import spread
from fedsea.flags import Flag, Threads
from fedsea_bench.quality_plan import SEVERAL, Plan
from fedsea_bench.topics import TOPICS, check_topics, run_topics

if TYPE_CHECKING:  # --help needs no torch
    from fedsea_bench.results import Report

app = typer.Typer(help="Measure what FedSEA claims, on this machine.", no_args_is_help=True)


def _topics(bench: str) -> str:
    return f"Topics: {', '.join(TOPICS[bench])}."


JsonFile = Annotated[Path | None, Flag("Write the lines as a JSON list.", "--json", metavar="FILE")]
Plots = Annotated[Path | None, Flag("Draw curves as PNG files.", metavar="DIR")]
Save = Annotated[Path | None, Flag("Write a JSON file for each topic, as docs/results has them.", metavar="DIR")]
Strict = Annotated[bool, Flag("Exit with 1 if a measured target is missed; by default that is a result.", "--strict")]


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What is measured, how thoroughly, and where the lines go."""

    model: Annotated[str, Flag("The model to measure with.")] = "smollm2-135m"
    quick: Annotated[bool, Flag("Fewer repetitions, smaller cases, rougher figures.", "--quick")] = False
    only: Annotated[list[str] | None, Flag(f"Measure this only; {SEVERAL}.", metavar="TOPIC")] = None
    threads: Threads = None
    json_file: JsonFile = None
    markdown: Annotated[Path | None, Flag("Write the lines as a Markdown table.", metavar="FILE")] = None
    save: Save = None
    strict: Strict = False

    def run(self, bench: str, plots: Path | None = None, data: Path | None = None) -> None:
        """Check what was typed before anything slow is loaded, run a bench, write its lines, exit as `strict` asks."""
        from fedsea.checkpoints.names import check_model

        check_topics(bench, self.only or ())
        check_model(self.model)
        require_folders(self.json_file, self.markdown)
        import torch
        from rich.console import Console

        from fedsea_bench import saved
        from fedsea_bench.results import Line, markdown_table
        from fedsea_bench.workbench import Settings

        def keep(topic: str, lines: Sequence[Line]) -> None:
            if self.save is not None:
                more = {"only": topic} | ({"data": data} if data is not None else {})
                saved.save(self.save, f"{bench}-{topic}", saved.command(bench, self, **more), lines)

        settings = Settings(self.model, self.quick, self.threads or torch.get_num_threads(), plots, data)
        console = Console()
        if self.quick:
            console.print("Quick: fewer repetitions and smaller cases; figures are rougher than those of a full run.")
        report = run_topics(bench, settings, console, self.only or [], keep)
        if self.markdown is not None:
            self.markdown.write_text(markdown_table(report.lines))
        _end(report, self.json_file, self.strict)


def _end(report: "Report", json_file: Path | None, strict: bool) -> None:
    from fedsea_bench.results import write_json

    report.console.print(report.summary())
    if json_file is not None:
        write_json(report.lines, json_file)
    if strict and report.failed:
        raise typer.Exit(1)


@app.command(epilog=_topics("inference"))
@spread
def inference(options: BenchOptions, plots: Plots = None) -> None:
    """Private inference beside the whole model: exactness, speed, bytes, memory. A full run takes about ten minutes."""
    options.run("inference", plots)


@app.command(epilog=_topics("training"))
@spread
def training(options: BenchOptions) -> None:
    """Fine-tuning through the split beside PEFT on the whole model: exactness, speed, bytes, memory."""
    options.run("training")


@app.command(epilog=_topics("federation"))
@spread
def federation(
    options: BenchOptions,
    data: Annotated[Path | None, Flag("For the topic quality: a folder each for CB and COPA.", metavar="DIR")] = None,
    plots: Plots = None,
) -> None:
    """Training together: each strategy beside its definition, its time, its memory, and how good the adapter is."""
    options.run("federation", plots, data)


@app.command(epilog=_topics("privacy"))
@spread
def privacy(
    options: BenchOptions,
    data: Annotated[Path | None, Flag("For the topic frontier: a folder for CB.", metavar="DIR")] = None,
    plots: Plots = None,
) -> None:
    """What a provider reads of what is sent, beside a bound on any attacker; by noise, attack and partition."""
    options.run("privacy", plots, data)


@app.command()
@spread
def quality(
    plan: Plan,
    output: Annotated[Path, Flag("Where results are kept; the same again goes on where it was.", metavar="DIR")] = Path(
        "fedsea-quality"
    ),
    json_file: JsonFile = None,
    save: Save = None,
    strict: Strict = False,
) -> None:
    """Fine-tune the whole model, the split, and the split with noise, and score all of them. Takes hours on a CPU."""
    require_folders(json_file)
    prepare_torch(plan.device, plan.threads)
    from rich.console import Console

    from fedsea_bench import saved
    from fedsea_bench.quality import QualityBench
    from fedsea_bench.quality_report import report_quality

    console = Console()
    with QualityBench(plan, output, console) as bench:
        results = bench.run()
    report = report_quality(plan, results, output, console)
    if save is not None:
        saved.save(save, f"quality-{'-'.join(plan.names)}", saved.command("quality", plan), report.lines)
    _end(report, json_file, strict)


@app.command("families")
@spread
def which_families(
    names: Annotated[list[str] | None, typer.Argument(metavar="TYPE", help="Types of models; all by default.")] = None,
    output: Annotated[Path | None, Flag("Write the page docs/models.md.", metavar="FILE")] = None,
    json_file: JsonFile = None,
) -> None:
    """Compare a tiny random model of each of transformers' families split and whole. Takes three minutes for all."""
    require_folders(output, json_file)
    prepare_torch("cpu", None)
    import json

    from fedsea.cli.terminal import working
    from fedsea_bench.families import families, page

    found = []
    with working("comparing families"):
        for one in families(names or ()):
            found.append(one)
            print(one.row, flush=True)
    print(f"{sum(not one.why_not for one in found)} of {len(found)} types are equal, split and whole")
    if output is not None:
        output.write_text(page(found), encoding="utf-8")
    if json_file is not None:
        json_file.write_text(json.dumps([dataclasses.asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")


@app.command()
def figures(
    docs: Annotated[Path, typer.Argument(metavar="DIR", help="The pages, with what --save wrote in results/.")] = Path(
        "docs"
    ),
) -> None:
    """Fill the figures of the docs' pages from the saved results."""
    from fedsea_bench.saved import fill_pages

    for page in fill_pages(docs):
        print(f"{page} has new figures")
