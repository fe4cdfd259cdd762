"""Options that several commands share.

Each option is declared once: those of a recipe, of limits, of sampling or of a partition in their own rooms, the others
here. `fedsea.flags.Flag` says how a field is written; `fedsea.cli.spread` makes options of it.
"""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.cli.terminal import tell
from fedsea.client import GREEDY, GUESSES, SEE, Sampling
from fedsea.errors import UsageError
from fedsea.flags import DATA, Adapter, ComputeDtype, Device, Flag, Noise, Threads, WireDtype
from fedsea.partition import Partition
from fedsea.tasks import task_names

if TYPE_CHECKING:  # a command's --help needs no torch
    from fedsea.client import SplitModelForCausalLM
    from fedsea.privacy import LookLedger
    from fedsea.privacy import Noise as Mechanism

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="smollm2-135m (a Python package: 4-bit weights, read as float32), a folder, a .gguf file, "
        "organisation/model at the Hugging Face hub, or random:CONFIG.",
        show_default=False,
    ),
]
Credentials = Annotated[
    Path | None, Flag("Folder with this side's certificate, made by: fedsea credentials init.", metavar="DIR")
]
Insecure = Annotated[bool, Flag("Connect without TLS. On this machine only.")]
AsJson = Annotated[bool, Flag("Print one JSON object, for programs.", "--json")]
TaskName = Annotated[
    str, Flag(f"{', '.join(task_names())}; text and chat are for JSON lines of yours.", metavar="TASK")
]
DataPath = Annotated[str, DATA]
Limit = Annotated[int | None, Flag("Use the first N examples only.", min=1, metavar="N", default="all")]


def _tell(line: str) -> None:
    """A model's notice; a command in it is to be pasted."""
    said, _, rest = line.partition(f"{SEE}: ")
    command, _, after = rest.partition(" (")
    tell(f"{said}{SEE}", command, f"({after}") if rest else tell(line)


@dataclasses.dataclass(frozen=True)
class ClientOptions:
    """Which model, split where, at which block server, with what noise."""

    model: Model
    server: Annotated[str, Flag("Address of the block server.", metavar="HOST:PORT")]
    credentials: Credentials = None
    insecure: Insecure = False
    partition: Partition = Partition()
    noise: Noise = ""
    dtype: ComputeDtype = "float32"
    wire_dtype: WireDtype = None
    device: Device = "cpu"
    threads: Threads = None
    reconnect_seconds: Annotated[
        float, Flag("Seconds to try to connect again after the connection is lost.", min=0.0)
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
        check_noise(self.noise)
        check_model(self.model)

    def connect(self) -> "SplitModelForCausalLM":
        """Load the client's parts and connect to the block server.

        Raises
        ------
        FedSEAError
            Whatever is wrong with the options, the model or the server.
        """
        self.check()
        noise = parse_noise(self.noise)
        prepare_torch(self.device, self.threads)
        from fedsea.client import SplitModelForCausalLM

        return SplitModelForCausalLM.from_pretrained(
            self.model,
            server=self.server,
            credentials=self.credentials,
            insecure=self.insecure,
            partition=self.partition,
            noise=noise,
            dtype=self.dtype,
            wire_dtype=self.wire_dtype,
            device=self.device,
            reconnect_seconds=self.reconnect_seconds,
            notice=_tell,
        )


@dataclasses.dataclass(frozen=True)
class AdaptedClientOptions(ClientOptions):
    """The same, with an adapter."""

    adapter: Adapter = None

    def check(self) -> None:
        """The same, and the adapter's files."""
        from fedsea.checkpoints.names import check_adapter

        super().check()
        if self.adapter is not None:
            check_adapter(self.adapter)

    def connect(self) -> "SplitModelForCausalLM":
        """Load the client's parts, connect to the block server, load the adapter on all three parts.

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
        Flag("With noise: how often each text may be sent, each time with fresh noise.", min=1, default="no limit"),
    ] = None
    looks: Annotated[
        Path | None,
        Flag("The file in which this is counted; several commands may share one.", metavar="FILE"),
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
            raise UsageError("--max-looks needs --looks FILE, the file that counts from one command to the next")
        return LookLedger(path, self.max_looks or 0) if path is not None else None


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """How long an answer may be, and how its tokens are chosen."""

    max_new_tokens: Annotated[int, Flag("Longest answer, in tokens.", min=1)] = 512
    sampling: Sampling = GREEDY
    guesses: Annotated[
        int | None,
        Flag(
            "How many tokens to guess ahead from the text; each right guess saves a round trip.",
            min=0,
            default="8, or 0 with noise",
        ),
    ] = None

    def guessed(self, noise: "Mechanism") -> int:
        """How many tokens to guess ahead: without noise 8, with noise (an adapter's own too) none unless asked.

        A wrong guess shows the server one more noised state of a token that the text has elsewhere.
        """
        if self.guesses is not None:
            return self.guesses
        return 0 if noise.alters else GUESSES


def check_noise(text: str) -> None:
    """Check the strength that `--noise` gives, as far as that needs no torch.

    Raises
    ------
    UsageError
        If it is negative or no finite number.
    """
    kind, _, number = text.rpartition(":")
    if kind in ("", "relative"):
        with contextlib.suppress(ValueError):
            if not 0 <= float(number) < math.inf:
                raise UsageError(f"the strength of the noise must be a number, 0 or more; got --noise {text}")


def parse_noise(text: str) -> "Mechanism":
    """The mechanism that `--noise` names, not calibrated; an empty text is no noise.

    Raises
    ------
    UsageError
        If it cannot be used.
    """
    check_noise(text)
    from fedsea.privacy import parse_mechanism

    return parse_mechanism(text or "0")


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
    """Check that the device exists, and set the number of CPU threads (None: torch's own choice).

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
