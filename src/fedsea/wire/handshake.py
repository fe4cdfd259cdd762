"""What client and server tell each other when a session opens."""

from dataclasses import dataclass
from typing import Any

from fedsea.checkpoints.fingerprint import Fingerprint
from fedsea.errors import ProtocolError
from fedsea.partition import Partition
from fedsea.wire.tensors import WIRE_DTYPES

MAX_COUNT = 1 << 31  # below it is what a peer may count: it goes into fields of 32 bits, and is counted on from there


@dataclass(frozen=True)
class Open:
    """The client's wish: this model, this partition, this wire dtype; or the session `resume` that it lost.

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
            "input_layers": self.partition.input_layers,
            "output_layers": self.partition.output_layers,
            "fingerprint": self.fingerprint.to_json(),
            "wire_dtype": self.wire_dtype,
            "resume": self.resume,
            "run": self.run,
            "narrow": self.narrow,
        }

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> "Open":
        """Check and read the JSON object of an OPEN frame.

        Raises
        ------
        ProtocolError, PartitionError
            If a field is missing or not what it should be.
        """
        wire_dtype, resume, run = body.get("wire_dtype"), body.get("resume"), body.get("run")
        if not isinstance(wire_dtype, str) or wire_dtype not in WIRE_DTYPES:
            raise ProtocolError(f"the wire dtype must be one of {', '.join(WIRE_DTYPES)}")
        if resume is not None and not isinstance(resume, str):
            raise ProtocolError("the session to resume must be a text")
        if run is not None and not isinstance(run, str):
            raise ProtocolError("the run must be a text")
        partition, fingerprint = read_model(body)
        narrow = read_count(body, "narrow") if "narrow" in body else 0
        return cls(partition, fingerprint, wire_dtype, resume, run, narrow)


@dataclass(frozen=True)
class Opened:
    """The server's answer.

    Attributes
    ----------
    session
        The session's name, unguessable; who knows it (and has the same identity) may resume the session.
    step
        The last step that the session has done; 0 in a new one, so a client that wished to resume sees that it cannot.
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
        return {
            "session": self.session,
            "step": self.step,
            "max_tokens": self.max_tokens,
            "frame_bytes": self.frame_bytes,
            "layers": list(self.layers),
        }

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> "Opened":
        """Check and read the JSON object of an OPENED frame.

        Raises
        ------
        ProtocolError
            If a field is missing or not what it should be.
        """
        session, layers = body.get("session"), body.get("layers")
        if not isinstance(session, str) or not isinstance(layers, list) or len(layers) != 2:
            raise ProtocolError("the server's answer to OPEN is incomplete")
        ends = {"first": layers[0], "end": layers[1]}
        return cls(
            session,
            read_count(body, "step"),
            read_count(body, "max_tokens"),
            read_count(body, "frame_bytes"),
            (read_count(ends, "first"), read_count(ends, "end")),
        )


def read_model(body: dict[str, Any]) -> tuple[Partition, Fingerprint]:
    """The partition and the fingerprint that a body names.

    Raises
    ------
    ProtocolError, PartitionError
        If they are missing or not what they should be.
    """
    fingerprint = body.get("fingerprint")
    if not isinstance(fingerprint, str):
        raise ProtocolError("the fingerprint must be a text")
    partition = Partition(read_count(body, "input_layers"), read_count(body, "output_layers"))
    return partition, Fingerprint.from_json(fingerprint)


def read_count(body: dict[str, Any], field: str) -> int:
    """The whole number, 0 or more and below 2**31, that a field of a body is.

    Raises
    ------
    ProtocolError
        If it is not.
    """
    value = body.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_COUNT:
        raise ProtocolError(f"the field {field!r} must be a whole number, 0 or more and below {MAX_COUNT}")
    return value
