"""Whatever one client sends, it alone is told so; the server stays up, and the others get the whole model's tokens."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import torch

from fedsea import SplitModelForCausalLM
from fedsea.errors import (
    FedSEAError,
    LimitExceededError,
    ModelMismatchError,
    PartitionError,
    ProtocolError,
    ServerUnavailableError,
)
from fedsea.server import Limits
from fedsea.wire.codec import encode
from fedsea.wire.frames import Command, Kind, Message, Result
from tests.conftest import RunningServer, StartServer, connect
from tests.support.ports import grpc_serving
from tests.support.raw_stream import (
    HIDDEN,
    RawStream,
    assert_same_tokens,
    eventually,
    is_serving,
    open_body,
    prompt,
    send_nonsense,
    step,
)

FRAME_BYTES = 1 << 17


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> RunningServer:
    return start_server(layers=range(1, 5), limits=Limits(frame_bytes=FRAME_BYTES, resume_seconds=1))


Bystander = Callable[[Callable[[], Any]], None]


@pytest.fixture(scope="module")
def bystander(server: RunningServer, whole_tiny: Any) -> Iterator[Bystander]:
    """Generates what the whole model does, whatever happens in the middle of it."""
    with connect(server) as model:
        yield lambda midway: assert_same_tokens(model, whole_tiny, midway)


OPEN = encode(Message(Kind.OPEN, open_body()))


def opening(**more: Any) -> bytes:
    return encode(Message(Kind.OPEN, open_body(**more)))


TOO_LONG = (bytes(FRAME_BYTES + 1), LimitExceededError, f"limit of {FRAME_BYTES} bytes a frame")
# What is wrong with a frame whatever it is for: tests/wire/test_codec.py has all of it.
NOT_FINITE = encode(step(2, 3, states=torch.full((3, HIDDEN), float("nan"))))
FIRST_FRAMES: dict[str, tuple[bytes, type[FedSEAError], str]] = {
    "no frame": (b"", ProtocolError, "shorter than its header"),
    "a step first": (encode(step()), ProtocolError, "begins with OPEN"),
    "CLOSE first": (encode(Message(Kind.CLOSE, {})), ProtocolError, "begins with OPEN"),
    "an empty message": (encode(Message(Kind.OPEN, {})), ProtocolError, "'wire_dtype'"),
    "fields of other types": (opening(wire_dtype=["float32"]), ProtocolError, "'wire_dtype' must be"),
    "another wire dtype": (opening(wire_dtype="int8"), ProtocolError, "'wire_dtype' must be"),
    "half a layer": (opening(input_layers=0.5), ProtocolError, "input_layers"),
    "layers below 0": (opening(output_layers=-1), ProtocolError, "output_layers"),
    "a number to resume": (opening(resume=7), ProtocolError, "'resume' must be"),
    "no fingerprint": (opening(fingerprint="{}"), ProtocolError, "fingerprint"),
    "nested fingerprint": (opening(fingerprint="[" * 50_000), ProtocolError, "fingerprint"),
    "more layers than the model": (opening(input_layers=7), PartitionError, "more than"),
    "layers not held": (opening(input_layers=0), PartitionError, "holds layers 1:5, the partition's middle is 0:5"),
    "over the server's limit": TOO_LONG,
}
# What does not follow from the session's state: test_sessions.py has all of it.
LATER_FRAMES: dict[str, tuple[bytes, type[FedSEAError], str]] = {
    "OPEN again": (OPEN, ProtocolError, "a step or CLOSE was expected"),
    "a result": (encode(Result(2, None)), ProtocolError, "a step or CLOSE was expected"),
    "a run's operation": (encode(Command(2, {})), ProtocolError, "a step or CLOSE was expected"),
    "not finite": (NOT_FINITE, ProtocolError, "not finite"),
    "a step left out": (encode(step(3, 3)), ProtocolError, "step 3 came after step 1; 2 was expected"),
    "a row too long": (encode(step(2, 3, count=510)), LimitExceededError, "longer than the model's 512 positions"),
    "over the server's limit": TOO_LONG,
}


@pytest.mark.parametrize("case", FIRST_FRAMES)
def test_a_wrong_first_frame_is_refused_and_nobody_else_notices(
    server: RunningServer, bystander: Bystander, case: str
) -> None:
    def misbehave() -> None:
        with RawStream(server.address) as stream:
            stream.refuses(*FIRST_FRAMES[case])
        assert is_serving(server)

    bystander(misbehave)


@pytest.mark.parametrize("case", LATER_FRAMES)
def test_a_wrong_later_frame_ends_its_session_and_nobody_else_notices(
    server: RunningServer, bystander: Bystander, case: str
) -> None:
    def misbehave() -> None:
        with RawStream(server.address) as stream:
            name = stream.open().session
            stream.send(step(1))
            assert isinstance(stream.receive(), Result)
            stream.refuses(*LATER_FRAMES[case])
        assert name not in [session.name for session in server.server.sessions]
        assert is_serving(server)

    bystander(misbehave)


def test_a_frame_over_grpcs_own_limit_is_refused(server: RunningServer, bystander: Bystander) -> None:
    def misbehave() -> None:
        with RawStream(server.address) as stream:
            stream.open()
            stream.send(bytes(FRAME_BYTES + 5000))
            with pytest.raises(grpc.RpcError):
                stream.receive()
            assert stream.call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    bystander(misbehave)


def test_random_and_damaged_frames_leave_the_server_up(server: RunningServer, bystander: Bystander) -> None:
    source = random.Random(7)

    def misbehave() -> None:
        for number in range(60):
            with RawStream(server.address) as stream:
                if number % 3:
                    stream.open()
                send_nonsense(stream, source, [OPEN], [encode(step(1))])

    bystander(misbehave)
    assert is_serving(server)


def test_a_client_with_another_model_is_told_what_differs(server: RunningServer) -> None:
    with pytest.raises(ModelMismatchError, match=r"the configuration, layer 0.* differ; load the same"):
        connect(server, "random:tiny-qwen2")


def test_a_server_that_speaks_grpc_but_is_no_block_server_is_recognised() -> None:
    with grpc_serving() as address, pytest.raises(ServerUnavailableError, match="not a FedSEA block server"):
        SplitModelForCausalLM.from_pretrained("random:tiny", server=address, insecure=True)


def test_a_client_fits_its_frames_to_the_servers_limit(start_server: StartServer, whole_tiny: Any) -> None:
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
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, case: str
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


def test_a_generation_that_reaches_a_limit_says_so_in_one_line(start_server: StartServer) -> None:
    server = start_server(limits=Limits(session_tokens=10))
    with connect(server) as model, pytest.raises(LimitExceededError, match="the model and the server allow 10"):
        model.generate(prompt(tokens=7), max_new_tokens=8, min_new_tokens=8)
    assert len(server.server.sessions) == 0


def test_streams_that_say_nothing_are_ended_and_do_not_pile_up(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
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


def test_a_client_that_pipelines_and_never_reads_blocks_nobody(server: RunningServer, bystander: Bystander) -> None:
    greedy = RawStream(server.address)
    name = greedy.open().session
    for number in range(400):  # 400 results of 128 kB: more than any window, were they all computed ahead
        greedy.send(step(number + 1, 0, count=500))

    bystander(lambda: None)
    assert is_serving(server)
    session = server.server.sessions.get(name, "anonymous")
    assert session is not None
    assert session.step < 300
    greedy.abandon()
