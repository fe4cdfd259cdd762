"""Options that several commands share, and the checks of what was typed.

Those of a recipe, of limits, of sampling or of a partition are declared in their own rooms, each option once.
"""

import contextlib
import dataclasses
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.cli.terminal import tell
from fedsea.client import GREEDY, GUESSES, LEARNT, SEE, Sampling
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
Insecure = Annotated[bool, Flag("Do without TLS. On this machine only.")]
AsJson = Annotated[bool, Flag("Print one JSON object, for programs.", "--json")]
TaskName = Annotated[str, Flag(f"{', '.join(task_names())}; text and chat read your own JSON lines.", metavar="TASK")]
DataPath = Annotated[str, DATA]
Limit = Annotated[int | None, Flag("Use the first N examples only.", min=1, metavar="N", default="all")]
_CONNECTION = ("server", "credentials", "insecure", "partition", "dtype", "wire_dtype", "device", "reconnect_seconds")


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
    adapter: Path | None = None  # an option of those commands that load one

    def check(self) -> None:
        """Check what was typed, and look whether the server is there, before anything that takes seconds to load."""
        from fedsea.checkpoints.names import check_adapter, check_model, layer_count
        from fedsea.wire.address import check_server
        from fedsea.wire.credentials import Credentials as LoadedCredentials
        from fedsea.wire.diagnose import check_reachable

        require_one_security(self.credentials, self.insecure)
        check_server(self.server, plaintext=self.insecure)
        own = None if self.credentials is None else LoadedCredentials.load(self.credentials, role="client")
        check_noise(self.noise)
        check_model(self.model)
        check_adapter(self.adapter)
        layers = layer_count(self.model)
        if layers is None or self.partition.middle(layers):  # without a middle no server is needed
            check_reachable(self.server, own)

    def connect(self, learnt: tuple[str, str] | None = None) -> "SplitModelForCausalLM":
        """Load the client's parts and the adapter, connect to the block server.

        `learnt` are task and data of a training, for the command in the model's notice.
        """
        noise = parse_noise(self.noise)
        prepare_torch(self.device, self.threads)
        from fedsea.client import SplitModelForCausalLM

        model = SplitModelForCausalLM.from_pretrained(
            self.model,
            noise=noise,
            notice=lambda line: tell_notice(line, learnt),
            **{name: getattr(self, name) for name in _CONNECTION},
        )
        if self.adapter is not None:
            try:
                model.load_adapter(self.adapter, is_trainable=False)
            except BaseException:
                model.close()
                raise
        return model


@dataclasses.dataclass(frozen=True)
class AdaptedClientOptions(ClientOptions):
    """The same, with an adapter."""

    adapter: Adapter = None


def tell_notice(line: str, learnt: tuple[str, str] | None = None) -> None:
    """A model's notice; the command in it is to be pasted, with the user's own task and data."""
    if learnt is not None:
        line = line.replace(LEARNT, shlex.join(["--task", learnt[0], "--data", learnt[1]]))
    said, see, rest = line.partition(f"{SEE}: ")
    if not see:
        tell(line)
        return
    command, _, after = rest.rpartition(" (")
    tell(f"{said}{SEE}", command, f"({after}")


@dataclasses.dataclass(frozen=True)
class LookOptions:
    """How often texts may leave under fresh noise."""

    max_looks: Annotated[
        int | None,
        Flag("With noise: how often each text may be sent, each time with fresh noise.", min=1, default="no limit"),
    ] = None
    looks: Annotated[
        Path | None,
        Flag("The file that counts how often each text was sent; several commands may share one.", metavar="FILE"),
    ] = None

    def ledger(self, default: Path | None = None) -> "LookLedger | None":
        """What counts, in `default` if no file is named; None if there is neither."""
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
        """How many tokens to guess ahead: without noise 8, with noise (an adapter's own too) none by default.

        A wrong guess shows the server one more noised state of a token that the text has elsewhere.
        """
        if self.guesses is not None:
            return self.guesses
        return 0 if noise.alters else GUESSES


def check_noise(text: str) -> None:
    """Check the strength that `--noise` gives, as far as that needs no torch."""
    kind, _, number = text.rpartition(":")
    if kind in ("", "relative"):
        with contextlib.suppress(ValueError):
            if not 0 <= float(number) < math.inf:
                raise UsageError(f"the strength of the noise must be a number, 0 or more; got --noise {text}")


def parse_noise(text: str) -> "Mechanism":
    """The mechanism that `--noise` names, not calibrated; an empty text is no noise."""
    check_noise(text)
    from fedsea.privacy import parse_mechanism

    return parse_mechanism(text or "0")


def require_one_security(credentials: Path | None, insecure: bool) -> None:
    """Check that TLS was either set up or declined."""
    if credentials is not None and insecure:
        raise UsageError("give --credentials DIR or --insecure, not both")
    if credentials is None and not insecure:
        raise UsageError(
            "give --credentials DIR (made by: fedsea credentials init DIR), or --insecure on a loopback address"
        )


def prepare_torch(device: str, threads: int | None) -> None:
    """Check that the device exists, and set the number of CPU threads (None: torch's own choice)."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise UsageError(f"there is no device {device!r} here; there is {', '.join(known)}") from None
    if threads is not None:
        torch.set_num_threads(threads)


def require_folders(*files: Path | None) -> None:
    """Check before a long run that there is a folder for each file."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise UsageError(f"there is no folder {file.parent} to write {file.name} into")
