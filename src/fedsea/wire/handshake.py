"""What client and server tell each other when a session opens, as JSON objects.

`from_body` of these raises ProtocolError or PartitionError if a field is missing or not what it should be.
"""

from dataclasses import dataclass
from typing import Any

from fedsea.checkpoints import Fingerprint
from fedsea.fields import Fields
from fedsea.partition import Partition
from fedsea.wire.tensors import WIRE_DTYPES


@dataclass(frozen=True)
class Open:
    """The client's request: this model, this partition, this wire dtype; or the session `resume` that it lost.

    With `run`, the middle has the adapter of that run of the client; `narrow` is its narrow cut's rank, or 0.
    """

    partition: Partition
    fingerprint: Fingerprint
    wire_dtype: str
    resume: str | None = None
    run: str | None = None
    narrow: int = 0

    def to_body(self) -> dict[str, Any]:
        model = model_body(self.partition, self.fingerprint, self.wire_dtype)
        return model | {"resume": self.resume, "run": self.run, "narrow": self.narrow}

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> "Open":
        read = Fields(body, "OPEN of a session")
        narrow = read.count("narrow") if "narrow" in body else 0
        return cls(*read_model(read), read.maybe(read.text, "resume"), read.maybe(read.text, "run"), narrow)


@dataclass(frozen=True)
class Opened:
    """The server's answer."""

    session: str  # the name, unguessable: who knows it (and has the same identity) may resume the session
    step: int  # the last one done; 0 in a new session, so a client that asked to resume sees that it cannot
    max_tokens: int  # that one row may have
    frame_bytes: int  # the longest frame that the server takes
    layers: tuple[int, int]  # that the server holds: the first, and the end

    def to_body(self) -> dict[str, Any]:
        return {**vars(self), "layers": list(self.layers)}

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> "Opened":
        read = Fields(body, "the server's answer to OPEN")
        first, end = read.counts("layers", 2)
        counts = {name: read.count(name) for name in ("step", "max_tokens", "frame_bytes")}
        return cls(session=read.text("session"), layers=(first, end), **counts)


def model_body(partition: Partition, fingerprint: Fingerprint, wire_dtype: str) -> dict[str, Any]:
    """What every OPEN says of the model and the wire."""
    return {
        "input_layers": partition.input_layers,
        "output_layers": partition.output_layers,
        "fingerprint": fingerprint.to_json(),
        "wire_dtype": wire_dtype,
    }


def read_model(read: Fields) -> tuple[Partition, Fingerprint, str]:
    """What `model_body` made, checked."""
    wire_dtype = read.one_of("wire_dtype", WIRE_DTYPES)
    partition = Partition(read.count("input_layers"), read.count("output_layers"))
    return partition, Fingerprint.from_json(read.text("fingerprint")), wire_dtype
