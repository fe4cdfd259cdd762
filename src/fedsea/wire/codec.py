"""How frames become bytes, and back. docs/wire.md describes the same for other implementations.

    offset  size  field
    0       1     version, 2
    1       1     kind
    2       1     dtype of the tensor (0: no tensor)
    3       1     flags
    4       4     number: of the step in its session, of the operation in its run, from 1; of a message 0
    8       4     length: rows (STEP, FORWARD), tokens (RESULT, BACKWARD, STATES), else bytes of the content
    12      4     width: numbers of a state
    16      ..    the kind's own fields (`_LAYOUTS`), under the names that the frame has for them
    ..      ..    the content: rows and states, states, a JSON object, or named tensors

All numbers are little-endian; what a kind has no use for is 0. Nothing is read before it is checked, and nothing is
made that is larger than what came; whatever does not fit is a `ProtocolError`.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from safetensors.torch import save
from torch import Tensor

from fedsea.errors import LimitExceededError, ProtocolError
from fedsea.parts.rows import Rows
from fedsea.wire.frames import Backward, Command, Forward, Frame, Kind, Message, Outcome, Result, States, Step, Tensors
from fedsea.wire.tensors import CODES, SMALLEST_EXPONENT, read_named, read_states, tensor_bytes

VERSION = 2
HEADER = struct.Struct("<BBBBIII")
MAX_JSON = 1 << 16
MAX_ROWS = 4096
MAX_PLACES = 4096  # rows x tokens of the longest row: what a step takes once it is padded to be computed
MAX_WEIGHT = 2.0**30  # of a gradient beside others: more tokens than a step can have
WANT_RESULT, ROW_MAP, TEXT, TRAINING, RECOMPUTE, WANT_GRADIENT, FRESH, MORE = (1 << bit for bit in range(8))


class _Incoming(NamedTuple):
    """A frame that came: all its bytes, which named tensors its reader has, and its header's fields."""

    data: bytes
    knows: Callable[[str], bool]
    version: int
    kind: int
    dtype: int
    flags: int
    number: int
    length: int
    width: int


class _Content(NamedTuple):
    """A frame's content as bytes, and what its header says of it; `before` stands before `data`, which may be long."""

    data: bytes
    length: int
    width: int = 0
    dtype: int = 0
    flags: int = 0
    before: bytes = b""


class _Field(NamedTuple):
    """A number that a kind of frame has: its name there, its code in `struct`, and its bounds."""

    name: str
    code: str
    low: float
    high: float


class _Layout:
    """How a kind of frame is written and read.

    `make` makes the frame from its attributes, `write` its content; `read` gives the attributes that the content has,
    from an offset on. `switches` are the flags of attributes that are true or false, `flags` those of `write`.
    """

    def __init__(
        self,
        make: Callable[..., Frame],
        write: Callable[[Any], _Content],
        read: Callable[[_Incoming, int], dict[str, Any]],
        *fields: _Field,
        flags: int = 0,
        **switches: int,
    ) -> None:
        self.make, self.write, self.read, self.fields = make, write, read, fields
        self.switches, self.flags = tuple(switches.items()), flags | sum(switches.values())
        codes = "".join(field.code for field in fields)
        self.struct, self.own = struct.Struct(HEADER.format + codes), struct.Struct("<" + codes)
        self.start = self.struct.size  # of the content

    def attributes(self, came: _Incoming) -> dict[str, Any]:
        """The frame's attributes but for its content; ProtocolError if they are not what the kind may have."""
        if came.flags & ~self.flags:
            raise ProtocolError(f"{Kind(came.kind).name} has unknown flags ({came.flags})")
        if len(came.data) < self.start:
            raise ProtocolError(f"a frame of {len(came.data)} bytes is shorter than its header of {self.start}")
        found: dict[str, Any] = {"number": came.number}
        numbers = self.own.unpack_from(came.data, HEADER.size) if self.fields else ()
        for (name, _code, low, high), value in zip(self.fields, numbers, strict=True):
            if not low <= value <= high:
                raise ProtocolError(f"the {name} of {Kind(came.kind).name} is out of its range: {value}")
            found[name] = value
        for name, flag in self.switches:
            found[name] = bool(came.flags & flag)
        return found


def overhead(kind: Kind, rows: int) -> int:
    """The most bytes that a frame with states has besides them."""
    return _LAYOUTS[kind].start + (8 * rows + 4 * rows + 4 if kind is Kind.STEP else 8 * rows)


def encode(frame: Frame) -> bytes:
    """A frame's bytes; ProtocolError if a message is longer than a peer accepts, or a number does not fit its field."""
    layout = _LAYOUTS[frame.kind]
    data, length, width, dtype, flags, before = layout.write(frame)
    for name, flag in layout.switches:
        if getattr(frame, name):
            flags |= flag
    header = [VERSION, frame.kind, dtype, flags, frame.number, length, width]
    for field in layout.fields:
        header.append(getattr(frame, field.name))
    return _pack(layout.struct, *header) + before + data


def decode(data: bytes, *, max_bytes: int | None = None, knows: Callable[[str], bool] = lambda _name: False) -> Frame:
    """The frame in `data`, which is not trusted.

    `knows` says whether the reader has a tensor of a name; TENSORS with another are refused before any is made.

    Raises
    ------
    ProtocolError
        If the bytes are not exactly one well-formed frame, or a tensor's values are not finite.
    LimitExceededError
        If they are more than `max_bytes`.
    """
    if max_bytes is not None and len(data) > max_bytes:
        raise LimitExceededError(f"a frame of {len(data)} bytes is over the limit of {max_bytes} bytes a frame")
    if len(data) < HEADER.size:
        raise ProtocolError(f"a frame of {len(data)} bytes is shorter than its header of {HEADER.size}")
    came = _Incoming(data, knows, *HEADER.unpack_from(data))
    if came.version != VERSION:
        raise ProtocolError(other_version(came.version))
    layout = _LAYOUTS.get(came.kind)
    if layout is None:
        raise ProtocolError(f"there is no frame of kind {came.kind}")
    return layout.make(**layout.attributes(came), **layout.read(came, layout.start))


def other_version(version: int) -> str:
    """The message to both sides where they do not speak the same version."""
    return (
        f"client and block server speak different versions of the protocol ({version} and {VERSION}); "
        "install the same version of FedSEA on both sides"
    )


def _pack(fields: struct.Struct, *values: float) -> bytes:
    try:
        return fields.pack(*values)
    except (struct.error, OverflowError) as error:
        # What a peer counts may be larger than a frame can say.
        raise ProtocolError(f"a number does not fit a frame's field: {error}") from None


# The four kinds of content, each written and read.


def _write_json(frame: Message | Command | Outcome) -> _Content:
    text = json.dumps(frame.body, separators=(",", ":")).encode()
    if len(text) > MAX_JSON:
        raise ProtocolError(f"a message of {len(text)} bytes is over the limit of {MAX_JSON}")
    return _Content(text, len(text))


def _read_json(came: _Incoming, offset: int) -> dict[str, Any]:
    if came.length > MAX_JSON:
        raise ProtocolError(f"a message says it has {came.length} bytes; {MAX_JSON} are allowed")
    try:
        body = json.loads(_rest(came, offset))
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a message is not JSON") from error
    if not isinstance(body, dict):
        raise ProtocolError("a message is not a JSON object")
    return {"body": body}


def _write_named(frame: Tensors) -> _Content:
    data = save(frame.tensors)
    return _Content(data, len(data))


def _read_named(came: _Incoming, offset: int) -> dict[str, Any]:
    return {"tensors": read_named(_rest(came, offset), came.knows)}


def _rest(came: _Incoming, offset: int) -> bytes:
    """The content of a frame that has no states."""
    if came.dtype or came.width:
        raise ProtocolError("a frame without states has header fields that only states have")
    if len(came.data) != offset + came.length:
        had = len(came.data) - offset
        raise ProtocolError(f"a frame says it has {came.length} bytes of content and has {had}")
    return came.data[offset:]


def _write_states(frame: Result | States) -> _Content:
    return _states(frame.states, len(frame.states)) if frame.states is not None else _Content(b"", 0)


def _write_gradient(frame: Backward) -> _Content:
    return _states(frame.gradient, len(frame.gradient))


def _states(states: Tensor, length: int, flags: int = 0, before: tuple[int, ...] = ()) -> _Content:
    numbers = _pack(struct.Struct(f"<{len(before)}I"), *before) if before else b""
    return _Content(tensor_bytes(states), length, states.shape[1], CODES[states.dtype], flags, numbers)


def _read_states(came: _Incoming, offset: int) -> dict[str, Any]:
    if came.dtype == came.length == came.width == 0 and len(came.data) == offset:
        return {"states": None}
    return {"states": read_states(came.data, offset, came.dtype, came.length, came.width)}


def _read_gradient(came: _Incoming, offset: int) -> dict[str, Any]:
    return {"gradient": read_states(came.data, offset, came.dtype, came.length, came.width)}


def _write_step(step: Step) -> _Content:
    rows, flags, numbers = step.rows, 0, _numbers_of(step.rows)
    if step.row_map is not None:
        flags, numbers = flags | ROW_MAP, numbers + step.row_map
    if rows.text > max(rows.ends):
        flags, numbers = flags | TEXT, (*numbers, rows.text)
    return _states(step.states, len(rows), flags, numbers)


def _read_step(came: _Incoming, offset: int) -> dict[str, Any]:
    rows, offset = _read_rows(came, offset)
    count, flags, row_map = len(rows), came.flags, None
    if count * rows.width > MAX_PLACES:
        raise ProtocolError(f"a step of {count} rows x {rows.width} tokens is over the {MAX_PLACES} places of a step")
    if flags & ROW_MAP:
        row_map, offset = _read_numbers(came.data, offset, count)
    if flags & TEXT:
        (text,), offset = _read_numbers(came.data, offset, 1)
        if text <= max(rows.ends):
            raise ProtocolError(f"a step's text is said to have {text} tokens, and has {max(rows.ends)}")
        rows = replace(rows, text=text)
    states = read_states(came.data, offset, came.dtype, rows.total, came.width)
    return {"rows": rows, "states": states, "row_map": row_map}


def _write_forward(frame: Forward) -> _Content:
    return _states(frame.states, len(frame.rows), before=_numbers_of(frame.rows))


def _read_forward(came: _Incoming, offset: int) -> dict[str, Any]:
    rows, offset = _read_rows(came, offset)
    if any(rows.starts):
        raise ProtocolError("a micro-batch holds whole texts; one of its rows starts later")
    if len(rows) > 1 and len(rows) * rows.width > MAX_PLACES:
        raise ProtocolError(f"a micro-batch of {len(rows)} rows x {rows.width} tokens is over {MAX_PLACES} places")
    return {"rows": rows, "states": read_states(came.data, offset, came.dtype, rows.total, came.width)}


def _numbers_of(rows: Rows) -> tuple[int, ...]:
    return tuple(chain.from_iterable(zip(rows.starts, rows.counts, strict=True)))


def _read_rows(came: _Incoming, offset: int) -> tuple[Rows, int]:
    count = came.length
    if not 1 <= count <= MAX_ROWS:
        raise ProtocolError(f"a frame has {count} rows; 1 to {MAX_ROWS} are allowed")
    numbers, offset = _read_numbers(came.data, offset, 2 * count)
    rows = Rows(numbers[0::2], numbers[1::2])
    if rows.total == 0:
        raise ProtocolError("a frame's rows have no tokens")
    return rows, offset


def _read_numbers(data: bytes, offset: int, count: int) -> tuple[tuple[int, ...], int]:
    end = offset + 4 * count
    if len(data) < end:
        raise ProtocolError(f"a frame ends after {len(data)} bytes, within its rows")
    return struct.unpack_from(f"<{count}I", data, offset), end


def _message(kind: Kind) -> _Layout:
    def make(number: int, body: dict[str, Any]) -> Message:
        if number:
            raise ProtocolError(f"{kind.name} has a number, {number}")
        return Message(kind, body)

    return _Layout(make, _write_json, _read_json)


_RECEIVED, _MICRO = (_Field(name, "I", 0, 2**32 - 1) for name in ("received", "micro"))
_LAYOUTS: dict[int, _Layout] = {
    **{kind: _message(kind) for kind in (Kind.OPEN, Kind.OPENED, Kind.CLOSE)},
    Kind.STEP: _Layout(Step, _write_step, _read_step, flags=ROW_MAP | TEXT, want_result=WANT_RESULT),
    Kind.RESULT: _Layout(Result, _write_states, _read_states),
    Kind.FORWARD: _Layout(
        Forward,
        _write_forward,
        _read_forward,
        _RECEIVED,
        _MICRO,
        _Field("seed", "I", 0, 2**31 - 1),
        training=TRAINING,
        recompute=RECOMPUTE,
        want_gradient=WANT_GRADIENT,
    ),
    Kind.BACKWARD: _Layout(
        Backward,
        _write_gradient,
        _read_gradient,
        _RECEIVED,
        _MICRO,
        _Field("exponent", "i", SMALLEST_EXPONENT, 200),
        _Field("weight", "f", 2.0**-149, MAX_WEIGHT),
        fresh=FRESH,
    ),
    Kind.STATES: _Layout(
        States, _write_states, _read_states, _Field("exponent", "i", -200, 200), _Field("norm", "f", 0, float("inf"))
    ),
    Kind.COMMAND: _Layout(Command, _write_json, _read_json, _RECEIVED),
    Kind.OUTCOME: _Layout(Outcome, _write_json, _read_json),
    Kind.TENSORS: _Layout(Tensors, _write_named, _read_named, _RECEIVED, more=MORE),
}
