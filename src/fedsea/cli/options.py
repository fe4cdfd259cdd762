"""Options that several commands share: each is declared once, in a dataclass that a command takes as one argument."""

import dataclasses
import functools
import inspect
import math
import shlex
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
import typer

from fedsea.cli.terminal import tell
from fedsea.client.leak_notice import SEE
from fedsea.client.lookup import GUESSES
from fedsea.errors import UsageError
from fedsea.partition import Partition

if TYPE_CHECKING:  # a command's --help needs no torch
    from fedsea.client.model import SplitModelForCausalLM
    from fedsea.client.sampling import Sampling
    from fedsea.privacy import LookLedger, Noise

Dtype = Literal["float32", "bfloat16", "float16"]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="smollm2-135m (packaged: weights of 4 bits, made float32), a folder, a .gguf file, organisation/model at "
        "the Hugging Face hub, or random:CONFIG.",
        show_default=False,
    ),
]
ComputeDtype = Annotated[Dtype, typer.Option(help="What to compute in.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads to compute with.", show_default="as many as there are cores")
]
Credentials = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of this side's certificate, made by: fedsea credentials init."),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="No TLS. On loopback addresses only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
NoiseStd = Annotated[
    float | None, typer.Option(help="Standard deviation of the noise on what leaves.", show_default="no noise")
]
NoiseLevel = Annotated[
    float | None, typer.Option(help="The same, as a multiple of the mean |h_A|.", show_default="no noise")
]
WireDtype = Annotated[Dtype | None, typer.Option(help="What to send hidden states in.", show_default="16 bits")]


def _tell(line: str) -> None:
    """A model's notice; a command in it is to be pasted."""
    said, _, rest = line.partition(f"{SEE}: ")
    command, _, after = rest.partition(" (")
    tell(f"{said}{SEE}", command, f"({after}") if rest else tell(line)


@dataclasses.dataclass(frozen=True)
class ClientOptions:
    """Which model, split where, at which block server, with what noise."""

    model: Model
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="The block server.", show_default=False)]
    credentials: Credentials = None
    insecure: Insecure = False
    input_layers: Annotated[int, typer.Option(min=0, help="Decoder layers to run here, after the embedding.")] = 1
    output_layers: Annotated[int, typer.Option(min=0, help="Decoder layers to run here, before the head.")] = 1
    noise_std: NoiseStd = None
    noise_level: NoiseLevel = None
    mechanism: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Another protection of what leaves: clip:norm=30+gaussian:std=4, narrow-cut:rank=64+gaussian:std=4.",
            show_default="no noise",
        ),
    ] = None
    dtype: ComputeDtype = "float32"
    wire_dtype: WireDtype = None
    device: Device = "cpu"
    threads: Threads = None
    reconnect_seconds: Annotated[
        float, typer.Option(min=0.0, help="How long to try again after the connection is lost.")
    ] = 60.0

    def check(self) -> None:
        """Check what was typed, as far as that needs no library that takes seconds to load.

        Raises
        ------
        FedSEAError
            What is wrong with address, credentials, noise or model.
        """
        from fedsea.checkpoints.names import check_model

        check_connection(self.server, self.credentials, self.insecure)
        self._check_noise()
        check_model(self.model)

    def connect(self) -> "SplitModelForCausalLM":
        """Load the client's parts and meet the block server.

        Raises
        ------
        FedSEAError
            Whatever is wrong with the options, the model or the server.
        """
        self.check()
        noise = self.noise()
        prepare_torch(self.device, self.threads)
        from fedsea.client.model import SplitModelForCausalLM

        return SplitModelForCausalLM.from_pretrained(
            self.model,
            server=self.server,
            credentials=self.credentials,
            insecure=self.insecure,
            partition=Partition(self.input_layers, self.output_layers),
            noise=noise,
            dtype=self.dtype,
            wire_dtype=self.wire_dtype,
            device=self.device,
            reconnect_seconds=self.reconnect_seconds,
            notice=_tell,
        )

    def noise(self) -> "Noise":
        """What happens to hidden states before they leave, not calibrated.

        Raises
        ------
        UsageError
            If more than one of its options is given, or one cannot be used.
        """
        self._check_noise()
        from fedsea.privacy import GaussianNoise, RelativeGaussianNoise, parse_mechanism

        if self.mechanism is not None:
            return parse_mechanism(self.mechanism)
        if self.noise_level is not None:
            return RelativeGaussianNoise(self.noise_level)
        return GaussianNoise(self.noise_std or 0.0)

    def _check_noise(self) -> None:
        given = [
            option
            for option, value in (
                ("--noise-std", self.noise_std),
                ("--noise-level", self.noise_level),
                ("--mechanism", self.mechanism),
            )
            if value is not None
        ]
        if len(given) > 1:
            raise UsageError(f"give {' or '.join(given)}, not both: each says what noise there is")
        for option, value in (("--noise-std", self.noise_std), ("--noise-level", self.noise_level)):
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"{option} must be a number, 0 or more; got {value}")


@dataclasses.dataclass(frozen=True)
class AdaptedClientOptions(ClientOptions):
    """The same, with an adapter."""

    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A PEFT adapter of the model, from fedsea finetune or elsewhere.")
    ] = None

    def check(self) -> None:
        """The same, and the adapter's files."""
        from fedsea.checkpoints.names import check_adapter

        super().check()
        if self.adapter is not None:
            check_adapter(self.adapter)

    def connect(self) -> "SplitModelForCausalLM":
        """Load the client's parts, meet the block server, load the adapter on all three parts.

        Raises
        ------
        FedSEAError
            Whatever is wrong with the options, the model, the adapter or the server.
        """
        model = super().connect()
        if self.adapter is not None:
            try:
                model.load_adapter(self.adapter, is_trainable=False)
            except BaseException:
                model.close()
                raise
        return model


@dataclasses.dataclass(frozen=True)
class LookOptions:
    """How often texts may leave under fresh noise."""

    max_looks: Annotated[
        int | None,
        typer.Option(min=1, help="With noise: how often each text may leave under fresh noise.", show_default="no end"),
    ] = None
    looks: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where that is counted: one file for several commands.")
    ] = None

    def ledger(self, default: Path | None = None) -> "LookLedger | None":
        """What counts, in `default` if no file is named; None if there is neither.

        Raises
        ------
        UsageError
            If there is a limit and nowhere to count.
        """
        from fedsea.privacy import LookLedger

        path = self.looks or default
        if path is None and self.max_looks is not None:
            raise UsageError("--max-looks needs --looks FILE: where looks are counted, from one command to the next")
        return LookLedger(path, self.max_looks or 0) if path is not None else None


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """How long an answer may be, and how its tokens are chosen."""

    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 tokens are drawn.")] = 0.0
    top_k: Annotated[int | None, typer.Option(help="Draw from the K likeliest tokens only.", show_default="all")] = None
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens of total probability P only.", show_default="1")
    ] = None
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens that were there are less likely.")] = 1.0
    seed: Annotated[int | None, typer.Option(help="Draw the same tokens again.", show_default="a new one")] = None
    guesses: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Guess so many tokens ahead from the text; each right one saves a round trip.",
            show_default="8, or 0 with noise",
        ),
    ] = None

    def guessed(self, noise: "Noise") -> int:
        """How many tokens to guess ahead: without noise 8, with noise (an adapter's own too) none unless asked.

        A wrong guess shows the server one more noised state of a token that the text has elsewhere.
        """
        if self.guesses is not None:
            return self.guesses
        return 0 if noise.alters else GUESSES

    def sampling(self) -> "Sampling":
        """The same as the decode loop takes it.

        Raises
        ------
        UsageError
            If a value cannot be used.
        """
        from fedsea.client.sampling import Sampling

        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


def spread(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the fields of its dataclass parameters as options of its own.

    typer reads options from a function's signature. A parameter whose type is a dataclass is replaced by the
    dataclass's fields there, and filled from them when the command is called.
    """
    hints: dict[str, Any] = typing.get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        fields = inspect.signature(groups[name]).parameters.values() if name in groups else [parameter]
        parameters += [field.replace(kind=inspect.Parameter.KEYWORD_ONLY) for field in fields]

    @functools.wraps(command)
    def call(**values: Any) -> Any:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        return command(**values)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def require_one_security(credentials: Path | None, insecure: bool) -> None:
    """Check that TLS was either set up or declined.

    Raises
    ------
    UsageError
        If neither or both were given.
    """
    if credentials is not None and insecure:
        raise UsageError("give --credentials DIR or --insecure, not both")
    if credentials is None and not insecure:
        raise UsageError(
            "give --credentials DIR (made by: fedsea credentials init DIR), or --insecure on a loopback address"
        )


def check_connection(server: str, credentials: Path | None, insecure: bool) -> None:
    """Check an address and what is needed to connect to it, without connecting.

    Raises
    ------
    UsageError
        If it is no address, TLS was neither set up nor declined, or plaintext would leave this machine.
    CredentialsError
        If the credentials cannot be used.
    """
    from fedsea.wire.address import check_server

    require_one_security(credentials, insecure)
    check_server(server, plaintext=insecure)
    if credentials is not None:
        from fedsea.wire.credentials import Credentials as LoadedCredentials

        LoadedCredentials.load(credentials, role="client")


def prepare_torch(device: str, threads: int | None) -> None:
    """Check that the device is there, and compute with so many CPU threads (None: torch's own choice).

    Raises
    ------
    UsageError
        If there is no such device here.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise UsageError(f"there is no device {device!r} here; there is {', '.join(known)}") from None
    if threads is not None:
        torch.set_num_threads(threads)


def require_folders(*files: Path | None) -> None:
    """Check before a long run that there is a folder for each file.

    Raises
    ------
    UsageError
        If there is not.
    """
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise UsageError(f"there is no folder {file.parent} to write {file.name} into")


def command_line() -> str:
    """The command that is running, as it would be typed."""
    context = click.get_current_context(silent=True)
    arguments = context.find_root().obj if context is not None else None
    return shlex.join(["fedsea", *(arguments or ())])
