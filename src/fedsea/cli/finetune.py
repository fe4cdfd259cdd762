"""`fedsea finetune`: train a LoRA adapter of the split model on a task's or one's own text."""

import dataclasses
import hashlib
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedsea.cli.options import AsJson, ClientOptions, LookOptions, spread
from fedsea.cli.progress import NowAndThen, progress_bar
from fedsea.cli.terminal import print_json, tell, working
from fedsea.errors import FedSEAError, NonFiniteError, UsageError
from fedsea.extras import install_line
from fedsea.tasks import task_names

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.tasks import Example
    from fedsea.training.examples import Encoded
    from fedsea.training.loop import Figures, FineTuning, Recipe

MANY = 500  # examples to prepare, up to tens of milliseconds each: that is shown


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Which adapter to train."""

    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 8
    lora_alpha: Annotated[float | None, typer.Option(help="Its scale.", show_default="twice the rank")] = None
    lora_dropout: Annotated[float, typer.Option(min=0.0, max=0.99, help="Dropout of its inputs.")] = 0.0
    lora_targets: Annotated[str, typer.Option(metavar="NAMES", help="all-linear, or names such as q_proj,v_proj.")] = (
        "all-linear"
    )
    lora_kind: Annotated[Literal["lora", "rslora", "dora"], typer.Option(help="Plain LoRA, rsLoRA or DoRA.")] = "lora"

    def config(self) -> Any:
        """The same as PEFT takes it."""
        from peft import LoraConfig

        names = [name.strip() for name in self.lora_targets.split(",") if name.strip()]
        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            target_modules="all-linear" if names == ["all-linear"] else names,
            use_rslora=self.lora_kind == "rslora",
            use_dora=self.lora_kind == "dora",
        )


@dataclasses.dataclass(frozen=True)
class RecipeOptions:
    """How to train. The defaults are those of `Recipe`; a test holds that."""

    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps in all.")] = 200
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a batch.")] = 4
    accumulation: Annotated[int, typer.Option(min=1, help="Batches an optimizer step.")] = 1
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 5e-4
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Of AdamW.")] = 0.0
    schedule: Annotated[Literal["cosine", "linear", "constant"], typer.Option(help="Of the learning rate.")] = "cosine"
    warmup: Annotated[int, typer.Option(min=0, help="Steps in which the learning rate rises from 0.")] = 0
    max_grad_norm: Annotated[float, typer.Option(help="Clip the gradient over all three parts to this norm.")] = 1.0
    seed: Annotated[int, typer.Option(min=0, help="Decides the order of examples and the adapter's start.")] = 0
    save_every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 50

    def recipe(self) -> "Recipe":
        """The same as the training takes it.

        Raises
        ------
        UsageError
            If a value cannot be used.
        """
        from fedsea.training.loop import Recipe

        return Recipe(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What to learn."""

    task: Annotated[
        str,
        typer.Option(
            metavar="TASK",
            help=f"{', '.join(task_names())}; text and chat are for your own JSON lines.",
        ),
    ] = ""
    data: Annotated[
        str, typer.Option(metavar="PATH", help="A file, a folder with its splits, or hub:NAME or hub:NAME:CONFIG.")
    ] = ""
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Longest text; what is more is cut from the context, never question or answer.")
    ] = 512
    loss_on_prompt: Annotated[bool, typer.Option("--loss-on-prompt", help="Learn the prompts as well.")] = False
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N examples only.", show_default="all")
    ] = None

    def examples(self) -> "list[Example]":
        """Read the examples.

        Raises
        ------
        FedSEAError
            Whatever is wrong with the task or its files.
        """
        if not self.task or not self.data:
            raise UsageError("give --task TASK and --data PATH (see: fedsea finetune --help)")
        from fedsea.tasks import get_task

        return get_task(self.task).read(self.data, "train")[: self.limit]

    def read(self, model: str, examples: "list[Example] | None" = None) -> "list[Encoded]":
        """Tokenise the examples; they are read if they have not been.

        Raises
        ------
        FedSEAError
            Whatever is wrong with the task, its files or the model's tokenizer.
        """
        examples = self.examples() if examples is None else examples
        from fedsea.checkpoints import load_tokenizer
        from fedsea.tasks import encode, get_task

        task, tokenizer = get_task(self.task), load_tokenizer(model)

        def prepared(example: "Example") -> "Encoded":
            return encode(task, example, tokenizer, self.max_tokens, self.loss_on_prompt)

        if len(examples) < MANY:
            return [prepared(example) for example in examples]
        encoded = []
        with progress_bar() as progress:
            for done, example in enumerate(examples, 1):
                encoded.append(prepared(example))
                progress(f"preparing {len(examples):,} examples", done, len(examples))
        return encoded


@spread
def finetune(
    client: ClientOptions,
    data: DataOptions,
    lora: LoraOptions,
    recipe: RecipeOptions,
    looks: LookOptions,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where checkpoints, figures and the adapter go.")] = Path(
        "fedsea-run"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training in --output.")] = False,
    micro_batches: Annotated[
        int | None,
        typer.Option(min=1, help="Parts of a batch that are under way at once.", show_default="4, or 1 on one machine"),
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Keep no activations, here and at the server: slower, less memory.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA adapter of MODEL on private text; text, labels and loss stay here."""
    client.check()
    examples = data.examples()
    with working("loading libraries"):
        from fedsea.training.folder import RunFolder

        chosen, folder = recipe.recipe(), RunFolder(output, tell)
    if resume:
        folder.read()
    encoded = data.read(client.model, examples)
    tell_of(encoded)
    settings = {
        "model": client.model,
        "task": data.task,
        "examples": len(encoded),
        "examples_sha256": _digest(encoded),
        "noise_std": client.noise_std,
        "noise_level": client.noise_level,
        "mechanism": client.mechanism,
        "dtype": client.dtype,
        **dataclasses.asdict(lora),
        **dataclasses.asdict(recipe),
    }
    name = folder.resume(settings) if resume else None
    with client.connect() as model:
        from fedsea.training.batches import Batches
        from fedsea.training.loop import FineTuning

        model.look_ledger = looks.ledger(output / "looks.db")
        if micro_batches is not None:
            model.micro_batches = micro_batches
        if recompute:
            model.activation_checkpointing_enable()
        batches = Batches(encoded, chosen.batch_size, chosen.seed)
        config = lora.config()
        model.check_adapter(config)
        # The folder only now: a wrong address or adapter leaves nothing behind.
        name = name if name is not None else folder.begin(settings)
        model.add_adapter(config, run=name, take_up=resume, seed=chosen.seed)
        training = FineTuning(
            model, batches, chosen, folder, lora=config, base_model=model.config.name_or_path or None, notice=tell
        )
        if resume and training.resume():
            tell(f"going on from the checkpoint of step {training.step}")
        done = _train(training, folder, as_json=as_json)
        if done:
            model.end_run()
    summary = _summary(folder, training, done=done)
    if as_json:
        print_json(summary)
    elif done:
        print(f"The adapter is in {folder.adapter}: loss {summary['first_loss']:.3f} -> {summary['last_loss']:.3f}.")
        words = ["fedsea", "chat", client.model, "--adapter", str(folder.adapter), "--server", client.server]
        print(f"Chat with it:  {shlex.join(words)} ...")
    if not done:
        raise KeyboardInterrupt


def _train(training: "FineTuning", folder: Any, *, as_json: bool) -> bool:
    """Run the training to its end or to Ctrl-C, with progress; whatever happens is told with how to go on."""
    try:
        with (
            _stop_on_interrupt() as stop,
            _progress(training.recipe.steps, training.step, quiet=as_json) as show,
            _tensorboard(folder.path / "tensorboard", training.step) as write,
        ):

            def on_step(figures: "Figures") -> None:
                show(figures)
                write(figures)

            done = training.run(on_step, stop)
    except NonFiniteError:
        raise
    except FedSEAError as error:
        raise type(error)(f"{error}; go on with: {_again()}") from None
    if not done:
        tell(f"stopped after step {training.step}, and saved; go on with: {_again()}")
    return done


def tell_of(encoded: "list[Encoded]") -> None:
    """Say how many examples had to be cut."""
    cut = sum(example.cut > 0 for example in encoded)
    if cut:
        tell(f"{cut} of {len(encoded)} examples were cut to fit (their context, never question or answer)")


def _again() -> str:
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    return shlex.join(["fedsea", *arguments, "--resume"])


def _digest(encoded: "list[Encoded]") -> str:
    digest = hashlib.sha256()
    for example in encoded:
        digest.update(repr((example.input_ids, example.labels)).encode())
    return digest.hexdigest()


def _summary(folder: Any, training: "FineTuning", *, done: bool) -> dict[str, Any]:
    figures = list(folder.metrics())
    traffic = training.model.traffic
    return {
        "done": done,
        "step": training.step,
        "first_loss": figures[0]["loss"] if figures else None,
        "last_loss": figures[-1]["loss"] if figures else None,
        "tokens": sum(line["tokens"] for line in figures),
        "bytes_up": traffic.bytes_up,
        "bytes_down": traffic.bytes_down,
        "looks": ledger.most_seen() if (ledger := training.model.look_ledger) is not None else 0,
        "adapter": str(folder.adapter) if done else None,
        "output": str(folder.path),
    }


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks to stop after the step; a second one stops at once."""
    asked = False

    def ask(_number: int, _frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        said = "finishing this step, then saving; Ctrl-C again stops at once, and loses what is after the checkpoint"
        # In a thread: the main one may be in the middle of writing to the very stream, which takes no second call.
        threading.Thread(target=tell, args=(said,)).start()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(steps: int, begun: int, *, quiet: bool) -> "Iterator[Callable[[Figures], None]]":
    """Shows how far a training is: a bar in a terminal, else a line now and then; nothing if `quiet`."""
    if quiet:
        yield lambda _figures: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        due, start = NowAndThen(), time.monotonic()

        def line(figures: "Figures") -> None:
            if figures.step in (begun + 1, steps) or due():
                left = (time.monotonic() - start) / (figures.step - begun) * (steps - figures.step)
                tell(f"step {figures.step}/{steps}  {_words(figures)}  {left:.0f} s left")

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=steps, completed=begun, figures="")
        yield lambda figures: bar.update(task, completed=figures.step, figures=_words(figures))


def _words(figures: "Figures") -> str:
    moved = (figures.bytes_up + figures.bytes_down) / 1e6
    return f"loss {figures.loss:.3f}  {figures.tokens_per_second:.0f} tokens/s  {moved:.2f} MB a step"


@contextmanager
def _tensorboard(folder: Path, begun: int) -> "Iterator[Callable[[Figures], None]]":
    """Writes figures for TensorBoard, where it is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        tell("TensorBoard's logs are left out; this brings it", install_line("tensorboard"))
        yield lambda _figures: None
        return
    writer: Any = SummaryWriter(str(folder), purge_step=begun + 1)
    try:

        def write(figures: "Figures") -> None:
            for name, value in dataclasses.asdict(figures).items():
                if name != "step":
                    writer.add_scalar(f"train/{name}", value, figures.step)

        yield write
    finally:
        writer.close()
