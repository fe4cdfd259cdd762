"""`fedsea evaluate`: how a model, whole or split, does on a task."""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fedsea.cli.options import (
    AdaptedClientOptions,
    AsJson,
    DataPath,
    Limit,
    LookOptions,
    TaskName,
    prepare_torch,
    require_folders,
)
from fedsea.cli.spread import given_options, spread
from fedsea.cli.terminal import print_json, progress_bar, table, working
from fedsea.errors import UsageError
from fedsea.files import write_text
from fedsea.flags import Flag
from fedsea.tasks import Split, get_task
from fedsea.tasks.sandbox import require_sandbox
from fedsea.text import json_text

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.tasks import Evaluation

OF_A_SERVER = {"credentials", "insecure", "input_layers", "output_layers", "noise", "wire_dtype", "reconnect_seconds"}
OF_A_SERVER |= {"looks", "max_looks"}


@dataclasses.dataclass(frozen=True)
class EvaluatedModel(AdaptedClientOptions):
    """Which model, split at a block server or whole in this process."""

    server: Annotated[str, Flag("Address of the block server.", metavar="HOST:PORT")] = ""
    whole: Annotated[bool, Flag("Run the whole model here, without a server.")] = False

    def check(self) -> None:
        """The same, and that the model is either split or whole."""
        from fedsea.checkpoints.names import check_adapter, check_model

        if bool(self.server) == self.whole:
            raise UsageError("give either --server HOST:PORT or --whole")
        if not self.whole:
            super().check()
            return
        needless = sorted(given_options() & OF_A_SERVER)
        if needless:
            raise UsageError(f"--{needless[0].replace('_', '-')} is for --server; --whole needs none")
        check_model(self.model)
        check_adapter(self.adapter)

    def open(self) -> AbstractContextManager[Any]:
        """Load the model with its adapter; a context manager that closes what it has opened."""
        if not self.whole:
            return self.connect()
        prepare_torch(self.device, self.threads)
        import torch

        from fedsea.checkpoints import load_whole_model
        from fedsea.training.export import whole_with_adapter

        model = load_whole_model(self.model, dtype=getattr(torch, self.dtype), device=self.device)
        return nullcontext(model if self.adapter is None else whole_with_adapter(model, self.adapter, self.model))


@spread
def evaluate(
    model: EvaluatedModel,
    task: TaskName,
    data: DataPath,
    split: Annotated[Split, Flag("Which split of a folder or a hub data set.")] = "validation",
    limit: Limit = None,
    batch_size: Annotated[int, Flag("Examples in a batch.", min=1)] = 8,
    max_tokens: Annotated[
        int, Flag("Longest prompt with its answer, in tokens. Longer ones lose context.", min=1)
    ] = 1024,
    answer_loss: Annotated[bool, Flag("Measure loss and perplexity of the right answers as well.")] = False,
    run_code: Annotated[
        bool, Flag("Run the programs that the model writes on this machine, in a sandbox: humaneval asks for it.")
    ] = False,
    predictions: Annotated[
        Path | None, Flag("Write each answer, and the right ones, to this file as JSON lines.", metavar="FILE")
    ] = None,
    *,
    looks: LookOptions,
    as_json: AsJson = False,
) -> None:
    """Give MODEL a task's questions, and score its answers with the task's official metrics."""
    require_folders(predictions)
    chosen = get_task(task)
    chosen.check_packages()
    if chosen.runs_code and run_code:
        require_sandbox()
    elif chosen.runs_code and not answer_loss:
        raise UsageError(
            f"{chosen.title} is scored by running what the model writes on this machine, in a sandbox (docs/tasks.md): "
            "give --run-code to allow it, or --answer-loss to measure only the loss of the right answers"
        )
    examples = chosen.read(data, split)[:limit]
    model.check()
    with working(f"loading {model.model}"):
        from fedsea.checkpoints import load_tokenizer
        from fedsea.tasks import evaluate as evaluate_task

        tokenizer, ledger = load_tokenizer(model.model), looks.ledger()
        ready = model.open()
    with ready as opened, progress_bar(quiet=as_json) as progress:
        if ledger is not None:
            opened.look_ledger = ledger
        result = evaluate_task(
            opened,
            tokenizer,
            chosen,
            examples,
            batch_size=batch_size,
            max_tokens=max_tokens,
            answer_loss=answer_loss,
            run_code=run_code,
            progress=lambda done, total: progress(f"evaluating on {chosen.title}", done, total),
        )
    if predictions is not None:
        write_text(predictions, "".join(json_text(dataclasses.asdict(one)) + "\n" for one in result.predictions))
    if as_json:
        print_json({"model": model.model, "data": data, **result.to_json()})
    else:
        _print_table(result, chosen.title)


def _print_table(result: "Evaluation", title: str) -> None:
    from rich.console import Console

    always, baseline = result.majority or ("", {})
    shown = table(title, ">model", *([f">always {always}"] if always else []))
    for name, value in result.metrics.items():
        of_baseline = [f"{baseline[name]:.4f}" if name in baseline else ""] if always else []
        shown.add_row(name, f"{value:.4f}", *of_baseline)
    console = Console(highlight=False)
    console.print(shown)
    console.print(f"{result.count} examples, {result.unparsed} answers not readable, {result.cut} contexts cut")
