"""Frames: what the two sides of a stream send each other. codec.py has their bytes, docs/wire.md describes both.

A session exchanges STEP for RESULT. A run exchanges operations (FORWARD, BACKWARD, COMMAND, TENSORS) for replies
(STATES, OUTCOME, TENSORS): its client numbers its operations, and the server does them in this order and answers each
with one frame of the same number. The server keeps a reply until the client says that it has it (`received`), so an
operation is done exactly once, whatever happens to the connection.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

from torch import Tensor

from fedsea.parts.rows import Rows


class Kind(IntEnum):
    """What a frame is."""

    OPEN = 1
    OPENED = 2
    STEP = 3
    RESULT = 4
    CLOSE = 5
    FORWARD = 6
    BACKWARD = 7
    COMMAND = 8
    STATES = 9
    OUTCOME = 10
    TENSORS = 11


@dataclass(frozen=True)
class Message:
    """OPEN, OPENED or CLOSE: a small JSON object."""

    number: ClassVar[int] = 0
    kind: Kind
    body: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A client's frame in a session: new hidden states `h_A` of some rows."""

    kind: ClassVar[Kind] = Kind.STEP
    number: int  # in its session, from 1
    rows: Rows  # where the new tokens stand
    states: Tensor  # [rows.total, hidden], in the wire dtype
    row_map: tuple[int, ...] | None = None  # before the step, row i becomes a copy of row row_map[i] (beams, twins)
    want_result: bool = True  # False for a replay after a lost connection, whose results the client has already


@dataclass(frozen=True)
class Result:
    """The server's answer to a step: `h_B` of the same tokens, `[tokens, hidden]`, or no tensor if none was wanted."""

    kind: ClassVar[Kind] = Kind.RESULT
    number: int
    states: Tensor | None


@dataclass(frozen=True)
class Forward:
    """Run a micro-batch through the middle."""

    kind: ClassVar[Kind] = Kind.FORWARD
    number: int  # of the operation in its run, from 1
    micro: int  # the micro-batch's name: its client gives each another
    rows: Rows  # whole texts, so all start at 0
    states: Tensor = field(repr=False)  # h_A, [rows.total, hidden], in the wire dtype
    training: bool = True  # dropout is on
    recompute: bool = False  # keep no activations; compute them again for the backward pass
    want_gradient: bool = True  # the client has a use for the gradient at h_A
    seed: int = 0  # of dropout's draws, 31 bits
    received: int = 0  # the last reply that the client has, as in each operation


@dataclass(frozen=True)
class Backward:
    """Run a micro-batch's gradient back through the middle, and add it up at the middle's adapter."""

    kind: ClassVar[Kind] = Kind.BACKWARD
    number: int
    micro: int
    gradient: Tensor = field(repr=False)  # 2**exponent times that at h_B, [tokens, hidden], in the wire dtype
    exponent: int = 0
    fresh: bool = False  # forget what was added up before
    weight: float = 1.0  # how much it counts beside those of other clients, where they train one adapter; above 0
    received: int = 0


@dataclass(frozen=True)
class Command:
    """A request without a micro-batch: an optimizer step, say."""

    kind: ClassVar[Kind] = Kind.COMMAND
    number: int
    body: dict[str, Any]
    received: int = 0


@dataclass(frozen=True)
class Tensors:
    """Some named float32 tensors of an adapter or its optimizer: to the server to be set, from it as a reply."""

    kind: ClassVar[Kind] = Kind.TENSORS
    number: int
    tensors: dict[str, Tensor] = field(repr=False)
    more: bool = False  # in a reply: there are further ones to ask for
    received: int = 0


@dataclass(frozen=True)
class States:
    """The reply to FORWARD (`h_B`) and BACKWARD (the scaled gradient at `h_A`, and the norm of the adapter's so far).

    A gradient that is not finite in the middle has the norm infinity, and no tensor.
    """

    kind: ClassVar[Kind] = Kind.STATES
    number: int
    states: Tensor | None = field(repr=False)
    exponent: int = 0
    norm: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The reply to COMMAND, and to TENSORS that were to be set."""

    kind: ClassVar[Kind] = Kind.OUTCOME
    number: int
    body: dict[str, Any]


Operation = Forward | Backward | Command | Tensors
Reply = States | Outcome | Tensors
Frame = Message | Step | Result | Operation | Reply
