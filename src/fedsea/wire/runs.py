"""What client and server tell each other about a run, as JSON objects: how it is taken up, and an optimizer step.

`from_body` of these raises ProtocolError or PartitionError if a field is missing or not what it should be.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from fedsea.checkpoints import Fingerprint
from fedsea.errors import UsageError
from fedsea.fields import Fields
from fedsea.partition import Partition
from fedsea.parts.adapters import AdapterSpec
from fedsea.wire.handshake import model_body, read_model

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TOKEN = re.compile(r"[A-Za-z0-9_-]{16,128}")
OPTIMIZERS = ("adamw", "adam", "sgd")
MAX_SETTING = 1e30  # float32 ends at 3e38


def check_run_name(name: str) -> str:
    """The name, if a run may have it; else UsageError."""
    if NAME.fullmatch(name) is None:
        raise UsageError(f"a run's name has 1 to 64 letters, digits, dots, dashes and underscores; got {name!r}")
    return name


@dataclass(frozen=True)
class Attach:
    """The client's request: to begin a run, or to go on with one."""

    run: str  # its name, given by the client
    partition: Partition
    fingerprint: Fingerprint
    wire_dtype: str
    adapter: AdapterSpec  # all its layers; the server holds those in the middle
    received: int  # the last reply that the client has
    begin: bool  # it is to be a new run; else one that is not there is an error
    token: str | None = field(default=None, repr=False)  # of the ticket for a seat in a federated round

    def to_body(self) -> dict[str, Any]:
        body = model_body(self.partition, self.fingerprint, self.wire_dtype)
        body |= {"run": self.run, "adapter": self.adapter.to_body(), "received": self.received, "begin": self.begin}
        return body if self.token is None else body | {"token": self.token}

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> "Attach":
        read = Fields(body, "OPEN of a run")
        run, token = read.text("run", like=NAME), read.maybe(read.text, "token", like=TOKEN)
        adapter = AdapterSpec.from_body(body.get("adapter"))
        return cls(run, *read_model(read), adapter, read.count("received"), read.switch("begin"), token)


@dataclass(frozen=True)
class Attached:
    """The server's answer."""

    new: bool  # the run was begun just now
    number: int  # the last operation that it has done
    version: int  # the optimizer steps that it has done
    frame_bytes: int  # the longest frame that the server takes
    micro_batches: int  # that may wait for their gradient at a time
    shared: bool = False  # other clients train the same adapter: each says how much its loss counts

    def to_body(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> "Attached":
        read = Fields(body, "the server's answer to OPEN")
        counts = {name: read.count(name) for name in ("number", "version", "frame_bytes")}
        micro_batches = read.count("micro_batches", low=1)
        return cls(read.switch("new"), **counts, micro_batches=micro_batches, shared=read.switch("shared"))


@dataclass(frozen=True)
class OptimizerStep:
    """One optimizer step of the middle's adapter, as torch's optimizers name their settings."""

    kind: str  # one of OPTIMIZERS
    step: int  # the run's optimizer steps after this one
    scale: float  # the gradient that was added up is multiplied by it first: clipping, loss scaling
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    amsgrad: bool = False
    fresh: bool = False  # another optimizer than before takes over: it has no states from before

    def to_body(self) -> dict[str, Any]:
        return {**vars(self), "betas": list(self.betas)}

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> "OptimizerStep":
        read = Fields(body, "an optimizer step")
        numbers = {name: read.number(name, 0, MAX_SETTING) for name in ("scale", "lr", "weight_decay", "eps")}
        numbers |= {name: read.number(name, 0, 1) for name in ("momentum", "dampening")}
        switches = {name: read.switch(name) for name in ("nesterov", "amsgrad", "fresh")}
        first, second = read.numbers("betas", 2, 0, 1)
        settings: dict[str, Any] = numbers | switches
        return cls(read.one_of("kind", OPTIMIZERS), read.count("step"), betas=(first, second), **settings)
