"""What client and server tell each other about a run: how it is taken up, and what an optimizer step is."""

import re
from dataclasses import dataclass, field
from typing import Any

from fedsea.checkpoints.fingerprint import Fingerprint
from fedsea.errors import UsageError
from fedsea.fields import Fields
from fedsea.partition import Partition
from fedsea.parts.adapters import AdapterSpec
from fedsea.wire.handshake import model_body, read_model

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TOKEN = re.compile(r"[A-Za-z0-9_-]{16,128}")


def check_run_name(name: str) -> str:
    """The name, if a run may have it; else UsageError."""
    if NAME.fullmatch(name) is None:
        raise UsageError(f"a run's name has 1 to 64 letters, digits, dots, dashes and underscores; got {name!r}")
    return name


@dataclass(frozen=True)
class Attach:
    """The client's request: to begin a run, or to go on with one.

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
            **model_body(self.partition, self.fingerprint, self.wire_dtype),
            "run": self.run,
            "adapter": self.adapter.to_body(),
            "received": self.received,
            "begin": self.begin,
            **({"token": self.token} if self.token is not None else {}),
        }

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> "Attach":
        """Check and read it; ProtocolError or PartitionError if a field is missing or not what it should be."""
        read = Fields(body, "OPEN of a run")
        run, token = read.text("run", like=NAME), read.maybe(read.text, "token", like=TOKEN)
        adapter = AdapterSpec.from_body(body.get("adapter"))
        return cls(run, *read_model(read), adapter, read.count("received"), read.switch("begin"), token)


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
        """Check and read it; ProtocolError if a field is missing or not what it should be."""
        read = Fields(body, "the server's answer to OPEN")
        counts = {name: read.count(name) for name in ("number", "version", "frame_bytes")}
        micro_batches = read.count("micro_batches", low=1)
        return cls(read.switch("new"), **counts, micro_batches=micro_batches, shared=read.switch("shared"))


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
        """Check and read it; ProtocolError if a setting is missing or out of its range."""
        read = Fields(body, "an optimizer step")
        numbers = {name: read.number(name, 0, MAX_SETTING) for name in ("scale", "lr", "weight_decay", "eps")}
        numbers |= {name: read.number(name, 0, 1) for name in ("momentum", "dampening")}
        switches = {name: read.switch(name) for name in ("nesterov", "amsgrad", "fresh")}
        first, second = read.numbers("betas", 2, 0, 1)
        settings: dict[str, Any] = numbers | switches
        return cls(read.one_of("kind", OPTIMIZERS), read.count("step"), betas=(first, second), **settings)


OPTIMIZERS = ("adamw", "adam", "sgd")
MAX_SETTING = 1e30  # float32 ends at 3e38
