"""What client and server tell each other about a run: how it is taken up, and what an optimizer step is."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from fedsea.checkpoints.fingerprint import Fingerprint
from fedsea.errors import ProtocolError, UsageError
from fedsea.partition import Partition
from fedsea.parts.adapters import AdapterSpec
from fedsea.wire.handshake import read_count, read_model
from fedsea.wire.tensors import WIRE_DTYPES

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TOKEN = re.compile(r"[A-Za-z0-9_-]{16,128}")


def check_run_name(name: str) -> str:
    """The name, if a run may have it.

    Raises
    ------
    UsageError
        If not.
    """
    if NAME.fullmatch(name) is None:
        raise UsageError(f"a run's name has 1 to 64 letters, digits, dots, dashes and underscores; got {name!r}")
    return name


def check_token(token: Any) -> str | None:
    """A ticket's token as it came; None for none.

    Raises
    ------
    ProtocolError
        If it is neither.
    """
    if token is None or (isinstance(token, str) and TOKEN.fullmatch(token) is not None):
        return token
    raise ProtocolError("the ticket cannot be read")


@dataclass(frozen=True)
class Attach:
    """The client's wish: to begin a run, or to go on with one.

    Attributes
    ----------
    run
        The run's name, given by the client.
    adapter
        The adapter that it trains, all its layers; the server holds those in the middle.
    received
        The last reply that the client has.
    begin
        Whether it is to be a new run; else one that is not there is an error.
    token
        Of the ticket for a seat in a federated round; None for a run of the client's own.
    """

    run: str
    partition: Partition
    fingerprint: Fingerprint
    wire_dtype: str
    adapter: AdapterSpec
    received: int
    begin: bool
    token: str | None = field(default=None, repr=False)

    def to_body(self) -> dict[str, Any]:
        """As the JSON object of an OPEN frame."""
        return {
            "run": self.run,
            "input_layers": self.partition.input_layers,
            "output_layers": self.partition.output_layers,
            "fingerprint": self.fingerprint.to_json(),
            "wire_dtype": self.wire_dtype,
            "adapter": self.adapter.to_body(),
            "received": self.received,
            "begin": self.begin,
            **({"token": self.token} if self.token is not None else {}),
        }

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> "Attach":
        """Check and read the JSON object of an OPEN frame.

        Raises
        ------
        ProtocolError, PartitionError
            If a field is missing or not what it should be.
        """
        run, wire_dtype, begin = body.get("run"), body.get("wire_dtype"), body.get("begin")
        if not isinstance(run, str) or NAME.fullmatch(run) is None:
            raise ProtocolError("the run's name is missing or not allowed")
        if not isinstance(wire_dtype, str) or wire_dtype not in WIRE_DTYPES:
            raise ProtocolError(f"the wire dtype must be one of {', '.join(WIRE_DTYPES)}")
        if not isinstance(begin, bool):
            raise ProtocolError("the field 'begin' must be true or false")
        partition, fingerprint = read_model(body)
        adapter = AdapterSpec.from_body(body.get("adapter"))
        token = check_token(body.get("token"))
        return cls(run, partition, fingerprint, wire_dtype, adapter, read_count(body, "received"), begin, token)


@dataclass(frozen=True)
class Attached:
    """The server's answer.

    Attributes
    ----------
    new
        Whether the run was begun just now.
    number
        The last operation that the run has done.
    version
        The optimizer steps that the run has done.
    frame_bytes
        The longest frame that the server takes.
    micro_batches
        How many micro-batches may wait for their gradient at a time.
    shared
        Whether other clients train the same adapter, so that each says how much its loss counts.
    """

    new: bool
    number: int
    version: int
    frame_bytes: int
    micro_batches: int
    shared: bool = False

    def to_body(self) -> dict[str, Any]:
        """As the JSON object of an OPENED frame."""
        return dict(vars(self))

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> "Attached":
        """Check and read the JSON object of an OPENED frame.

        Raises
        ------
        ProtocolError
            If a field is missing or not what it should be.
        """
        if not isinstance(body.get("new"), bool) or not isinstance(body.get("shared"), bool):
            raise ProtocolError("the server's answer to OPEN is incomplete")
        counts = {name: read_count(body, name) for name in ("number", "version", "frame_bytes", "micro_batches")}
        if not counts["micro_batches"]:
            raise ProtocolError("the server takes no micro-batches")
        return cls(body["new"], **counts, shared=body["shared"])


@dataclass(frozen=True)
class OptimizerStep:
    """One optimizer step of the middle's adapter, as torch's optimizers name their settings.

    Parameters
    ----------
    kind
        `adamw`, `adam` or `sgd`.
    step
        The run's optimizer steps after this one.
    scale
        By which the gradient that was added up is multiplied first: clipping, loss scaling.
    fresh
        Whether another optimizer than before takes over: it has no states from before.
    """

    kind: str
    step: int
    scale: float
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    amsgrad: bool = False
    fresh: bool = False

    def to_body(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**vars(self), "betas": list(self.betas)}

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> "OptimizerStep":
        """Check and read what `to_body` made; it may come from anybody.

        Raises
        ------
        ProtocolError
            If a setting is missing or out of its range.
        """
        if body.get("kind") not in OPTIMIZERS:
            raise ProtocolError(f"the optimizer must be one of {', '.join(OPTIMIZERS)}")
        betas = body.get("betas")
        if not isinstance(betas, list) or len(betas) != 2:
            raise ProtocolError("an optimizer step needs two betas")
        numbers = {name: body.get(name) for name in ("scale", "lr", "weight_decay", "eps", "momentum", "dampening")}
        numbers |= {"beta1": betas[0], "beta2": betas[1]}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ProtocolError(f"an optimizer step needs a finite {name}, 0 or more")
            if value > MAX_SETTING:
                raise ProtocolError(f"an optimizer step's {name} is out of its range")
            if name in ("beta1", "beta2", "momentum", "dampening") and value > 1:
                raise ProtocolError(f"an optimizer step needs a {name} of at most 1")
        if not all(isinstance(body.get(name), bool) for name in ("nesterov", "amsgrad", "fresh")):
            raise ProtocolError("an optimizer step needs its switches")
        fields = {name: float(numbers[name]) for name in numbers if not name.startswith("beta")}  # type: ignore[arg-type]
        return cls(
            kind=body["kind"],
            step=read_count(body, "step"),
            betas=(float(betas[0]), float(betas[1])),
            nesterov=body["nesterov"],
            amsgrad=body["amsgrad"],
            fresh=body["fresh"],
            **fields,
        )


OPTIMIZERS = ("adamw", "adam", "sgd")
MAX_SETTING = 1e30  # float32 ends at 3e38
