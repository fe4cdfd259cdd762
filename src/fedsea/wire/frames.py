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
    """A client's frame in a session: new hidden states `h_A` of some rows.

    Attributes
    ----------
    number
        The step's number in its session, from 1.
    rows
        Where the new tokens stand.
    states
        `[rows.total, hidden]`, in the wire dtype.
    row_map
        Before the step, row `i` becomes a copy of row `row_map[i]` (beams, twins); None leaves the rows as they are.
    want_result
        False for a replay after a lost connection, whose results the client has already.
    """

    kind: ClassVar[Kind] = Kind.STEP
    number: int
    rows: Rows
    states: Tensor
    row_map: tuple[int, ...] | None = None
    want_result: bool = True


@dataclass(frozen=True)
class Result:
    """The server's answer to a step: `h_B` of the same tokens, `[tokens, hidden]`, or no tensor if none was wanted."""

    kind: ClassVar[Kind] = Kind.RESULT
    number: int
    states: Tensor | None


@dataclass(frozen=True)
class Forward:
    """Run a micro-batch through the middle.

    Attributes
    ----------
    number
        Of the operation, from 1.
    micro
        The micro-batch's name: its client gives each another.
    rows
        Whole texts, so all start at 0.
    states
        `h_A`, `[rows.total, hidden]`, in the wire dtype.
    training
        Whether dropout is on.
    recompute
        Keep no activations; compute them again for the backward pass.
    want_gradient
        Whether the client has a use for the gradient at `h_A`.
    seed
        Of dropout's draws, 31 bits.
    received
        The last reply that the client has.
    """

    kind: ClassVar[Kind] = Kind.FORWARD
    number: int
    micro: int
    rows: Rows
    states: Tensor = field(repr=False)
    training: bool = True
    recompute: bool = False
    want_gradient: bool = True
    seed: int = 0
    received: int = 0


@dataclass(frozen=True)
class Backward:
    """Run a micro-batch's gradient back through the middle, and add it up at the middle's adapter.

    Attributes
    ----------
    gradient
        `2**exponent` times the loss's gradient at `h_B`, `[tokens, hidden]`, in the wire dtype.
    fresh
        Forget what was added up before.
    weight
        How much the gradient counts beside those of other clients, where they train one adapter; above 0.
    received
        The last reply that the client has.
    """

    kind: ClassVar[Kind] = Kind.BACKWARD
    number: int
    micro: int
    gradient: Tensor = field(repr=False)
    exponent: int = 0
    fresh: bool = False
    weight: float = 1.0
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
    """Some named float32 tensors of an adapter or its optimizer: to the server to be set, from it as a reply.

    Attributes
    ----------
    more
        In a reply: there are further ones to ask for.
    """

    kind: ClassVar[Kind] = Kind.TENSORS
    number: int
    tensors: dict[str, Tensor] = field(repr=False)
    more: bool = False
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
