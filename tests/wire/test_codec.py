"""Frames survive the way over the wire bit for bit, and bytes that are no frame are refused, whatever they are."""

import math
import struct
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import save

from fedsea.errors import LimitExceededError, ProtocolError
from fedsea.parts import Rows
from fedsea.wire.codec import (
    FRESH,
    HEADER,
    MAX_JSON,
    MAX_PLACES,
    MAX_ROWS,
    MAX_WEIGHT,
    MORE,
    ROW_MAP,
    TEXT,
    TRAINING,
    VERSION,
    decode,
    encode,
    overhead,
)
from fedsea.wire.frames import Backward, Command, Forward, Frame, Kind, Message, Outcome, Result, States, Step, Tensors

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
THOROUGH = settings(max_examples=600, deadline=None)
NUMBERS = some.integers(0, 2**32 - 1)


@some.composite
def states(draw: some.DrawFn, tokens: int) -> torch.Tensor:
    hidden = draw(some.integers(1, 9))
    values = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(draw(some.integers(0, 2**31))))
    return values.to(draw(some.sampled_from(DTYPES)))


@some.composite
def steps(draw: some.DrawFn) -> Step:
    count = draw(some.integers(1, 5))
    counts = draw(some.lists(some.integers(0, 6), min_size=count, max_size=count).filter(any))
    starts = draw(some.lists(NUMBERS, min_size=count, max_size=count))
    row_map = draw(some.none() | some.lists(NUMBERS, min_size=count, max_size=count).map(tuple))
    end = max(start + count for start, count in zip(starts, counts, strict=True))
    text = draw(some.just(0) | some.integers(end + 1, 2**32 - 1)) if end < 2**32 - 1 else 0
    rows = Rows(tuple(starts), tuple(counts), text)
    return Step(draw(NUMBERS), rows, draw(states(rows.total)), row_map, want_result=draw(some.booleans()))


@some.composite
def forwards(draw: some.DrawFn) -> Forward:
    counts = tuple(draw(some.lists(some.integers(1, 6), min_size=1, max_size=5)))
    rows = Rows((0,) * len(counts), counts)
    switches, seed = draw(some.tuples(*[some.booleans()] * 3)), draw(some.integers(0, 2**31 - 1))
    return Forward(draw(NUMBERS), draw(NUMBERS), rows, draw(states(rows.total)), *switches, seed, draw(NUMBERS))


@some.composite
def named(draw: some.DrawFn) -> Tensors:
    names = draw(some.lists(some.text(min_size=1, max_size=8), max_size=3, unique=True))
    sizes = [draw(some.lists(some.integers(0, 3), max_size=2)) for _ in names]
    held = {name: torch.randn(size) for name, size in zip(names, sizes, strict=True)}
    return Tensors(draw(NUMBERS), held, draw(some.booleans()), draw(NUMBERS))


SOME_STATES = some.integers(1, 6).flatmap(states)
JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.text(), lambda inner: some.lists(inner, max_size=3)
)
BODIES = some.dictionaries(some.text(max_size=8), JSON, max_size=4)
FRAMES = some.one_of(
    some.builds(Message, some.sampled_from([Kind.OPEN, Kind.OPENED, Kind.CLOSE]), BODIES),
    steps(),
    some.builds(Result, NUMBERS, some.none() | SOME_STATES),
    forwards(),
    some.builds(
        Backward,
        NUMBERS,
        NUMBERS,
        SOME_STATES,
        some.integers(-114, 200),
        some.booleans(),
        some.floats(0, MAX_WEIGHT, exclude_min=True, width=32),
        NUMBERS,
    ),
    some.builds(Command, NUMBERS, BODIES, NUMBERS),
    named(),
    some.builds(
        States, NUMBERS, some.none() | SOME_STATES, some.integers(-200, 200), some.floats(0, width=32, allow_nan=False)
    ),
    some.builds(Outcome, NUMBERS, BODIES),
)


def arrived(data: bytes) -> Frame:
    return decode(data, knows=lambda _name: True)


def plain(value: Any) -> Any:
    """Something that compares: a tensor as its dtype, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.reshape(-1).view(torch.uint8).numpy().tobytes()
    return {name: plain(one) for name, one in value.items()} if isinstance(value, dict) else value


@given(FRAMES)
@THOROUGH
def test_a_frame_arrives_as_it_was_sent(frame: Frame) -> None:
    came = arrived(encode(frame))
    assert type(came) is type(frame)
    assert plain(vars(came)) == plain(vars(frame))


def test_a_step_costs_its_tensor_and_24_bytes_for_one_row_and_its_result_16() -> None:
    hidden = torch.zeros(1, 576, dtype=torch.float16)
    # Written out by hand, as docs/wire.md describes it: version, kind, dtype, flags, step, rows, width, start, count.
    step = struct.pack("<BBBBIIIII", 2, 3, 2, 1, 7, 1, 576, 41, 1)
    assert encode(Step(7, Rows((41,), (1,)), hidden)) == step + bytes(2 * 576)
    assert encode(Result(7, hidden)) == struct.pack("<BBBBIII", 2, 4, 2, 0, 7, 1, 576) + bytes(2 * 576)


def test_a_forward_and_its_answer_cost_their_tensors_and_60_bytes_for_one_row() -> None:
    hidden = torch.zeros(5, 576, dtype=torch.float16)
    assert encode(Forward(7, 3, Rows((0,), (5,)), hidden, received=6)) == (
        struct.pack("<BBBBIIIIIIII", 2, 6, 2, 8 | 32, 7, 1, 576, 6, 3, 0, 0, 5) + bytes(5 * 2 * 576)
    )
    assert encode(States(7, hidden, 9, 0.5)) == (
        struct.pack("<BBBBIIIif", 2, 9, 2, 0, 7, 5, 576, 9, 0.5) + bytes(5 * 2 * 576)
    )


def test_no_frame_has_more_bytes_besides_its_states_than_is_reckoned_with() -> None:
    hidden = torch.zeros(6, 4)
    rows = Rows((0, 0), (3, 3), text=9)
    assert len(encode(Step(1, rows, hidden, row_map=(0, 1)))) == hidden.nbytes + overhead(Kind.STEP, 2)
    assert len(encode(Forward(1, 1, rows, hidden))) == hidden.nbytes + overhead(Kind.FORWARD, 2)


def refused_or_a_frame(data: bytes) -> None:
    """Whatever a frame is made of the bytes has finite numbers alone."""
    try:
        held = vars(arrived(data))
    except ProtocolError:
        return
    tensors = [value for value in held.values() if isinstance(value, torch.Tensor)]
    tensors += held.get("tensors", {}).values()
    assert all(bool(torch.isfinite(one).all()) for one in tensors)


BYTES = [some.integers(0, most) for most in (13, 4, 255)]  # kind, dtype, flags
HEADERS = some.builds(HEADER.pack, some.just(VERSION), *BYTES, *[some.integers(0, 9) | NUMBERS] * 3)


@given(some.just(b"") | HEADERS, some.binary(max_size=300))
@THOROUGH
def test_any_header_before_any_bytes_is_a_protocol_error_and_nothing_else(header: bytes, rest: bytes) -> None:
    refused_or_a_frame(header + rest)


@given(FRAMES, some.data())
@THOROUGH
def test_a_damaged_frame_is_a_protocol_error_or_another_valid_frame(frame: Frame, data: some.DataObject) -> None:
    damaged = bytearray(encode(frame))
    for _ in range(data.draw(some.integers(1, 4))):
        damaged[data.draw(some.integers(0, len(damaged) - 1))] = data.draw(some.integers(0, 255))
    refused_or_a_frame(bytes(damaged))


@given(FRAMES, some.data())
@THOROUGH
def test_a_frame_cut_short_or_with_bytes_too_many_is_refused(frame: Frame, data: some.DataObject) -> None:
    whole = encode(frame)
    end = data.draw(some.integers(0, len(whole) - 1))
    for wrong in (whole[:end], whole + bytes(data.draw(some.integers(1, 9)))):
        with pytest.raises(ProtocolError):
            arrived(wrong)


ROW = struct.pack("<II", 0, 1)
FOUR = bytes(16)  # a state of four numbers in float32


def raw(kind: int, *own: bytes, **header: int) -> bytes:
    fields = {"version": VERSION, "kind": kind, "dtype": 1, "flags": 0, "number": 1, "length": 1, "width": 4} | header
    return HEADER.pack(*fields.values()) + b"".join(own)


def step(own: bytes = ROW + FOUR, **more: Any) -> bytes:
    return raw(Kind.STEP, own, **more)


def forward(own: bytes = ROW + FOUR, seed: int = 0, **more: Any) -> bytes:
    return raw(Kind.FORWARD, struct.pack("<3I", 0, 0, seed), own, **more)


def backward(own: bytes = FOUR, exponent: int = 0, weight: float = 1.0, **more: Any) -> bytes:
    return raw(Kind.BACKWARD, struct.pack("<IIif", 0, 0, exponent, weight), own, **more)


def message(text: bytes, length: int | None = None, **more: Any) -> bytes:
    length = len(text) if length is None else length
    return raw(Kind.OPEN, text, length=length, **{"dtype": 0, "width": 0, "number": 0} | more)


def tensors(body: bytes, length: int | None = None, **more: Any) -> bytes:
    length = len(body) if length is None else length
    return raw(Kind.TENSORS, bytes(4), body, length=length, **{"dtype": 0, "width": 0} | more)


WRONG: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "shorter than its header of 16"),
    "another version": (step(version=1), r"different versions of the protocol \(1 and 2\)"),
    "no kind": (raw(0), "kind 0"),
    "unknown kind": (raw(12), "kind 12"),
    "a header cut short": (forward()[:27], "shorter than its header of 28"),
    "a tensor of no dtype": (step(dtype=0), "unknown dtype"),
    "a tensor of an unknown dtype": (backward(dtype=4), "unknown dtype"),
    "a tensor of another dtype": (step(dtype=2), "has 8 bytes, 16 came"),
    "flags of another kind": (step(flags=TRAINING), "STEP has unknown flags"),
    "flags of no kind": (raw(Kind.RESULT, FOUR, flags=FRESH), "RESULT has unknown flags"),
    "flags of a message": (message(b"{}", flags=MORE), "OPEN has unknown flags"),
    "a text shorter than its step": (step(flags=TEXT, own=ROW + bytes(20)), "is said to have 0 tokens, and has 1"),
    "no length of the text": (step(flags=TEXT, own=ROW), "ends after 24 bytes"),
    "no row map": (step(flags=ROW_MAP), "has 16 bytes, 12 came"),
    "no rows": (step(length=0), "0 rows"),
    "too many rows": (step(length=MAX_ROWS + 1), f"{MAX_ROWS + 1} rows"),
    "far too many rows": (forward(length=2**32 - 1), "rows"),
    "rows that did not come": (step(length=900), "ends after"),
    "no numbers": (step(width=0), "0 bytes"),
    "more numbers than came": (step(width=5), "20 bytes"),
    "far more numbers than came": (step(width=2**32 - 1), "bytes"),
    "no tokens": (step(own=struct.pack("<II", 5, 0)), "no tokens"),
    "a step of too many places": (step(own=struct.pack("<II", 0, MAX_PLACES + 1)), "places"),
    "a micro-batch of too many places": (
        forward(length=9, own=struct.pack("<18I", *[0, 0] * 8, 0, 500) + bytes(500 * 16)),
        "over 4096 places",
    ),
    "a text that starts later": (forward(own=struct.pack("<II", 1, 1) + FOUR), "starts later"),
    "a result of no dtype": (raw(Kind.RESULT, dtype=0), "unknown dtype"),
    "no gradient": (backward(own=b"", dtype=0, length=0, width=0), "unknown dtype"),
    "a seed of 32 bits": (forward(seed=2**31), "seed of FORWARD is out of its range: 2147483648"),
    "an exponent out of reach": (backward(exponent=201), "exponent of BACKWARD is out of its range: 201"),
    "an exponent that is undone to infinity": (backward(exponent=-115), "exponent .* out of its range: -115"),
    "no weight": (backward(weight=0.0), r"weight of BACKWARD is out of its range: 0\.0"),
    "an endless weight": (backward(weight=math.inf), "weight .* out of its range: inf"),
    "a weight that is no number": (backward(weight=math.nan), "weight .* out of its range: nan"),
    "a norm that is no number": (
        raw(Kind.STATES, struct.pack("<if", 0, math.nan), FOUR),
        "norm of STATES is out of its range: nan",
    ),
    "NaN": (backward(own=struct.pack("<4f", 0, math.nan, 0, 0)), "not finite"),
    "a message with a dtype": (message(b"{}", dtype=1), "header fields"),
    "a message with a width": (raw(Kind.OUTCOME, b"{}", dtype=0, length=2), "header fields"),
    "a message with a number": (message(b"{}", number=1), "OPEN has a number"),
    "a message of another length": (message(b"{}", length=1), "says it has 1 bytes of content and has 2"),
    "a message too long": (message(b'{"a":"' + b"x" * MAX_JSON + b'"}'), "says it has"),
    "no JSON": (message(b""), "not JSON"),
    "no text": (message(b"\xff\xfe\x00"), "not JSON"),
    "no object": (message(b"[1]"), "not a JSON object"),
    "deep objects": (message(b'{"a":' * 13_000), "not JSON"),
    "deep lists": (message(b"[" * 60_000), "not JSON"),
    "a long number": (message(b'{"a":' + b"9" * 60_000 + b"}"), "not JSON"),
    "no safetensors": (tensors(bytes(9)), "not in the safetensors format"),
    "tensors of another length": (tensors(bytes(8), length=9), "says it has 9 bytes"),
    "tensors with a dtype": (tensors(save({}), dtype=1), "header fields"),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_wrong_field_is_refused_in_words(case: str) -> None:
    data, says = WRONG[case]
    with pytest.raises(ProtocolError, match=says):
        arrived(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_refused(value: float, dtype: torch.dtype) -> None:
    hidden = torch.zeros(2, 3, dtype=dtype)
    hidden[1, 2] = value
    for frame in (Step(1, Rows((0,), (2,)), hidden), Result(1, hidden), Backward(1, 1, hidden)):
        with pytest.raises(ProtocolError, match="not finite"):
            decode(encode(frame))


@pytest.mark.parametrize("wrong", [torch.zeros(2, dtype=torch.float16), torch.tensor([1.0, math.inf]), torch.arange(2)])
def test_named_tensors_are_finite_float32_and_nothing_else(wrong: torch.Tensor) -> None:
    with pytest.raises(ProtocolError, match=r"wrong (is|holds)"):
        arrived(tensors(save({"good": torch.zeros(1), "wrong": wrong})))


def test_tensors_are_refused_where_none_are_known() -> None:
    with pytest.raises(ProtocolError, match="no weight 'some'"):
        decode(encode(Tensors(1, {"adapter/some": torch.zeros(1)})))


def test_a_header_that_promises_much_allocates_nothing() -> None:
    places = struct.pack("<4096I", *([1, 1] * 2048))
    promising = [
        step(own=places, length=2048, width=2**32 - 1),
        raw(Kind.RESULT, length=2**32 - 1, width=2**32 - 1),
        message(b"", length=2**32 - 1),
    ]
    tracemalloc.start()
    for data in promising:
        with pytest.raises(ProtocolError):
            decode(data)
    _now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_frame_over_the_given_limit_is_refused_by_that_name() -> None:
    data = encode(Result(1, torch.zeros(1, 8)))
    decode(data, max_bytes=len(data))
    with pytest.raises(LimitExceededError, match="limit of 47 bytes a frame"):
        decode(data, max_bytes=len(data) - 1)


def test_a_message_that_a_peer_would_refuse_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        encode(Message(Kind.OPEN, {"text": "x" * MAX_JSON}))
