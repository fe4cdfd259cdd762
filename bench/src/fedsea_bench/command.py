"""`fedsea bench`: figures that anyone can measure again."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.cli.options import ComputeDtype, Device, Threads, prepare_torch, require_folders, spread
from fedsea.errors import UsageError
from fedsea_bench.topics import TOPICS, check_topics, run_topics

if TYPE_CHECKING:  # --help needs no torch
    from fedsea_bench.results import Report

app = typer.Typer(help="Measure what FedSEA claims, on this machine.", no_args_is_help=True)


def _topics(bench: str) -> str:
    return f"Topics: {', '.join(TOPICS[bench])}."


JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the lines as a JSON list.")]
Plots = Annotated[Path | None, typer.Option(metavar="DIR", help="Draw curves as PNG files.")]
Strict = Annotated[
    bool, typer.Option("--strict", help="Exit with 1 if a measured target is missed; by default that is a result.")
]


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What is measured, how thoroughly, and where the lines go."""

    model: Annotated[str, typer.Option(help="The model to measure with.")] = "smollm2-135m"
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repetitions, smaller cases, rougher figures.")] = False
    only: Annotated[
        list[str] | None, typer.Option(metavar="TOPIC", help="Measure this only; may be given several times.")
    ] = None
    threads: Threads = None
    json_file: JsonFile = None
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the lines as a Markdown table.")] = None
    strict: Strict = False

    def run(self, bench: str, plots: Path | None = None, data: Path | None = None) -> None:
        """Check what was typed before anything slow is loaded, run a bench, write its lines, exit as `strict` asks."""
        from fedsea.checkpoints.names import check_model

        check_topics(bench, self.only or ())
        check_model(self.model)
        require_folders(self.json_file, self.markdown)
        import torch
        from rich.console import Console

        from fedsea_bench.results import markdown_table
        from fedsea_bench.workbench import Settings

        settings = Settings(self.model, self.quick, self.threads or torch.get_num_threads(), plots, data)
        console = Console()
        if self.quick:
            console.print("Quick: fewer repetitions and smaller cases; figures are rougher than those of a full run.")
        report = run_topics(bench, settings, console, self.only or [])
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
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For the topic quality: a folder each for CB and COPA.")
    ] = None,
    plots: Plots = None,
) -> None:
    """Training together: each strategy beside its definition, its time, its memory, and how good the adapter is."""
    options.run("federation", plots, data)


@app.command(epilog=_topics("privacy"))
@spread
def privacy(
    options: BenchOptions,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="For the topic frontier: a folder for CB.")] = None,
    plots: Plots = None,
) -> None:
    """What a provider reads of what is sent, beside a bound on what anybody can; by noise, attack and partition."""
    options.run("privacy", plots, data)


@app.command()
@spread
def quality(
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Holds a folder for each task: CB, RTE, MultiRC, XSum, with its splits.")
    ],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where results are kept; the same again goes on where it was.")
    ] = Path("fedsea-quality"),
    tasks: Annotated[str, typer.Option(metavar="NAMES", help="Names of tasks, with commas.")] = "cb,rte,multirc,xsum",
    levels: Annotated[
        str, typer.Option(metavar="LEVELS", help="Noise levels, multiples of the mean |h_A|, with commas.")
    ] = "0,0.1,0.3,1.0",
    mechanism: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A further protection, as for fedsea chat; may be given several times."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many times each training is done.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each training.")] = 150,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 4,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 5e-4,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest text, in training and evaluation.")] = 512,
    examples: Annotated[int, typer.Option(min=1, metavar="N", help="Evaluate on the first N of each task only.")] = 300,
    model: Annotated[str, typer.Option(help="The model to fine-tune.")] = "smollm2-135m",
    dtype: ComputeDtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    json_file: JsonFile = None,
    strict: Strict = False,
) -> None:
    """Fine-tune the whole model, the split, and the split with noise, and score all of them. Takes hours on a CPU."""
    require_folders(json_file)
    prepare_torch(device, threads)
    import torch
    from rich.console import Console

    from fedsea_bench.quality import Plan, QualityBench
    from fedsea_bench.quality_report import report_quality

    plan = Plan(
        data=data,
        tasks=tuple(name.strip().lower() for name in tasks.split(",") if name.strip()),
        levels=_numbers(levels),
        mechanisms=tuple(mechanism or ()),
        seeds=seeds,
        model=model,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        max_tokens=max_tokens,
        examples=examples,
        dtype=dtype,
        device=device,
        threads=threads or torch.get_num_threads(),
    )
    console = Console()
    with QualityBench(plan, output, console) as bench:
        results = bench.run()
    _end(report_quality(plan, results, output, console), json_file, strict)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"noise levels are numbers with commas between them; got {text!r}") from None
