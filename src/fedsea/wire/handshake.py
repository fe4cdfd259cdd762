"""What client and server tell each other when a session opens."""

from dataclasses import dataclass
from typing import Any

from fedsea.checkpoints.fingerprint import Fingerprint
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
        """As the JSON object of an OPEN frame."""
        return {
            **model_body(self.partition, self.fingerprint, self.wire_dtype),
            "resume": self.resume,
            "run": self.run,
            "narrow": self.narrow,
        }

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> "Open":
        """Check and read it; ProtocolError or PartitionError if a field is missing or not what it should be."""
        read = Fields(body, "OPEN of a session")
        narrow = read.count("narrow") if "narrow" in body else 0
        return cls(*read_model(read), read.maybe(read.text, "resume"), read.maybe(read.text, "run"), narrow)


@dataclass(frozen=True)
class Opened:
    """The server's answer.

    Attributes
    ----------
    session
        The session's name, unguessable; who knows it (and has the same identity) may resume the session.
    step
        The last step that the session has done; 0 in a new one, so a client that asked to resume sees that it cannot.
    max_tokens
        Tokens that one row may have.
    frame_bytes
        The longest frame that the server takes.
    layers
        The layers that the server holds, as (first, end).
    """

    session: str
    step: int
    max_tokens: int
    frame_bytes: int
    layers: tuple[int, int]

    def to_body(self) -> dict[str, Any]:
        """As the JSON object of an OPENED frame."""
        return {**vars(self), "layers": list(self.layers)}

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> "Opened":
        """Check and read it; ProtocolError if a field is missing or not what it should be."""
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
    """Check and read what `model_body` made; ProtocolError or PartitionError if it is anything else."""
    wire_dtype = read.one_of("wire_dtype", WIRE_DTYPES)
    partition = Partition(read.count("input_layers"), read.count("output_layers"))
    return partition, Fingerprint.from_json(read.text("fingerprint")), wire_dtype
