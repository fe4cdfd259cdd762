"""Frames of a run survive the way over the wire bit for bit; bytes that are no frame are refused, whatever they are."""

import math
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import save

from fedsea.errors import LimitExceededError, ProtocolError
from fedsea.parts import Rows
from fedsea.wire.frames import HEADER, VERSION, Kind, Message, Result, encode
from fedsea.wire.run_frames import (
    MAX_WEIGHT,
    RUN,
    START,
    Backward,
    Command,
    Forward,
    Outcome,
    RunFrame,
    States,
    Tensors,
    decode_run,
    encode_run,
    gradient_to_wire,
)
from fedsea.wire.runs import MAX_SETTING, OptimizerStep
from tests.wire.test_frames import JSON, QUICK, tensors

NUMBERS = some.integers(0, 2**32 - 1)
BODIES = some.dictionaries(some.text(max_size=8), JSON, max_size=4)


@some.composite
def forwards(draw: some.DrawFn) -> Forward:
    counts = tuple(draw(some.lists(some.integers(1, 6), min_size=1, max_size=5)))
    rows = Rows((0,) * len(counts), counts)
    switches = draw(some.tuples(*[some.booleans()] * 3))
    return Forward(
        draw(NUMBERS), draw(NUMBERS), rows, draw(tensors(rows.total)), *switches, draw(some.integers(0, 2**31 - 1))
    )


@some.composite
def backwards(draw: some.DrawFn) -> Backward:
    gradient = draw(tensors(draw(some.integers(1, 6))))
    weight = draw(some.floats(0, MAX_WEIGHT, exclude_min=True, width=32))
    exponent, fresh = draw(some.integers(-100, 200)), draw(some.booleans())
    return Backward(draw(NUMBERS), draw(NUMBERS), gradient, exponent, fresh, weight)


@some.composite
def states(draw: some.DrawFn) -> States:
    held = draw(some.none() | some.integers(1, 6).flatmap(tensors))
    norm = draw(some.floats(0, width=32, allow_nan=False))
    return States(draw(NUMBERS), held, draw(some.integers(-200, 200)), norm)


@some.composite
def named(draw: some.DrawFn) -> Tensors:
    names = draw(some.lists(some.text(min_size=1, max_size=8), max_size=3, unique=True))
    sizes = [draw(some.lists(some.integers(0, 3), max_size=2)) for _ in names]
    held = {name: torch.randn(size) for name, size in zip(names, sizes, strict=True)}
    return Tensors(draw(NUMBERS), held, draw(some.booleans()))


COMMANDS = some.builds(Command, NUMBERS, BODIES) | some.builds(Outcome, NUMBERS, BODIES)
FRAMES = forwards() | backwards() | states() | named() | COMMANDS


def plain(value: Any) -> Any:
    """Something that compares: a tensor as its dtype, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.reshape(-1).view(torch.uint8).numpy().tobytes()
    return {name: plain(one) for name, one in value.items()} if isinstance(value, dict) else value


def fields(frame: RunFrame) -> dict[str, Any]:
    return {name: plain(value) for name, value in vars(frame).items()}


@given(FRAMES, NUMBERS)
@QUICK
def test_a_frame_arrives_as_it_was_sent(frame: RunFrame, received: int) -> None:
    arrived, known = decode_run(encode_run(frame, received=received))
    assert type(arrived) is type(frame)
    assert fields(arrived) == fields(frame)
    assert known == received


def test_a_forward_and_its_answer_cost_their_tensors_and_72_bytes_for_one_row() -> None:
    hidden = torch.zeros(5, 576, dtype=torch.float16)
    # Written out by hand, as docs/wire.md describes it.
    assert encode_run(Forward(7, 3, Rows((0,), (5,)), hidden), received=6) == (
        struct.pack("<BBBBIIIIIifII", 1, 6, 2, 4, 7, 1, 576, 6, 3, 0, 0.0, 0, 5) + bytes(5 * 2 * 576)
    )
    assert len(encode_run(States(7, hidden))) == 5 * 2 * 576 + 32


def refused_or_a_frame(data: bytes) -> RunFrame | None:
    try:
        return decode_run(data)[0]
    except ProtocolError:
        return None


@given(some.binary(max_size=200))
@QUICK
def test_random_bytes_are_a_protocol_error_and_nothing_else(data: bytes) -> None:
    refused_or_a_frame(data)


HEADERS = some.builds(
    HEADER.pack, some.just(VERSION), some.integers(0, 13), *[some.integers(0, 63)] * 2, *[NUMBERS] * 3
)
MORE = some.builds(RUN.pack, NUMBERS, NUMBERS, some.integers(-(2**31), 2**31 - 1), some.floats(width=32))


@given(HEADERS, MORE, some.binary(max_size=300))
@settings(max_examples=400, deadline=None)
def test_any_header_before_any_bytes_is_a_protocol_error_and_nothing_else(
    header: bytes, more: bytes, rest: bytes
) -> None:
    refused_or_a_frame(header + more + rest)


def all_finite(frame: RunFrame | None) -> bool:
    held = [value for value in vars(frame).values() if isinstance(value, torch.Tensor)] if frame is not None else []
    held += frame.tensors.values() if isinstance(frame, Tensors) else []
    return all(bool(torch.isfinite(one).all()) for one in held)


@given(FRAMES, some.data())
@settings(max_examples=400, deadline=None)
def test_a_damaged_frame_is_a_protocol_error_or_another_valid_frame(frame: RunFrame, data: some.DataObject) -> None:
    damaged = bytearray(encode_run(frame))
    for _ in range(data.draw(some.integers(1, 4))):
        damaged[data.draw(some.integers(0, len(damaged) - 1))] = data.draw(some.integers(0, 255))
    assert all_finite(refused_or_a_frame(bytes(damaged)))


@given(FRAMES, some.data())
@QUICK
def test_a_frame_cut_short_or_with_bytes_too_many_is_refused(frame: RunFrame, data: some.DataObject) -> None:
    whole = encode_run(frame)
    end = data.draw(some.integers(0, len(whole) - 1))
    for wrong in (whole[:end], whole + bytes(data.draw(some.integers(1, 9)))):
        with pytest.raises(ProtocolError):
            decode_run(wrong)


def raw(kind: int, *, code: int = 1, flags: int = 0, count: int = 1, hidden: int = 4, **more: Any) -> bytes:
    header = HEADER.pack(VERSION, kind, code, flags, 1, count, hidden)
    run = RUN.pack(more.get("received", 0), more.get("micro", 0), more.get("exponent", 0), more.get("norm", 1.0))
    return header + run + more.get("rest", b"")


ROW = struct.pack("<II", 0, 1)
WRONG: dict[str, tuple[bytes, str]] = {
    "a header alone": (raw(Kind.FORWARD)[: START - 1], "shorter than its header"),
    "a session's step": (encode(Result(1, None)), "a frame of a session came in a run"),
    "unknown kind": (raw(77), "kind 77"),
    "unknown flags": (raw(Kind.BACKWARD, flags=64, rest=bytes(16)), "unknown flags"),
    "flags of another kind": (raw(Kind.COMMAND, flags=4, count=2, rest=b"{}"), "unknown flags"),
    "unknown dtype": (raw(Kind.BACKWARD, code=9, rest=bytes(16)), "unknown dtype"),
    "no rows": (raw(Kind.FORWARD, count=0, rest=bytes(16)), "has 0 rows"),
    "no tokens": (raw(Kind.FORWARD, rest=bytes(24)), "no tokens"),
    "a row that starts later": (raw(Kind.FORWARD, rest=struct.pack("<II", 1, 1) + bytes(16)), "starts later"),
    "a seed below 0": (raw(Kind.FORWARD, exponent=-1, rest=ROW + bytes(16)), "exponent of -1"),
    "too many places": (
        raw(Kind.FORWARD, count=9, rest=struct.pack("<18I", *[0, 0] * 8, 0, 500) + bytes(500 * 16)),
        "over 4096 places",
    ),
    "no gradient": (raw(Kind.BACKWARD, code=0, count=0, hidden=0), "unknown dtype"),
    "an exponent out of reach": (raw(Kind.BACKWARD, exponent=201, rest=bytes(16)), "exponent of 201"),
    "an exponent that is undone to infinity": (raw(Kind.BACKWARD, exponent=-115, rest=bytes(16)), "exponent of -115"),
    "no weight": (raw(Kind.BACKWARD, norm=0.0, rest=bytes(16)), "weight must be above 0.*got 0.0"),
    "an endless weight": (raw(Kind.BACKWARD, norm=math.inf, rest=bytes(16)), "weight must be above 0.*got inf"),
    "a weight that is no number": (raw(Kind.BACKWARD, norm=math.nan, rest=bytes(16)), "weight must be above 0"),
    "a norm that is no number": (raw(Kind.STATES, norm=math.nan, rest=bytes(16)), "not a number"),
    "NaN": (raw(Kind.BACKWARD, rest=struct.pack("<4f", 0, math.nan, 0, 0)), "not finite"),
    "no JSON": (raw(Kind.COMMAND, count=3, rest=b"{a}"), "not JSON"),
    "no object": (raw(Kind.COMMAND, count=2, rest=b"[]"), "not a JSON object"),
    "JSON of another length": (raw(Kind.COMMAND, count=3, rest=b"{}"), "says it has 3 bytes"),
    "no safetensors": (raw(Kind.TENSORS, count=9, rest=bytes(9)), "not in the safetensors format"),
    "tensors of another length": (raw(Kind.TENSORS, count=9, rest=bytes(8)), "says it has 9 bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_wrong_field_is_refused_in_words(case: str) -> None:
    data, says = WRONG[case]
    with pytest.raises(ProtocolError, match=says):
        decode_run(data)


@pytest.mark.parametrize("wrong", [torch.zeros(2, dtype=torch.float16), torch.tensor([1.0, math.inf]), torch.arange(2)])
def test_named_tensors_are_finite_float32_and_nothing_else(wrong: torch.Tensor) -> None:
    body = save({"good": torch.zeros(1), "wrong": wrong})
    with pytest.raises(ProtocolError, match=r"wrong (is|holds)"):
        decode_run(raw(Kind.TENSORS, code=0, hidden=0, count=len(body), rest=body))


def test_a_frame_over_the_given_limit_is_refused_by_that_name() -> None:
    data = encode_run(Backward(1, 1, torch.zeros(1, 8)))
    decode_run(data, max_bytes=len(data))
    with pytest.raises(LimitExceededError, match="limit of 63 bytes a frame"):
        decode_run(data, max_bytes=len(data) - 1)


def test_a_runs_messages_are_those_of_sessions() -> None:
    message = Message(Kind.OPEN, {"run": "one"})
    assert encode_run(message) == encode(message)
    assert decode_run(encode(message)) == (message, 0)


@given(some.integers(-120, 125), some.integers(0, 2**31))
@QUICK
def test_small_gradients_keep_their_digits_in_float16(exponent: int, seed: int) -> None:
    gradient = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    sent, shift = gradient_to_wire(gradient, torch.float16)
    assert sent.dtype is torch.float16
    assert torch.isfinite(sent).all()
    if exponent > -80:
        torch.testing.assert_close(
            sent.float() * 2.0**-shift, gradient, rtol=1e-3, atol=float(gradient.abs().max()) * 1e-6
        )


def test_a_gradient_of_zeros_and_other_wire_dtypes_are_sent_as_they_are() -> None:
    assert gradient_to_wire(torch.zeros(2, 2), torch.float16)[1] == 0
    for dtype in (torch.float32, torch.bfloat16):
        sent, shift = gradient_to_wire(torch.full((2, 2), 2.0**-90), dtype)
        assert shift == 0
        assert bool((sent.float() == 2.0**-90).all())


STEP = OptimizerStep("adamw", 3, 0.5, 1e-3, 0.01, (0.9, 0.95), 1e-6, amsgrad=True, fresh=True)


def test_an_optimizer_step_arrives_as_it_was_sent() -> None:
    assert OptimizerStep.from_body(STEP.to_body()) == STEP
    assert OptimizerStep.from_body(replace(STEP, kind="sgd", nesterov=True).to_body()).nesterov


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("kind", value) for value in ("adagrad", None, ["adamw"], 7)],
        *[("step", value) for value in (-1, 1.5, "1", None, True, 2**60)],
        *[("lr", value) for value in (-1.0, "1", None, True, math.inf, math.nan, 2 * MAX_SETTING, 10**400)],
        ("scale", 1e300),
        ("weight_decay", -0.1),
        ("eps", None),
        ("momentum", 1.5),
        *[("betas", value) for value in (None, [0.9], [0.9, 2], [0.9, "x"], {"a": 1})],
        *[(name, value) for name in ("nesterov", "amsgrad", "fresh") for value in (None, 1)],
    ],
)
def test_an_optimizer_step_with_a_wrong_setting_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ProtocolError):
        OptimizerStep.from_body(STEP.to_body() | {field: value})
