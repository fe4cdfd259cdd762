"""Frames survive the way over the wire bit for bit, and bytes that are no frame are refused, whatever they are."""

import struct
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from fedsea.errors import LimitExceededError, ProtocolError, UsageError
from fedsea.parts import Rows
from fedsea.wire.frames import (
    HEADER,
    MAX_JSON,
    MAX_PLACES,
    MAX_ROWS,
    NO_RESULT,
    ROW_MAP,
    TEXT,
    VERSION,
    Frame,
    Kind,
    Message,
    Result,
    Step,
    decode,
    encode,
    to_wire,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QUICK = settings(max_examples=150, deadline=None)


@some.composite
def tensors(draw: some.DrawFn, tokens: int) -> torch.Tensor:
    hidden = draw(some.integers(1, 9))
    values = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(draw(some.integers(0, 2**31))))
    return values.to(draw(some.sampled_from(DTYPES)))


@some.composite
def steps(draw: some.DrawFn) -> Step:
    count = draw(some.integers(1, 5))
    counts = draw(some.lists(some.integers(0, 6), min_size=count, max_size=count).filter(any))
    starts = draw(some.lists(some.integers(0, 2**32 - 1), min_size=count, max_size=count))
    indices = some.integers(0, 2**32 - 1)
    row_map = draw(some.none() | some.lists(indices, min_size=count, max_size=count).map(tuple))
    end = max(start + count for start, count in zip(starts, counts, strict=True))
    text = draw(some.just(0) | some.integers(end + 1, 2**32 - 1)) if end < 2**32 - 1 else 0
    rows = Rows(tuple(starts), tuple(counts), text)
    number = draw(some.integers(0, 2**32 - 1))
    return Step(number, rows, draw(tensors(rows.total)), row_map, want_result=draw(some.booleans()))


@some.composite
def results(draw: some.DrawFn) -> Result:
    states = draw(tensors(draw(some.integers(1, 6)))) if draw(some.booleans()) else None
    return Result(draw(some.integers(0, 2**32 - 1)), states)


JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.text(), lambda inner: some.lists(inner, max_size=3)
)
MESSAGES = some.builds(
    Message,
    some.sampled_from([Kind.OPEN, Kind.OPENED, Kind.CLOSE]),
    some.dictionaries(some.text(max_size=8), JSON, max_size=4),
)
FRAMES = steps() | results() | MESSAGES


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


@given(steps())
@QUICK
def test_a_step_arrives_as_it_was_sent(step: Step) -> None:
    arrived = decode(encode(step))
    assert isinstance(arrived, Step)
    assert same(arrived.states, step.states)
    assert (arrived.number, arrived.rows, arrived.row_map, arrived.want_result) == (
        step.number,
        step.rows,
        step.row_map,
        step.want_result,
    )


@given(results())
@QUICK
def test_a_result_arrives_as_it_was_sent(result: Result) -> None:
    arrived = decode(encode(result))
    assert isinstance(arrived, Result)
    assert arrived.number == result.number
    assert same(arrived.states, result.states)


@given(MESSAGES)
@QUICK
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    assert decode(encode(message)) == message


def test_a_step_costs_its_tensor_and_24_bytes_for_one_row() -> None:
    step = Step(7, Rows((41,), (1,)), torch.zeros(1, 576, dtype=torch.float16))
    # Written out by hand, as docs/wire.md describes it: version, kind, dtype, flags, step, rows, hidden, start, count.
    assert encode(step) == struct.pack("<BBBBIIIII", 1, 3, 2, 0, 7, 1, 576, 41, 1) + bytes(2 * 576)


def refused_or_a_frame(data: bytes) -> Frame | None:
    try:
        return decode(data)
    except ProtocolError:
        return None


@given(some.binary(max_size=200))
@QUICK
def test_random_bytes_are_a_protocol_error_and_nothing_else(data: bytes) -> None:
    refused_or_a_frame(data)


@given(some.builds(HEADER.pack, *[some.integers(0, 6)] * 4, *[some.integers(0, 2**32 - 1)] * 3), some.binary())
@QUICK
def test_any_header_before_any_bytes_is_a_protocol_error_and_nothing_else(header: bytes, rest: bytes) -> None:
    refused_or_a_frame(header + rest)


@given(FRAMES, some.data())
@QUICK
def test_a_damaged_frame_is_a_protocol_error_or_another_valid_frame(frame: Frame, data: some.DataObject) -> None:
    damaged = bytearray(encode(frame))
    for _ in range(data.draw(some.integers(1, 4))):
        place = data.draw(some.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(some.integers(0, 255))
    arrived = refused_or_a_frame(bytes(damaged))
    if isinstance(arrived, Step | Result) and arrived.states is not None:
        assert torch.isfinite(arrived.states).all()


@given(FRAMES, some.data())
@QUICK
def test_a_frame_cut_short_or_with_bytes_too_many_is_refused(frame: Frame, data: some.DataObject) -> None:
    whole = encode(frame)
    end = data.draw(some.integers(0, len(whole) - 1))
    for wrong in (whole[:end], whole + bytes(data.draw(some.integers(1, 9)))):
        # A result without a tensor is a header alone, so it is a prefix of none but itself.
        with pytest.raises(ProtocolError):
            decode(wrong)


def step_bytes(
    *, version: int = VERSION, kind: int = Kind.STEP, dtype: int = 1, flags: int = 0, rows: int = 1, hidden: int = 4
) -> bytes:
    return HEADER.pack(version, kind, dtype, flags, 1, rows, hidden) + struct.pack("<II", 0, 1) + bytes(16)


def message_bytes(text: bytes, *, length: int | None = None, dtype: int = 0) -> bytes:
    return HEADER.pack(VERSION, Kind.OPEN, dtype, 0, 0, len(text) if length is None else length, 0) + text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "shorter than its header"),
        (step_bytes(version=2), "version 2"),
        (step_bytes(kind=0), "kind 0"),
        (step_bytes(kind=6), "kind 6"),
        (step_bytes(dtype=0), "unknown dtype"),
        (step_bytes(dtype=4), "unknown dtype"),
        (step_bytes(dtype=2), "has 8 bytes, 16 came"),
        (step_bytes(flags=4), "unknown flags"),
        (step_bytes(flags=TEXT), "is said to have 0 tokens, and has 1"),
        (step_bytes(flags=TEXT)[:24], "ends after 24 bytes"),
        (step_bytes(flags=ROW_MAP), "has 16 bytes, 12 came"),
        (step_bytes(rows=0), "0 rows"),
        (step_bytes(rows=MAX_ROWS + 1), f"{MAX_ROWS + 1} rows"),
        (step_bytes(rows=2**32 - 1), "rows"),
        (step_bytes(rows=900), "ends after"),
        (step_bytes(hidden=0), "0 bytes"),
        (step_bytes(hidden=5), "20 bytes"),
        (step_bytes(hidden=2**32 - 1), "bytes"),
        (HEADER.pack(VERSION, Kind.STEP, 1, 0, 1, 1, 4) + struct.pack("<II", 5, 0), "no tokens"),
        (HEADER.pack(VERSION, Kind.STEP, 1, 0, 1, 1, 4) + struct.pack("<II", 0, MAX_PLACES + 1), "places"),
        (HEADER.pack(VERSION, Kind.RESULT, 1, NO_RESULT, 1, 1, 4) + bytes(16), "unknown flags"),
        (HEADER.pack(VERSION, Kind.RESULT, 0, 0, 1, 1, 4), "unknown dtype"),
        (message_bytes(b"{}", dtype=1), "header fields"),
        (message_bytes(b"{}", length=1), "says it has 1 bytes"),
        (message_bytes(b'{"a":"' + b"x" * MAX_JSON + b'"}'), "says it has"),
        (message_bytes(b""), "not JSON"),
        (message_bytes(b"\xff\xfe\x00"), "not JSON"),
        (message_bytes(b"[1]"), "not a JSON object"),
        (message_bytes(b'{"a":' * 13_000), "not JSON"),
        (message_bytes(b"[" * 60_000), "not JSON"),
        (message_bytes(b'{"a":' + b"9" * 60_000 + b"}"), "not JSON"),
    ],
)
def test_each_wrong_field_is_refused_in_words(data: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        decode(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_refused(value: float, dtype: torch.dtype) -> None:
    states = torch.zeros(2, 3, dtype=dtype)
    states[1, 2] = value
    for frame in (Step(1, Rows((0,), (2,)), states), Result(1, states)):
        with pytest.raises(ProtocolError, match="not finite"):
            decode(encode(frame))


def test_a_header_that_promises_much_allocates_nothing() -> None:
    places = struct.pack("<4096I", *([1, 1] * 2048))
    promising = [
        HEADER.pack(VERSION, Kind.STEP, 1, 0, 1, 2048, 2**32 - 1) + places,
        HEADER.pack(VERSION, Kind.RESULT, 1, 0, 1, 2**32 - 1, 2**32 - 1),
        HEADER.pack(VERSION, Kind.OPEN, 0, 0, 0, 2**32 - 1, 0),
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


def test_values_too_large_for_the_wire_dtype_are_the_users_to_know() -> None:
    with pytest.raises(UsageError, match=r"too large for torch\.float16"):
        to_wire(torch.tensor([[1e6]]), torch.float16)
    with pytest.raises(UsageError, match="not finite"):
        to_wire(torch.tensor([[float("nan")]]), torch.float32)
