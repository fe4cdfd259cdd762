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
from typing import Any, NamedTuple

from safetensors.torch import save
from torch import Tensor

from fedsea.errors import LimitExceededError, ProtocolError
from fedsea.parts.rows import Rows
from fedsea.wire.frames import (
    Backward,
    Command,
    Forward,
    Frame,
    Kind,
    Message,
    Outcome,
    Result,
    States,
    Step,
    Tensors,
)
from fedsea.wire.tensors import CODES, SMALLEST_EXPONENT, read_named, read_states, tensor_bytes

VERSION = 2
HEADER = struct.Struct("<BBBBIII")
MAX_JSON = 1 << 16
MAX_ROWS = 4096
MAX_PLACES = 4096  # rows x tokens of the longest row: what a step takes once it is padded to be computed
MAX_WEIGHT = 2.0**30  # of a gradient beside others: more tokens than a step can have
WANT_RESULT, ROW_MAP, TEXT, TRAINING, RECOMPUTE, WANT_GRADIENT, FRESH, MORE = (1 << bit for bit in range(8))


class Header(NamedTuple):
    """What every frame begins with."""

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


class _Incoming(NamedTuple):
    """A frame that came, checked and read up to its content, which begins at `offset`."""

    header: Header
    data: bytes
    offset: int
    knows: Callable[[str], bool]


class _Field(NamedTuple):
    """A number that a kind of frame has: its name there, its code in `struct`, and its bounds."""

    name: str
    code: str
    low: float
    high: float


class _Layout:
    """How a kind of frame is written and read.

    `make` makes the frame from its attributes, `write` its content; `read` gives the attributes that the content has.
    `switches` are the flags of attributes that are true or false; `flags` those that `write` and `read` see to.
    """

    def __init__(
        self,
        make: Callable[..., Frame],
        write: Callable[[Any], _Content],
        read: Callable[[_Incoming], dict[str, Any]],
        *fields: _Field,
        flags: int = 0,
        **switches: int,
    ) -> None:
        self.make, self.write, self.read, self.fields = make, write, read, fields
        self.switches, self.flags = tuple(switches.items()), flags | sum(switches.values())
        self.struct = struct.Struct(HEADER.format + "".join(field.code for field in fields))
        self.start = self.struct.size  # of the content


def overhead(kind: Kind, rows: int) -> int:
    """The most bytes that a frame with states has besides them."""
    return _LAYOUTS[kind].start + (8 * rows + 4 * rows + 4 if kind is Kind.STEP else 8 * rows)


def _no_name(_name: str) -> bool:
    return False


def encode(frame: Frame) -> bytes:
    """A frame's bytes.

    Raises
    ------
    ProtocolError
        If a message is longer than a peer accepts, or a number does not fit its field.
    """
    layout = _LAYOUTS[frame.kind]
    data, length, width, dtype, flags, before = layout.write(frame)
    for name, flag in layout.switches:
        if getattr(frame, name):
            flags |= flag
    own = [getattr(frame, field.name) for field in layout.fields]
    return _pack(layout.struct, VERSION, frame.kind, dtype, flags, frame.number, length, width, *own) + before + data


def decode(data: bytes, *, max_bytes: int | None = None, knows: Callable[[str], bool] = _no_name) -> Frame:
    """The frame in `data`, which may come from anybody.

    Parameters
    ----------
    knows
        Whether the reader has a tensor of a name (by default it has none); TENSORS with another are refused before any
        is made.

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
    header = Header._make(HEADER.unpack_from(data))
    if header.version != VERSION:
        raise ProtocolError(other_version(header.version))
    layout = _LAYOUTS.get(header.kind)
    if layout is None:
        raise ProtocolError(f"there is no frame of kind {header.kind}")
    if header.flags & ~layout.flags:
        raise ProtocolError(f"{Kind(header.kind).name} has unknown flags ({header.flags})")
    if len(data) < layout.start:
        raise ProtocolError(f"a frame of {len(data)} bytes is shorter than its header of {layout.start}")
    found: dict[str, Any] = {"number": header.number}
    if layout.fields:
        for field, value in zip(layout.fields, layout.struct.unpack_from(data)[len(header) :], strict=True):
            if not field.low <= value <= field.high:
                raise ProtocolError(f"the {field.name} of {Kind(header.kind).name} is out of its range: {value}")
            found[field.name] = value
    for name, flag in layout.switches:
        found[name] = bool(header.flags & flag)
    return layout.make(**found, **layout.read(_Incoming(header, data, layout.start, knows)))


def other_version(version: int) -> str:
    """What either side is told where the two do not speak the same version."""
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


def _read_json(came: _Incoming) -> dict[str, Any]:
    length, had = _length_of_bytes(came), len(came.data) - came.offset
    if length > MAX_JSON or had != length:
        raise ProtocolError(f"a message says it has {length} bytes and has {had}")
    try:
        body = json.loads(came.data[came.offset :])
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a message is not JSON") from error
    if not isinstance(body, dict):
        raise ProtocolError("a message is not a JSON object")
    return {"body": body}


def _write_named(frame: Tensors) -> _Content:
    data = save(frame.tensors)
    return _Content(data, len(data))


def _read_named(came: _Incoming) -> dict[str, Any]:
    length, had = _length_of_bytes(came), len(came.data) - came.offset
    if had != length:
        raise ProtocolError(f"a frame says it has {length} bytes of tensors and has {had}")
    return {"tensors": read_named(came.data[came.offset :], came.knows)}


def _length_of_bytes(came: _Incoming) -> int:
    if came.header.dtype or came.header.width:
        raise ProtocolError("a frame without states has header fields that only states have")
    return came.header.length


def _write_states(frame: Result | States) -> _Content:
    return _of_tensor(frame.states) if frame.states is not None else _Content(b"", 0)


def _write_gradient(frame: Backward) -> _Content:
    return _of_tensor(frame.gradient)


def _of_tensor(states: Tensor) -> _Content:
    tokens, width = states.shape
    return _Content(tensor_bytes(states), tokens, width, CODES[states.dtype])


def _read_states(came: _Incoming) -> dict[str, Any]:
    header = came.header
    if header.dtype == header.length == header.width == 0 and len(came.data) == came.offset:
        return {"states": None}
    return {"states": read_states(came.data, came.offset, header.dtype, header.length, header.width)}


def _read_gradient(came: _Incoming) -> dict[str, Any]:
    return {"gradient": read_states(came.data, came.offset, came.header.dtype, came.header.length, came.header.width)}


def _write_step(step: Step) -> _Content:
    rows, states, flags, numbers = step.rows, step.states, 0, _numbers_of(step.rows)
    if step.row_map is not None:
        flags |= ROW_MAP
        numbers += step.row_map
    if rows.text > max(rows.ends):
        flags |= TEXT
        numbers.append(rows.text)
    return _Content(tensor_bytes(states), len(rows), states.shape[1], CODES[states.dtype], flags, _packed(numbers))


def _read_step(came: _Incoming) -> dict[str, Any]:
    rows, offset = _read_rows(came)
    count, flags, row_map = len(rows), came.header.flags, None
    if count * rows.width > MAX_PLACES:
        raise ProtocolError(f"a step of {count} rows x {rows.width} tokens is over the {MAX_PLACES} places of a step")
    if flags & ROW_MAP:
        row_map, offset = _read_numbers(came.data, offset, count)
    if flags & TEXT:
        (text,), offset = _read_numbers(came.data, offset, 1)
        if text <= max(rows.ends):
            raise ProtocolError(f"a step's text is said to have {text} tokens, and has {max(rows.ends)}")
        rows = replace(rows, text=text)
    states = read_states(came.data, offset, came.header.dtype, rows.total, came.header.width)
    return {"rows": rows, "states": states, "row_map": row_map}


def _write_forward(frame: Forward) -> _Content:
    rows, states = frame.rows, frame.states
    before = _packed(_numbers_of(rows))
    return _Content(tensor_bytes(states), len(rows), states.shape[1], CODES[states.dtype], before=before)


def _read_forward(came: _Incoming) -> dict[str, Any]:
    rows, offset = _read_rows(came)
    if any(rows.starts):
        raise ProtocolError("a micro-batch holds whole texts; one of its rows starts later")
    if len(rows) > 1 and len(rows) * rows.width > MAX_PLACES:
        raise ProtocolError(f"a micro-batch of {len(rows)} rows x {rows.width} tokens is over {MAX_PLACES} places")
    return {"rows": rows, "states": read_states(came.data, offset, came.header.dtype, rows.total, came.header.width)}


def _numbers_of(rows: Rows) -> list[int]:
    return [number for pair in zip(rows.starts, rows.counts, strict=True) for number in pair]


def _read_rows(came: _Incoming) -> tuple[Rows, int]:
    count = came.header.length
    if not 1 <= count <= MAX_ROWS:
        raise ProtocolError(f"a frame has {count} rows; 1 to {MAX_ROWS} are allowed")
    numbers, offset = _read_numbers(came.data, came.offset, 2 * count)
    rows = Rows(numbers[0::2], numbers[1::2])
    if rows.total == 0:
        raise ProtocolError("a frame's rows have no tokens")
    return rows, offset


def _packed(numbers: list[int]) -> bytes:
    return _pack(struct.Struct(f"<{len(numbers)}I"), *numbers)


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
