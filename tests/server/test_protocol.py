"""Whatever one client sends, it alone is told so; the server stays up, and the others get the whole model's tokens."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedsea import Partition, SplitModelForCausalLM
from fedsea.errors import (
    FedSEAError,
    LimitExceededError,
    ModelMismatchError,
    PartitionError,
    ProtocolError,
    ServerUnavailableError,
)
from fedsea.parts import Rows
from fedsea.server import Limits
from fedsea.wire import contract
from fedsea.wire.codec import HEADER, VERSION, encode
from fedsea.wire.frames import Kind, Message, Result
from tests.conftest import RunningServer, connect
from tests.support.raw_stream import HIDDEN, RawStream, assert_same_tokens, eventually, prompt, step, wish

FRAME_BYTES = 1 << 17


@pytest.fixture(scope="module")
def server(start_server: Callable[..., RunningServer]) -> RunningServer:
    return start_server(layers=range(1, 5), limits=Limits(frame_bytes=FRAME_BYTES, resume_seconds=1))


@pytest.fixture(scope="module")
def bystander(server: RunningServer) -> Iterator[SplitModelForCausalLM]:
    with connect(server) as model:
        yield model


def is_serving(server: RunningServer) -> bool:
    with grpc.insecure_channel(server.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=contract.SERVICE))
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def changed(data: bytes, place: int, value: int) -> bytes:
    return data[:place] + bytes([value]) + data[place + 1 :]


def message(text: bytes) -> bytes:
    return HEADER.pack(VERSION, Kind.OPEN, 0, 0, 0, len(text), 0) + text


def not_finite(value: float) -> bytes:
    states = torch.zeros(3, HIDDEN)
    states[1, 5] = value
    return encode(step(2, 3, states=states))


OPEN = encode(Message(Kind.OPEN, wish()))
FIRST_FRAMES: dict[str, tuple[bytes, type[FedSEAError], str]] = {
    "wrong version": (changed(OPEN, 0, 9), ProtocolError, "different versions of the protocol (9 and 2)"),
    "a step first": (encode(step()), ProtocolError, "begins with OPEN"),
    "a result first": (encode(Result(1, None)), ProtocolError, "begins with OPEN"),
    "CLOSE first": (encode(Message(Kind.CLOSE, {})), ProtocolError, "begins with OPEN"),
    "no bytes": (b"", ProtocolError, "shorter than its header"),
    "deep nesting": (message(b'{"a":' * 13_000), ProtocolError, "not JSON"),
    "a long number": (message(b'{"a":' + b"1" * 60_000 + b"}"), ProtocolError, "not JSON"),
    "a message too long": (message(b'{"a":"' + b"x" * (1 << 16) + b'"}'), ProtocolError, "says it has"),
    "an empty message": (message(b"{}"), ProtocolError, "wire dtype"),
    "fields of other types": (
        encode(Message(Kind.OPEN, wish(wire_dtype=["float32"]))),
        ProtocolError,
        "wire dtype must be",
    ),
    "another wire dtype": (encode(Message(Kind.OPEN, wish(wire_dtype="int8"))), ProtocolError, "wire dtype must be"),
    "half a layer": (encode(Message(Kind.OPEN, wish(input_layers=0.5))), ProtocolError, "input_layers"),
    "layers below 0": (encode(Message(Kind.OPEN, wish(output_layers=-1))), ProtocolError, "output_layers"),
    "a number to resume": (encode(Message(Kind.OPEN, wish(resume=7))), ProtocolError, "session to resume"),
    "no fingerprint": (encode(Message(Kind.OPEN, wish(fingerprint="{}"))), ProtocolError, "fingerprint"),
    "nested fingerprint": (encode(Message(Kind.OPEN, wish(fingerprint="[" * 50_000))), ProtocolError, "fingerprint"),
    "more layers than the model": (encode(Message(Kind.OPEN, wish(input_layers=7))), PartitionError, "more than"),
    "layers not held": (encode(Message(Kind.OPEN, wish(input_layers=0))), PartitionError, "server holds layers 1:5"),
    "over the server's limit": (bytes(FRAME_BYTES + 1), LimitExceededError, f"limit of {FRAME_BYTES} bytes a frame"),
}

LATER_FRAMES: dict[str, tuple[bytes, type[FedSEAError], str]] = {
    "OPEN again": (OPEN, ProtocolError, "a step or CLOSE was expected"),
    "a result": (encode(Result(2, None)), ProtocolError, "a step or CLOSE was expected"),
    "wrong version": (changed(encode(step(2, 3)), 0, 1), ProtocolError, "versions of the protocol (1 and 2)"),
    "unknown kind": (changed(encode(step(2, 3)), 1, 77), ProtocolError, "kind 77"),
    "unknown dtype": (changed(encode(step(2, 3)), 2, 9), ProtocolError, "unknown dtype"),
    "unknown flags": (changed(encode(step(2, 3)), 3, 128), ProtocolError, "unknown flags"),
    "wrong dtype": (
        encode(step(2, 3, states=torch.zeros(3, HIDDEN, dtype=torch.float16))),
        ProtocolError,
        "wire dtype is torch.float32",
    ),
    "wrong hidden size": (encode(step(2, 3, states=torch.zeros(3, 63))), ProtocolError, "hidden size is 64"),
    "too short": (encode(step(2, 3))[:-1], ProtocolError, "bytes"),
    "too long": (encode(step(2, 3)) + b"x", ProtocolError, "bytes"),
    "NaN": (not_finite(float("nan")), ProtocolError, "not finite"),
    "infinity": (not_finite(float("-inf")), ProtocolError, "not finite"),
    "a step left out": (encode(step(3, 3)), ProtocolError, "step 3 came after step 1; 2 was expected"),
    "a step again": (encode(step(1)), ProtocolError, "step 1 came after step 1"),
    "a gap": (encode(step(2, 4)), ProtocolError, "holds 3 tokens, the step would go on at 4"),
    "another number of rows": (encode(step(2, 3, rows=2)), ProtocolError, "has 1 rows, the step has 2"),
    "a row map out of range": (encode(step(2, 3, row_map=(1,))), ProtocolError, "row map names row 1"),
    "too many places": (
        encode(replace(step(2), rows=Rows((0,) * 9, (0,) * 8 + (500,)), states=torch.zeros(500, HIDDEN))),
        ProtocolError,
        "places of a step",
    ),
    "a row too long": (
        encode(step(2, 3, count=510)),
        LimitExceededError,
        "a row of 513 tokens is longer than the model's 512 positions",
    ),
    "over the server's limit": (bytes(FRAME_BYTES + 1), LimitExceededError, f"limit of {FRAME_BYTES} bytes a frame"),
}


@pytest.mark.parametrize("case", FIRST_FRAMES)
def test_a_wrong_first_frame_is_refused_and_nobody_else_notices(
    server: RunningServer, bystander: SplitModelForCausalLM, whole_tiny: Any, case: str
) -> None:
    data, kind, says = FIRST_FRAMES[case]

    def misbehave() -> None:
        with RawStream(server.address) as stream:
            stream.send(data)
            error = stream.refusal()
        assert type(error) is kind
        assert says in str(error)
        assert is_serving(server)

    assert_same_tokens(bystander, whole_tiny, misbehave)


@pytest.mark.parametrize("case", LATER_FRAMES)
def test_a_wrong_later_frame_ends_its_session_and_nobody_else_notices(
    server: RunningServer, bystander: SplitModelForCausalLM, whole_tiny: Any, case: str
) -> None:
    data, kind, says = LATER_FRAMES[case]

    def misbehave() -> None:
        with RawStream(server.address) as stream:
            name = stream.open().session
            stream.send(step(1))
            assert isinstance(stream.receive(), Result)
            stream.send(data)
            error = stream.refusal()
        assert type(error) is kind
        assert says in str(error)
        assert name not in [session.name for session in server.server.sessions]
        assert is_serving(server)

    assert_same_tokens(bystander, whole_tiny, misbehave)


def test_a_frame_over_grpcs_own_limit_is_refused(
    server: RunningServer, bystander: SplitModelForCausalLM, whole_tiny: Any
) -> None:
    def misbehave() -> None:
        with RawStream(server.address) as stream:
            stream.open()
            stream.send(bytes(FRAME_BYTES + 5000))
            with pytest.raises(grpc.RpcError):
                stream.receive()
            assert stream.call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    assert_same_tokens(bystander, whole_tiny, misbehave)


def test_random_and_damaged_frames_leave_the_server_up(
    server: RunningServer, bystander: SplitModelForCausalLM, whole_tiny: Any
) -> None:
    source = random.Random(7)

    def damage(data: bytes) -> bytes:
        damaged = bytearray(data)
        for _ in range(source.randint(1, 8)):
            damaged[source.randrange(min(40, len(damaged)))] = source.randrange(256)
        return bytes(damaged)

    def misbehave() -> None:
        for _ in range(60):
            with RawStream(server.address) as stream:
                if source.random() < 0.7:
                    stream.open()
                for frame in (source.randbytes(source.randrange(200)), damage(encode(step(1))), damage(OPEN)):
                    stream.send(source.choice([frame, damage(encode(step(1)))]))
                stream.outgoing.put(None)
                try:
                    while True:
                        stream.receive()
                except (StopIteration, FedSEAError):
                    pass

    assert_same_tokens(bystander, whole_tiny, misbehave)
    assert is_serving(server)


def test_a_client_with_another_model_is_told_what_differs(server: RunningServer) -> None:
    with pytest.raises(ModelMismatchError, match=r"the configuration, layer 0.* differ; load the same"):
        connect(server, "random:tiny-qwen2")


def test_a_client_whose_partition_is_not_held_is_told_what_is(server: RunningServer) -> None:
    with pytest.raises(PartitionError, match="the server holds layers 1:5, the partition's middle is 0:5"):
        connect(server, partition=Partition(0, 1))


def test_a_server_that_speaks_grpc_but_is_no_block_server_is_recognised() -> None:
    from concurrent.futures import ThreadPoolExecutor

    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with pytest.raises(ServerUnavailableError, match="not a FedSEA block server"):
        SplitModelForCausalLM.from_pretrained("random:tiny", server=f"127.0.0.1:{port}", insecure=True)
    other.stop(None)


def test_a_client_fits_its_frames_to_the_servers_limit(
    start_server: Callable[..., RunningServer], whole_tiny: Any
) -> None:
    server = start_server(limits=Limits(frame_bytes=10_000))
    with connect(server) as model:
        # 90 tokens take 23,040 bytes in float32: three frames instead of one.
        assert_same_tokens(model, whole_tiny, lambda: None, prompt(tokens=90))


LIMITS: dict[str, tuple[Limits, Callable[[RawStream, RawStream], Any], str]] = {
    "sessions": (Limits(sessions=1), lambda one, two: (one.open(), two.open()), "1 sessions open, its limit"),
    "sessions of a client": (
        Limits(client_sessions=1),
        lambda one, two: (one.open(), two.open()),
        "limit of sessions per client",
    ),
    "tokens of a session": (
        Limits(session_tokens=20),
        lambda one, two: (two.open(), two.send(step(1, count=10, rows=2)), two.send(step(2, 10, count=1, rows=2))),
        "22 tokens, more than the server's limit of 20 tokens a session",
    ),
    "memory for caches": (
        Limits(cache_bytes=1000),
        lambda one, two: (two.open(), two.send(step(1))),
        "memory for caches (0.0 MiB) is used up",
    ),
    "idle time": (Limits(idle_seconds=0.3), lambda one, two: two.open(), "idle for 0.3 s, the limit"),
}


@pytest.mark.parametrize("case", LIMITS)
def test_at_each_limit_the_client_is_told_its_name_and_value(
    start_server: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("fedsea.server.service.SWEEP_SECONDS", 0.1)
    limits, reach, says = LIMITS[case]
    server = start_server(limits=limits)
    with RawStream(server.address) as one, RawStream(server.address) as two:
        try:
            reach(one, two)
            error = two.refusal()
        except FedSEAError as refused:
            error = refused
    assert type(error) is LimitExceededError
    assert says in str(error)


def test_a_generation_that_reaches_a_limit_says_so_in_one_line(start_server: Callable[..., RunningServer]) -> None:
    server = start_server(limits=Limits(session_tokens=10))
    with connect(server) as model, pytest.raises(LimitExceededError, match="the model and the server allow 10"):
        model.generate(prompt(tokens=7), max_new_tokens=8, min_new_tokens=8)
    assert len(server.server.sessions) == 0


def test_streams_that_say_nothing_are_ended_and_do_not_pile_up(
    start_server: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsea.server.served_stream.OPEN_SECONDS", 0.5)
    server = start_server(limits=Limits(client_sessions=2))
    silent = [RawStream(server.address) for _ in range(5)]
    errors = [type(stream.refusal()) for stream in silent]
    assert sorted(error.__name__ for error in errors) == ["LimitExceededError"] + ["ProtocolError"] * 4
    assert eventually(lambda: not server.server.streams)
    with RawStream(server.address) as stream:
        stream.open()
    for one in silent:
        one.abandon()


def test_a_client_that_pipelines_and_never_reads_blocks_nobody(
    server: RunningServer, bystander: SplitModelForCausalLM, whole_tiny: Any
) -> None:
    greedy = RawStream(server.address)
    greedy.open()
    for number in range(400):  # 400 results of 128 kB: more than any window, were they all computed ahead
        greedy.send(step(number + 1, 0, count=500))

    assert_same_tokens(bystander, whole_tiny, lambda: None)
    assert is_serving(server)
    session = next(iter(server.server.sessions))
    assert session.step < 300
    greedy.abandon()
