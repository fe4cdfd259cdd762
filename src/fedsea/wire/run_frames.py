"""Frames of a run: training over the wire. docs/wire.md describes the layout.

    offset  size  field
    0       16    as every frame (frames.py); the step is the number of the operation, counted from 1 in a run
    16      4     last reply that the client has (client), 0 (server)
    20      4     micro-batch
    24      4     exponent, signed: the tensor is 2**exponent times what it stands for; FORWARD: seed of its dropout
    28      4     float32: norm of the middle adapter's gradient so far (STATES of a BACKWARD), infinity: not finite;
                  weight of the gradient beside other clients' (BACKWARD)
    32      ..    FORWARD: start and count of each row, then the tensor; COMMAND, OUTCOME: JSON; TENSORS: safetensors

A client numbers its operations; the server does them in this order and answers each with one frame of the same number.
It keeps an answer until the client says that it has it, so an operation is done exactly once, whatever happens to the
connection.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedsea.errors import LimitExceededError, ProtocolError
from fedsea.parts.rows import Rows
from fedsea.wire.frames import (
    HEADER,
    MAX_PLACES,
    NO_RESULT,
    VERSION,
    Kind,
    Message,
    decode,
    decode_json,
    decode_rows,
    decode_tensor,
    dtype_code,
    encode,
    encode_json,
    encode_rows,
    is_finite,
    pack,
    tensor_bytes,
)

MAX_TENSORS = 4096  # in one frame
MAX_TENSORS_HEADER = 1 << 20  # bytes of safetensors' own description of them
ADAPTER = "adapter"  # the kind of tensor that is a weight: `adapter/NAME`; others are the optimizer's, `exp_avg/NAME`
STATES = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # of torch's optimizers, by name
RUN = struct.Struct("<IIif")
START = HEADER.size + RUN.size
TRAINING, RECOMPUTE, FRESH, MORE = 4, 8, 16, 32
_FLAGS = {Kind.FORWARD: NO_RESULT | TRAINING | RECOMPUTE, Kind.BACKWARD: FRESH, Kind.TENSORS: MORE}
MAX_WEIGHT = 2.0**30  # of a gradient beside others: more tokens than a step can have
FLOAT16_TOP = 14  # gradients are scaled so that their largest is just below 2**14
SMALLEST_EXPONENT = -114  # of a gradient, for float32's largest; below it, undoing it would leave float32's range


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
    """

    number: int
    micro: int
    rows: Rows
    states: Tensor = field(repr=False)
    training: bool = True
    recompute: bool = False
    want_gradient: bool = True
    seed: int = 0


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
    """

    number: int
    micro: int
    gradient: Tensor = field(repr=False)
    exponent: int = 0
    fresh: bool = False
    weight: float = 1.0


@dataclass(frozen=True)
class Command:
    """A request without a micro-batch: an optimizer step, say."""

    number: int
    body: dict[str, Any]


@dataclass(frozen=True)
class Tensors:
    """Some named float32 tensors of an adapter or its optimizer: to the server to be set, from it as an answer.

    Attributes
    ----------
    more
        In an answer: there are further ones to ask for.
    """

    number: int
    tensors: dict[str, Tensor] = field(repr=False)
    more: bool = False


@dataclass(frozen=True)
class States:
    """The answer to FORWARD (`h_B`) and BACKWARD (the scaled gradient at `h_A`, and the norm of the adapter's so far).

    A gradient that is not finite in the middle has the norm infinity, and no tensor.
    """

    number: int
    states: Tensor | None = field(repr=False)
    exponent: int = 0
    norm: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The answer to COMMAND and TENSORS."""

    number: int
    body: dict[str, Any]


Operation = Forward | Backward | Command | Tensors
Reply = States | Outcome | Tensors
RunFrame = Message | Operation | Reply


def encode_run(frame: RunFrame, *, received: int = 0) -> bytes:
    """A frame's bytes; `received` is the last reply that the client has.

    Raises
    ------
    ProtocolError
        If a message is longer than a peer accepts, or a number does not fit its field.
    """
    if isinstance(frame, Message):
        return encode(frame)
    micro = exponent = flags = hidden = code = 0
    norm, before, tensor, body = 0.0, b"", None, b""
    if isinstance(frame, Forward):
        kind, micro, tensor, count = Kind.FORWARD, frame.micro, frame.states, len(frame.rows)
        before, exponent = encode_rows(frame.rows), frame.seed
        flags = TRAINING * frame.training | RECOMPUTE * frame.recompute | NO_RESULT * (not frame.want_gradient)
    elif isinstance(frame, Backward):
        kind, micro, tensor, exponent = Kind.BACKWARD, frame.micro, frame.gradient, frame.exponent
        count = len(tensor)
        flags, norm = FRESH * frame.fresh, frame.weight
    elif isinstance(frame, States):
        kind, tensor, exponent, norm = Kind.STATES, frame.states, frame.exponent, frame.norm
        count = len(tensor) if tensor is not None else 0
    elif isinstance(frame, Tensors):
        kind, flags, body = Kind.TENSORS, MORE * frame.more, save(frame.tensors)
        count = len(body)
    else:
        kind, body = (Kind.COMMAND if isinstance(frame, Command) else Kind.OUTCOME), encode_json(frame.body)
        count = len(body)
    if tensor is not None:
        code, hidden, body = dtype_code(tensor.dtype), tensor.shape[1], tensor_bytes(tensor)
    header = pack(HEADER, VERSION, kind, code, flags, frame.number, count, hidden)
    return header + pack(RUN, received, micro, exponent, norm) + before + body


def decode_run(
    data: bytes, *, max_bytes: int | None = None, knows: Callable[[str], bool] = lambda _name: True
) -> tuple[RunFrame, int]:
    """The frame in `data`, which may come from anybody, and the last reply that its sender has.

    Parameters
    ----------
    knows
        Whether there is a tensor of a name; one that is not known is refused before anything is made of the others.

    Raises
    ------
    ProtocolError
        If the bytes are not exactly one well-formed frame, a tensor is not known, or its values are not finite.
    LimitExceededError
        If they are more than `max_bytes`.
    """
    if max_bytes is not None and len(data) > max_bytes:
        raise LimitExceededError(f"a frame of {len(data)} bytes is over the limit of {max_bytes} bytes a frame")
    if len(data) < 2 or data[0] != VERSION or data[1] < Kind.FORWARD:
        frame = decode(data)
        if not isinstance(frame, Message):
            raise ProtocolError("a frame of a session came in a run")
        return frame, 0
    if len(data) < START:
        raise ProtocolError(f"a frame of {len(data)} bytes is shorter than its header of {START}")
    _version, kind, code, flags, number, count, hidden = HEADER.unpack_from(data)
    received, micro, exponent, norm = RUN.unpack_from(data, HEADER.size)
    if flags & ~_FLAGS.get(kind, 0):
        raise ProtocolError(f"a frame of kind {kind} has unknown flags ({flags})")
    if not (exponent >= 0 if kind == Kind.FORWARD else -200 <= exponent <= 200):
        raise ProtocolError(f"an exponent of {exponent} is out of its range")
    if kind == Kind.FORWARD:
        rows = decode_rows(data, START, count)
        if any(rows.starts):
            raise ProtocolError("a micro-batch holds whole texts; one of its rows starts later")
        if count > 1 and count * rows.width > MAX_PLACES:
            raise ProtocolError(f"a micro-batch of {count} rows x {rows.width} tokens is over {MAX_PLACES} places")
        states = decode_tensor(data, START + 8 * count, code, rows.total, hidden)
        training, recompute = bool(flags & TRAINING), bool(flags & RECOMPUTE)
        return Forward(number, micro, rows, states, training, recompute, not flags & NO_RESULT, exponent), received
    if kind == Kind.BACKWARD:
        if exponent < SMALLEST_EXPONENT:
            raise ProtocolError(f"an exponent of {exponent} is out of its range")
        if not 0 < norm <= MAX_WEIGHT:
            raise ProtocolError(f"a gradient's weight must be above 0, at most {MAX_WEIGHT:g}; got {norm}")
        gradient = decode_tensor(data, START, code, count, hidden)
        return Backward(number, micro, gradient, exponent, bool(flags & FRESH), norm), received
    if kind == Kind.STATES:
        if math.isnan(norm):
            raise ProtocolError("the norm of a gradient is not a number")
        nothing = code == count == hidden == 0 and len(data) == START
        answer = None if nothing else decode_tensor(data, START, code, count, hidden)
        return States(number, answer, exponent, norm), received
    if kind == Kind.TENSORS:
        return Tensors(number, _decode_tensors(data, count, knows), bool(flags & MORE)), received
    if kind in (Kind.COMMAND, Kind.OUTCOME):
        body = decode_json(data, START, count)
        return (Command if kind == Kind.COMMAND else Outcome)(number, body), received
    raise ProtocolError(f"there is no frame of kind {kind}")


def _decode_tensors(data: bytes, length: int, knows: Callable[[str], bool]) -> dict[str, Tensor]:
    if len(data) != START + length:
        raise ProtocolError(f"a frame says it has {length} bytes of tensors and has {len(data) - START}")
    for name in _tensor_names(data):
        if not knows(name):
            raise ProtocolError(f"the adapter has no weight {name.rpartition('/')[2][:200]!r}")
    try:
        tensors = load(data[START:])
    except (SafetensorError, ValueError, KeyError) as error:
        raise ProtocolError("a frame's tensors are not in the safetensors format") from error
    for name, tensor in tensors.items():
        if tensor.dtype is not torch.float32:
            raise ProtocolError(f"{name} is {tensor.dtype}; adapters and their optimizers are float32")
        if tensor.numel() and not is_finite(tensor):
            raise ProtocolError(f"{name} holds values that are not finite")
    return tensors


def read_pages(ask: Callable[[str], Reply], shapes: Mapping[str, tuple[int, ...] | None]) -> dict[str, Tensor]:
    """Take what a server exports, page by page: tensors of these names and shapes, each once, and nothing else.

    Parameters
    ----------
    ask
        Asks for the page behind a name; names go up.
    shapes
        Of every name that the server may send; None where any will do. It may leave some out.

    Raises
    ------
    ProtocolError
        If it sends anything else. So it can neither put a name of its own among the client's nor go on for ever.
    """
    found: dict[str, Tensor] = {}
    more, last = True, ""
    while more:
        page = ask(last)
        if not isinstance(page, Tensors) or (page.more and not page.tensors):
            raise ProtocolError("the block server did not answer an export with tensors")
        for name, tensor in page.tensors.items():
            if name <= last or name not in shapes:
                raise ProtocolError(f"the block server exports {name[:100]!r}, which was not asked for")
            if (shape := shapes[name]) is not None and tuple(tensor.shape) != shape:
                raise ProtocolError(f"the block server exports {name} as {list(tensor.shape)}, not {list(shape)}")
        found |= page.tensors
        more, last = page.more, max(page.tensors, default=last)
    return found


def export_shapes(weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What the export of a run may hold, by name: the weights, and an optimizer's states for each."""
    states = {f"{kind}/{name}": () if kind == "step" else shape for kind in STATES for name, shape in weights.items()}
    return {f"{ADAPTER}/{name}": shape for name, shape in weights.items()} | states


def _tensor_names(data: bytes) -> list[str]:
    """The names that a frame of tensors has, before any is made: a tensor costs its reader more than it costs to send.

    safetensors begins with the length of its header, 8 bytes, and the header, a JSON object with an entry a tensor.
    """
    size = int.from_bytes(data[START : START + 8], "little")
    if size > MAX_TENSORS_HEADER:
        raise ProtocolError(f"the header of a frame's tensors is over {MAX_TENSORS_HEADER} bytes")
    try:
        header = json.loads(data[START + 8 : START + 8 + size])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ProtocolError("a frame's tensors are not in the safetensors format")
    names = [name for name in header if name != "__metadata__"]
    if len(names) > MAX_TENSORS:
        raise ProtocolError(f"a frame has {len(names)} tensors; {MAX_TENSORS} are allowed")
    return names


def page(tensors: Mapping[str, Tensor], after: str, limit: int) -> tuple[dict[str, Tensor], bool]:
    """Those behind a name, in order, that fit into a frame with `limit` bytes (one at least); and if there are more.

    As they travel: float32, on the CPU.
    """
    names, chosen, size = sorted(name for name in tensors if name > after), dict[str, Tensor](), 0
    for name in names[:MAX_TENSORS]:
        size += 4 * tensors[name].numel() + len(name) + 64
        if chosen and size > limit:
            break
        chosen[name] = tensors[name].detach().to("cpu", torch.float32).contiguous()
    return chosen, len(chosen) < len(names)


def pages(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """All of them, page by page."""
    more, after = bool(tensors), ""
    while more:
        chosen, more = page(tensors, after, limit)
        after = max(chosen)
        yield chosen


def gradient_to_wire(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """A finite gradient in the wire dtype, on the CPU, and the exponent by which it was scaled for it.

    A mean loss's gradients are around 1e-6 and smaller, where float16 has few digits or none: they are multiplied by
    the power of two that makes the largest of them almost 2**14. Other dtypes have the range they need.
    """
    exponent = 0
    if dtype is torch.float16:
        largest = float(gradient.abs().max())
        if largest > 0:
            exponent = max(SMALLEST_EXPONENT, min(100, FLOAT16_TOP - math.frexp(largest)[1]))
            gradient = gradient.float() * 2.0**exponent
    return gradient.detach().to(device="cpu", dtype=dtype), exponent
