"""`fedsea finetune`: train a LoRA adapter of the split model on a task's or one's own text."""

import dataclasses
import hashlib
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fedsea.cli.options import AsJson, ClientOptions, DataPath, Limit, LookOptions, TaskName, parse_noise
from fedsea.cli.spread import command_line, spread
from fedsea.cli.terminal import print_json, progress_bar, stop_on_interrupt, tell, working
from fedsea.errors import FedSEAError, NonFiniteError, UsageError
from fedsea.extras import install_line
from fedsea.flags import Flag
from fedsea.tasks import get_task
from fedsea.training.recipe import Lora, Recipe

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.tasks import Example
    from fedsea.training.examples import Encoded
    from fedsea.training.loop import Figures, FineTuning

MANY = 500  # examples to prepare, up to tens of milliseconds each: that is shown


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What to learn."""

    task: TaskName = ""
    data: DataPath = ""
    max_tokens: Annotated[
        int, Flag("Longest text, in tokens. Longer ones lose context, never question or answer.", min=2)
    ] = 512
    loss_on_prompt: Annotated[bool, Flag("Learn the prompts as well, not only the answers.")] = False
    limit: Limit = None

    def examples(self) -> "list[Example]":
        if not self.task or not self.data:
            raise UsageError("give --task TASK and --data PATH (see: fedsea finetune --help)")
        return get_task(self.task).read(self.data, "train")[: self.limit]

    def encode(self, model: str, examples: "list[Example]") -> "list[Encoded]":
        """Tokenise the examples, and say how many had to be cut."""
        from fedsea.checkpoints import load_tokenizer
        from fedsea.tasks import encode

        task, tokenizer, encoded = get_task(self.task), load_tokenizer(model), []
        with progress_bar(quiet=len(examples) < MANY) as progress:
            for done, example in enumerate(examples, 1):
                encoded.append(encode(task, example, tokenizer, self.max_tokens, self.loss_on_prompt))
                progress(f"preparing {len(examples):,} examples", done, len(examples))
        cut = sum(example.cut > 0 for example in encoded)
        if cut:
            tell(f"{cut} of {len(encoded)} examples were cut to fit (their context, never question or answer)")
        return encoded


@spread
def finetune(
    client: ClientOptions,
    data: DataOptions,
    lora: Lora,
    recipe: Recipe,
    looks: LookOptions,
    output: Annotated[Path, Flag("Folder for checkpoints, figures and the adapter.", metavar="DIR")] = Path(
        "fedsea-run"
    ),
    resume: Annotated[bool, Flag("Continue the training in --output.")] = False,
    micro_batches: Annotated[
        int | None,
        Flag("Parts of a batch that are computed at the same time.", min=1, default="4, or 1 on one machine"),
    ] = None,
    recompute: Annotated[bool, Flag("Keep no activations, here and at the server: slower, with less memory.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA adapter of MODEL on private text; text, labels and loss stay here."""
    examples = data.examples()
    client.check()
    with working("loading libraries"):
        from peft import LoraConfig

        from fedsea.parts.adapters import AdapterSpec
        from fedsea.training.batches import Batches
        from fedsea.training.folder import RunFolder
        from fedsea.training.loop import FineTuning
    folder = RunFolder(output, tell)
    if resume:
        folder.read()
    encoded = data.encode(client.model, examples)
    noise = parse_noise(client.noise)
    settings = {
        "model": client.model,
        "task": data.task,
        "examples": len(encoded),
        "examples_sha256": _digest(encoded),
        "noise": str(noise) if noise.alters else "",
        "dtype": client.dtype,
        **{f"lora_{name}": value for name, value in dataclasses.asdict(lora).items()},
        **dataclasses.asdict(recipe),
    }
    name = folder.resume(settings) if resume else None
    with client.connect((data.task, data.data)) as model:
        model.look_ledger = looks.ledger(output / "looks.db")
        if micro_batches is not None:
            model.micro_batches = micro_batches
        if recompute:
            model.activation_checkpointing_enable()
        config = LoraConfig(**lora.arguments())
        AdapterSpec.from_config(config, model.config)  # refuses what cannot be trained
        # The folder only now: a wrong address or adapter leaves nothing behind.
        name = name if name is not None else folder.begin(settings)
        model.add_adapter(config, run=name, take_up=resume, seed=recipe.seed)
        training = FineTuning(
            model,
            Batches(encoded, recipe.batch_size, recipe.seed),
            recipe,
            folder,
            lora=config,
            base_model=model.config.name_or_path or None,
            notice=tell,
        )
        if resume and training.resume():
            tell(f"going on from the checkpoint of step {training.step}")
        done = _train(training, folder, as_json=as_json)
        if done:
            model.adapter.end_run()
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
    """Run the training to its end or to Ctrl-C, with progress; an error and a stop say how to continue."""
    again = f"go on with: {command_line('--resume')}"
    stopping = "finishing this step, then saving; Ctrl-C again stops at once, and loses the steps after the checkpoint"
    try:
        with (
            stop_on_interrupt(stopping) as stop,
            progress_bar(quiet=as_json) as progress,
            _tensorboard(folder.path / "tensorboard", training.step) as write,
        ):

            def on_step(figures: "Figures") -> None:
                progress("training", figures.step, training.recipe.steps, _words(figures))
                write(figures)

            done = training.run(on_step, stop)
    except NonFiniteError:
        raise
    except FedSEAError as error:
        raise type(error)(f"{error}; {again}") from None
    if not done:
        tell(f"stopped after step {training.step}, and saved; {again}")
    return done


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


def _words(figures: "Figures") -> str:
    moved = (figures.bytes_up + figures.bytes_down) / 1e6
    return f"loss {figures.loss:.3f}  {figures.tokens_per_second:.0f} tokens/s  {moved:.2f} MB a step"


@contextmanager
def _tensorboard(folder: Path, begun: int) -> "Iterator[Callable[[Figures], None]]":
    """Writes figures for TensorBoard, if that is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        tell("no logs for TensorBoard are written; this installs it", install_line("tensorboard"))
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
