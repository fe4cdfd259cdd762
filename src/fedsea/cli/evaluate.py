"""`fedsea evaluate`: how a model, whole or split, does on a task."""

import dataclasses
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedsea.cli.options import AsJson, ClientOptions, LookOptions, prepare_torch, spread
from fedsea.cli.progress import progress_bar
from fedsea.cli.terminal import print_json, working
from fedsea.errors import UsageError
from fedsea.files import write_text
from fedsea.tasks import task_names
from fedsea.text import json_text

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.tasks import Evaluation


# What of a client's options also means something without a server.
_WITHOUT_SERVER = {"model", "server", "dtype", "device", "threads"}


@dataclasses.dataclass(frozen=True)
class EvaluatedModel(ClientOptions):
    """Which model, split at a block server or whole in this process."""

    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="The block server.", show_default=False)] = ""
    whole: Annotated[bool, typer.Option("--whole", help="Run the whole model here, without a server.")] = False

    def check(self) -> None:
        """Check that the model is either split or whole.

        Raises
        ------
        FedSEAError
            If it is neither or both, an option is given that means nothing for a whole model, or one is wrong.
        """
        from fedsea.checkpoints.names import check_model

        if bool(self.server) == self.whole:
            raise UsageError("give --server HOST:PORT or --whole, one of them")
        if self.whole:
            for field in dataclasses.fields(ClientOptions):
                if field.name not in _WITHOUT_SERVER and getattr(self, field.name) != field.default:
                    raise UsageError(f"--{field.name.replace('_', '-')} is for --server; --whole needs none")
            check_model(self.model)
        else:
            super().check()

    def open(self, adapter: Path | None) -> AbstractContextManager[Any]:
        """Load the model with its adapter; a context manager that closes what it has opened.

        Raises
        ------
        FedSEAError
            Whatever is wrong with the options, the model, the adapter or the server.
        """
        if self.whole:
            return nullcontext(self._load_whole(adapter))
        model = self.connect()
        if adapter is not None:
            try:
                model.load_adapter(adapter, is_trainable=False)
            except BaseException:
                model.close()
                raise
        return model

    def _load_whole(self, adapter: Path | None) -> Any:
        prepare_torch(self.device, self.threads)
        import torch

        from fedsea.checkpoints import load_whole_model

        model = load_whole_model(self.model, dtype=getattr(torch, self.dtype), device=self.device)
        if adapter is None:
            return model
        return _with_adapter(model, adapter, self.model)


def _with_adapter(model: Any, adapter: Path, name: str) -> Any:
    """A whole model with a PEFT adapter, all of whose weights have found their place."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    from fedsea.training.export import with_cut

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing weights are told below, deprecations are not the user's
            adapted: Any = PeftModel.from_pretrained(model, str(adapter)).eval()
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            strangers = set(file.keys()) ^ set(get_peft_model_state_dict(adapted))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
    else:
        if not strangers:
            with_cut(model, adapter)
            return adapted
        reason = f"{len(strangers)} weights are only in one of them, such as {min(strangers)}"
    shown = reason if len(reason) <= 200 else reason[:200] + " …"
    raise UsageError(f"the adapter in {adapter} does not fit {name}: {shown}")


@spread
def evaluate(
    model: EvaluatedModel,
    task: Annotated[
        str,
        typer.Option(metavar="TASK", help=f"{', '.join(task_names())}."),
    ],
    data: Annotated[
        str, typer.Option(metavar="PATH", help="A file, a folder with its splits, or hub:NAME or hub:NAME:CONFIG.")
    ],
    split: Annotated[
        Literal["train", "validation"], typer.Option(help="Which split of a folder or a hub data set.")
    ] = "validation",
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="A PEFT adapter to evaluate with.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N examples only.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a batch.")] = 8,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest prompt with its answer; what is more is cut from the context.")
    ] = 1024,
    answer_loss: Annotated[
        bool, typer.Option("--answer-loss", help="Measure loss and perplexity of the right answers as well.")
    ] = False,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write each answer and what was right, as JSON lines.")
    ] = None,
    *,
    looks: LookOptions,
    as_json: AsJson = False,
) -> None:
    """Ask MODEL a task's questions, and score its answers with the task's official metrics."""
    if adapter is not None:
        from fedsea.checkpoints.names import check_adapter

        check_adapter(adapter)
    if predictions is not None and not predictions.parent.is_dir():
        raise UsageError(f"there is no folder {predictions.parent} to write {predictions.name} into")
    from fedsea.tasks import get_task

    chosen = get_task(task)
    chosen.check_packages()
    examples = chosen.read(data, split)[:limit]
    model.check()
    if model.whole and (looks.looks is not None or looks.max_looks is not None):
        raise UsageError("--looks is for --server; nothing leaves with --whole")
    with working(f"loading {model.model}"):
        from fedsea.checkpoints import load_tokenizer
        from fedsea.tasks import evaluate as evaluate_task

        tokenizer, ledger = load_tokenizer(model.model), looks.ledger()
        ready = model.open(adapter)
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
            progress=lambda done, every: progress(f"evaluating on {chosen.title}", done, every),
        )
    if predictions is not None:
        _write_predictions(result, predictions)
    if as_json:
        print_json({"model": model.model, "data": data, **result.to_json()})
    else:
        _print_table(result, chosen.title)


def _write_predictions(result: "Evaluation", file: Path) -> None:
    write_text(file, "".join(json_text(dataclasses.asdict(one)) + "\n" for one in result.predictions))


def _print_table(result: "Evaluation", title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(title)
    table.add_column("model", justify="right")
    if result.majority is not None:
        table.add_column(f"always {result.majority[0]}", justify="right")
    for name, value in result.metrics.items():
        cells = [name, f"{value:.4f}"]
        if result.majority is not None:
            cells.append(f"{result.majority[1][name]:.4f}" if name in result.majority[1] else "")
        table.add_row(*cells)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{result.count} examples, {result.unparsed} answers not readable, {result.cut} contexts cut")
