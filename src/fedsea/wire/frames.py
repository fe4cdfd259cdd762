"""Frames: how tensors and small messages become bytes, and back. docs/wire.md describes the layout.

    offset  size  field
    0       1     version, 1
    1       1     kind
    2       1     dtype of the tensor (0: no tensor)
    3       1     flags: 1 row map follows, 2 no result wanted, 8 length of the text follows
    4       4     step, counted from 1 in a session
    8       4     number of rows (STEP), or length of the JSON text (OPEN, OPENED, CLOSE)
    12      4     hidden size
    16      8n    STEP: start and count of each row
    ..      4n    STEP with flag 1: for each row, which of the rows before it continues
    ..      4     STEP with flag 8: tokens that the longest row will have, where more steps of its text follow
    ..            tensor [tokens, hidden], row after row; or JSON text

All numbers are little-endian and unsigned; what a kind has no use for is 0. Nothing is read before it is checked, and
nothing is made that is larger than what came; whatever does not fit is a `ProtocolError`.
"""

import json
import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsea.errors import LimitExceededError, ProtocolError, UsageError
from fedsea.parts.rows import Rows

VERSION = 1
HEADER = struct.Struct("<BBBBIII")
MAX_JSON = 1 << 16
MAX_ROWS = 4096
MAX_PLACES = 4096  # rows x tokens of the longest row: what a step takes once it is padded to be computed
ROW_MAP, NO_RESULT, TEXT = 1, 2, 8
_DTYPES = {1: torch.float32, 2: torch.float16, 3: torch.bfloat16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_EXPONENTS = {
    torch.float32: (torch.int32, np.int32(0x7F800000)),
    torch.float16: (torch.int16, np.int16(0x7C00)),
    torch.bfloat16: (torch.int16, np.int16(0x7F80)),
}
WIRE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Kind(IntEnum):
    """What a frame is."""

    OPEN = 1
    OPENED = 2
    STEP = 3
    RESULT = 4
    CLOSE = 5
    # Of runs, in run_frames.py.
    FORWARD = 6
    BACKWARD = 7
    COMMAND = 8
    STATES = 9
    OUTCOME = 10
    TENSORS = 11


@dataclass(frozen=True)
class Step:
    """A client's frame: new hidden states `h_A` of some rows.

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

    number: int
    rows: Rows
    states: Tensor
    row_map: tuple[int, ...] | None = None
    want_result: bool = True


@dataclass(frozen=True)
class Result:
    """The server's answer to a step: `h_B` of the same tokens, `[tokens, hidden]`, or no tensor if none was wanted."""

    number: int
    states: Tensor | None


@dataclass(frozen=True)
class Message:
    """A frame that carries a small JSON object: OPEN, OPENED or CLOSE."""

    kind: Kind
    body: dict[str, Any]


Frame = Step | Result | Message


def encode(frame: Frame) -> bytes:
    """A frame's bytes.

    Raises
    ------
    ProtocolError
        If a message is longer than a peer accepts, or a number does not fit its field.
    """
    if isinstance(frame, Message):
        text = encode_json(frame.body)
        return pack(HEADER, VERSION, frame.kind, 0, 0, 0, len(text), 0) + text
    if isinstance(frame, Result):
        if frame.states is None:
            return pack(HEADER, VERSION, Kind.RESULT, 0, 0, frame.number, 0, 0)
        tokens, hidden = frame.states.shape
        code = _CODES[frame.states.dtype]
        return pack(HEADER, VERSION, Kind.RESULT, code, 0, frame.number, tokens, hidden) + tensor_bytes(frame.states)
    rows, count = frame.rows, len(frame.rows)
    flags = (ROW_MAP if frame.row_map is not None else 0) | (0 if frame.want_result else NO_RESULT)
    text = pack(struct.Struct("<I"), rows.text) if rows.text > max(rows.ends) else b""
    flags |= TEXT if text else 0
    hidden = frame.states.shape[1]
    header = pack(HEADER, VERSION, Kind.STEP, _CODES[frame.states.dtype], flags, frame.number, count, hidden)
    mapping = pack(struct.Struct(f"<{count}I"), *frame.row_map) if frame.row_map is not None else b""
    return header + encode_rows(rows) + mapping + text + tensor_bytes(frame.states)


def pack(fields: struct.Struct, *values: float) -> bytes:
    """Some fields of a frame.

    Raises
    ------
    ProtocolError
        If a value does not fit its field: what a peer counts may be larger than a frame can say.
    """
    try:
        return fields.pack(*values)
    except (struct.error, OverflowError) as error:
        raise ProtocolError(f"a number does not fit a frame's field: {error}") from None


def decode(data: bytes, *, max_bytes: int | None = None) -> Frame:
    """The frame in `data`, which may come from anybody.

    Raises
    ------
    ProtocolError
        If the bytes are not exactly one well-formed frame, or its tensor holds values that are not finite.
    LimitExceededError
        If they are more than `max_bytes`.
    """
    if max_bytes is not None and len(data) > max_bytes:
        raise LimitExceededError(f"a frame of {len(data)} bytes is over the limit of {max_bytes} bytes a frame")
    if len(data) < HEADER.size:
        raise ProtocolError(f"a frame of {len(data)} bytes is shorter than its header of {HEADER.size}")
    version, kind, code, flags, number, count, hidden = HEADER.unpack_from(data)
    if version != VERSION:
        raise ProtocolError(f"this side speaks version {VERSION} of the protocol, the peer sent version {version}")
    if kind in (Kind.OPEN, Kind.OPENED, Kind.CLOSE):
        if code or flags or number or hidden:
            raise ProtocolError("a message has header fields that only tensors have")
        return _decode_message(data, Kind(kind), count)
    if kind == Kind.RESULT:
        if flags:
            raise ProtocolError(f"a result has unknown flags ({flags})")
        if code == count == hidden == 0 and len(data) == HEADER.size:
            return Result(number, None)
        return Result(number, decode_tensor(data, HEADER.size, code, count, hidden))
    if kind != Kind.STEP:
        raise ProtocolError(f"there is no frame of kind {kind}")
    return _decode_step(data, code, flags, number, count, hidden)


def _decode_message(data: bytes, kind: Kind, length: int) -> Message:
    return Message(kind, decode_json(data, HEADER.size, length))


def encode_json(body: dict[str, Any]) -> bytes:
    """A small JSON object.

    Raises
    ------
    ProtocolError
        If it is longer than a peer accepts.
    """
    text = json.dumps(body, separators=(",", ":")).encode()
    if len(text) > MAX_JSON:
        raise ProtocolError(f"a message of {len(text)} bytes is over the limit of {MAX_JSON}")
    return text


def decode_json(data: bytes, offset: int, length: int) -> dict[str, Any]:
    """The JSON object that the rest of a frame is.

    Raises
    ------
    ProtocolError
        If it is not.
    """
    if length > MAX_JSON or len(data) != offset + length:
        raise ProtocolError(f"a message says it has {length} bytes and has {len(data) - offset}")
    try:
        body = json.loads(data[offset:])
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a message is not JSON") from error
    if not isinstance(body, dict):
        raise ProtocolError("a message is not a JSON object")
    return body


def _decode_step(data: bytes, code: int, flags: int, number: int, count: int, hidden: int) -> Step:
    if flags & ~(ROW_MAP | NO_RESULT | TEXT):
        raise ProtocolError(f"a step has unknown flags ({flags})")
    rows = decode_rows(data, HEADER.size, count)
    if count * rows.width > MAX_PLACES:
        raise ProtocolError(f"a step of {count} rows x {rows.width} tokens is over the {MAX_PLACES} places of a step")
    offset = HEADER.size + 8 * count
    row_map = None
    if flags & ROW_MAP:
        if len(data) < offset + 4 * count:
            raise ProtocolError(f"a step of {count} rows ends after {len(data)} bytes")
        row_map = struct.unpack_from(f"<{count}I", data, offset)
        offset += 4 * count
    if flags & TEXT:
        if len(data) < offset + 4:
            raise ProtocolError(f"a step of {count} rows ends after {len(data)} bytes")
        rows = replace(rows, text=struct.unpack_from("<I", data, offset)[0])
        if rows.text <= max(rows.ends):
            raise ProtocolError(f"a step's text is said to have {rows.text} tokens, and has {max(rows.ends)}")
        offset += 4
    states = decode_tensor(data, offset, code, rows.total, hidden)
    return Step(number, rows, states, row_map, want_result=not flags & NO_RESULT)


def encode_rows(rows: Rows) -> bytes:
    """Start and count of each row."""
    numbers = (number for pair in zip(rows.starts, rows.counts, strict=True) for number in pair)
    return pack(struct.Struct(f"<{2 * len(rows)}I"), *numbers)


def decode_rows(data: bytes, offset: int, count: int) -> Rows:
    """The rows of a step, of which there are `count`.

    Raises
    ------
    ProtocolError
        If there are too many or too few, or they have no tokens.
    """
    if not 1 <= count <= MAX_ROWS:
        raise ProtocolError(f"a step has {count} rows; 1 to {MAX_ROWS} are allowed")
    if len(data) < offset + 8 * count:
        raise ProtocolError(f"a step of {count} rows ends after {len(data)} bytes")
    numbers = struct.unpack_from(f"<{2 * count}I", data, offset)
    rows = Rows(numbers[0::2], numbers[1::2])
    if rows.total == 0:
        raise ProtocolError("a step has no tokens")
    return rows


def dtype_code(dtype: torch.dtype) -> int:
    """A wire dtype as a header says it."""
    return _CODES[dtype]


def decode_tensor(data: bytes, offset: int, code: int, tokens: int, hidden: int) -> Tensor:
    """The tensor `[tokens, hidden]` that the rest of a frame is.

    Raises
    ------
    ProtocolError
        If it is not, or holds values that are not finite.
    """
    dtype = _DTYPES.get(code)
    if dtype is None:
        raise ProtocolError(f"a frame's tensor has an unknown dtype ({code})")
    expected = tokens * hidden * dtype.itemsize
    if not expected or len(data) - offset != expected:
        raise ProtocolError(f"a tensor of {tokens} x {hidden} {dtype} has {expected} bytes, {len(data) - offset} came")
    tensor = torch.frombuffer(bytearray(memoryview(data)[offset:]), dtype=dtype).view(tokens, hidden)
    if not is_finite(tensor):
        raise ProtocolError("a tensor holds values that are not finite")
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a CPU tensor in a wire dtype holds no NaN and no infinity: no exponent of all ones.

    On the bits, in numpy: at one token's size a torch operation costs more than its work, and `isfinite` is four.
    """
    integer, exponent = _EXPONENTS[tensor.dtype]
    bits = tensor.contiguous().view(integer).numpy()
    return not bool(((bits & exponent) == exponent).any())


def tensor_bytes(tensor: Tensor) -> bytes:
    """A CPU tensor's bytes, in order."""
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def to_wire(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast hidden states to the wire dtype, on the CPU.

    Raises
    ------
    UsageError
        If a value is not finite afterwards: it was not before, or float16 cannot hold it.
    """
    cast = states.detach().to(device="cpu", dtype=dtype)
    if not is_finite(cast):
        if bool(torch.isfinite(states).all()):
            raise UsageError(
                f"hidden states are too large for {dtype} on the wire; use wire_dtype='bfloat16' or 'float32'"
            )
        raise UsageError(
            "hidden states are not finite (NaN or infinite) before they leave; try another dtype or less noise"
        )
    return cast


def wire_dtype(name: str) -> torch.dtype:
    """The torch dtype of a wire dtype's name.

    Raises
    ------
    UsageError
        If there is no such wire dtype.
    """
    if name not in WIRE_DTYPES:
        raise UsageError(f"the wire dtype must be one of {', '.join(WIRE_DTYPES)}; got {name!r}")
    return WIRE_DTYPES[name]
