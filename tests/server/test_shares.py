"""No client has more of the server than its part: of memory, of the device's time, of the event loop, of streams."""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

import fedsea.server.pipeline
import fedsea.server.stream
from fedsea.errors import FedSEAError, LimitExceededError, ProtocolError, RunLostError
from fedsea.parts import BLOCK, MiddleBlocks, Rows
from fedsea.parts.adapters import AdapterSpec
from fedsea.server import Limits
from fedsea.server.ledger import Pool
from fedsea.server.scheduler import Owner, Turns
from fedsea.wire import contract, tensors
from fedsea.wire.codec import decode, encode
from fedsea.wire.credentials import Credentials
from fedsea.wire.frames import Command, Forward, Kind, Message, Result, States, Step, Tensors
from fedsea.wire.handshake import Open
from fedsea.wire.runs import Attached
from fedsea.wire.tensors import MAX_TENSORS
from tests.conftest import RunningServer, StartServer
from tests.support.raw_stream import RawStream, eventually, open_body, step
from tests.support.server_runs import RawRun, attach, backward, begin, do, forward, table_of

MIB = 1 << 20
CACHE = BLOCK * 4 * 2 * 2 * 16 * 4  # bytes of one session's: a block, 4 layers, keys and values, 2 heads, 16 numbers


class Shared:
    """A server of clients a and b: room for three caches, half of them for one; a run's answers may be a few."""

    def __init__(self, start: StartServer, made: Path) -> None:
        limits = Limits(cache_bytes=3 * CACHE, buffer_bytes=1 << 17, client_sessions=4, run_tokens=64)
        self.running = start(layers=range(1, 5), limits=limits, credentials=Credentials.load(made, "server"))
        self._of = {name: Credentials.load(made / f"client-{name}", "client") for name in ("a", "b")}

    def session(self, client: str) -> RawStream:
        return RawStream(self.running.address, self._of[client])

    def run(self, client: str) -> RawRun:
        return RawRun(self.running.address, self._of[client])


@pytest.fixture
def shared(serve: StartServer, made: Path) -> Shared:
    return Shared(serve, made)  # one for each test: what a run leaves unread counts for its client


def export(number: int) -> Command:
    return Command(number, {"do": "export", "after": ""})


# Memory


def test_idle_sessions_of_one_client_leave_room_for_others(shared: Shared) -> None:
    with shared.session("a") as one, shared.session("a") as two:
        one.open()
        one.send(step(1))
        assert isinstance(one.receive(), Result)
        two.open()
        two.refuses(step(1), LimitExceededError, "one client may have 0.0 MiB")
        with shared.session("b") as other:
            other.open()
            other.send(step(1))
            assert isinstance(other.receive(), Result)
    table = shared.running.server.sessions
    assert eventually(lambda: all(one.state.value == "detached" for one in table))


def test_without_certificates_the_one_client_may_have_all(start_server: StartServer) -> None:
    server = start_server(limits=Limits(cache_bytes=2 * CACHE))
    with RawStream(server.address) as one, RawStream(server.address) as two:
        for stream in (one, two):
            stream.open()
            stream.send(step(1))
            assert isinstance(stream.receive(), Result)
    server.stop()


def test_adapters_of_one_client_leave_room_for_others() -> None:
    whole = table_of()
    begin(whole)
    needed = whole.ledger.used(Pool.ADAPTERS)
    table = table_of(run_bytes=4 * needed - 1, client_share=0.5)
    begin(table, "one", "a")
    with pytest.raises(LimitExceededError, match=r"client 'a' has .* of the server's memory for adapters"):
        begin(table, "two", "a")
    begin(table, "one", "b")


def test_answers_that_are_left_unread_are_counted_in_bytes(shared: Shared) -> None:
    with shared.run("a") as greedy, shared.run("b") as other:
        greedy.attach("greedy")
        done = 0

        def pile_up() -> None:
            nonlocal done
            while done < 100:
                greedy.put(forward(done + 1, done + 1, recompute=True), received=0)
                greedy.receive()
                done += 1

        with pytest.raises(LimitExceededError, match="were left unread"):
            pile_up()
        assert 25 < done < 40  # 64 KiB are 32 answers, the frame that waits counts as well
        other.attach("greedy")
        for number in range(1, 40):
            other.put(forward(number, number, recompute=True), received=number - 1)
            assert isinstance(other.receive(), States)
        other.put(Message(Kind.CLOSE, {}))
    with shared.run("a") as greedy:
        greedy.attach("greedy", begin=False)  # what was refused was not done, and the run is there
        assert [greedy.receive().number for _ in range(done)] == list(range(1, done + 1))
        greedy.close_run()


def test_nobody_has_an_answer_before_it_was_sent(shared: Shared) -> None:
    with shared.run("a") as stream:
        stream.attach("early")
        stream.put(export(1), received=0)
        assert isinstance(stream.receive(), Tensors)
        early = replace(export(2), received=2)
        stream.refuses(early, ProtocolError, "says that it has answer 2; the last that was sent is 1")


def test_of_an_export_one_page_is_kept(shared: Shared) -> None:
    with shared.run("a") as stream:
        stream.attach("pages")
        for number in range(1, 40):
            stream.put(export(number), received=0)
            assert isinstance(stream.receive(), Tensors)
    with shared.run("a") as stream:
        stream.refuses(Message(Kind.OPEN, attach("pages", begin=False)), ProtocolError, "further page of an export")
    with shared.run("a") as stream:
        stream.attach("pages", begin=False, received=38)
        assert stream.receive().number == 39  # the last one is kept, and comes again


def test_a_client_that_does_not_read_is_not_computed_for(start_server: StartServer) -> None:
    """And once it reads, it gets all: nothing was given up."""
    server = start_server(limits=Limits(frame_bytes=1 << 20))
    large = replace(AdapterSpec.from_body(attach()["adapter"]), targets={"model.layers.2.mlp.down_proj": (700, 16.0)})
    with RawRun(server.address) as lazy, RawStream(server.address) as other:
        lazy.attach("lazy", adapter=large.to_body())
        for number in range(1, 101):  # 50 MiB of answers
            lazy.put(export(number), received=0)
        run = server.server.runs.find("lazy", "anonymous")
        assert eventually(lambda: run.number >= 10)
        other.open()
        for number in range(1, 200):
            other.send(step(number, start=0))
            assert isinstance(other.receive(), Result)
        assert run.number < 90
        assert [lazy.receive().number for _ in range(100)] == list(range(1, 101))
        lazy.put(Message(Kind.CLOSE, {}))
    server.stop()


def test_inputs_of_micro_batches_that_wait_are_counted_and_the_oldest_gives_way() -> None:
    table = table_of(graph_bytes=0)
    run = begin(table)
    rows = Rows.uniform(8, 0, 512)
    large = replace(forward(1, recompute=True), rows=rows, states=torch.zeros(rows.total, 64))  # 1 MiB
    do(table, run, *(replace(large, number=number, micro=number) for number in range(1, 20)))
    assert table.ledger.used(Pool.ACTIVATIONS) == 16 * MIB
    with pytest.raises(ProtocolError, match="micro-batch 3, which was given up for later ones; send fewer"):
        do(table, run, backward(20, 3))
    do(table, run, replace(backward(20, 4), gradient=torch.zeros(rows.total, 64)))


def test_activations_give_way_to_inputs_so_that_nobody_loses_a_micro_batch_to_another() -> None:
    outcomes = []
    roomy = table_of()
    begun = begin(roomy)
    do(roomy, begun, forward(1))
    one = roomy.ledger.used(Pool.ACTIVATIONS)
    for limit in (1 << 24, one + 2000):
        table = table_of(graph_bytes=limit)
        runs = [begin(table, "one", client) for client in ("a", "b")]
        for run in runs:
            do(table, run, forward(1, 1), forward(2, 2))
        assert table.ledger.used(Pool.ACTIVATIONS) <= limit
        outcomes.append([do(table, run, backward(number, number - 2)) for run in runs for number in (3, 4)])
    for [kept], [again] in zip(*outcomes, strict=True):
        torch.testing.assert_close(again.states, kept.states)
        assert again.norm == pytest.approx(kept.norm)


def test_a_session_ends_with_the_run_whose_adapter_it_goes_through_and_all_is_given_back(
    start_server: StartServer,
) -> None:
    server = start_server()
    with RawRun(server.address) as run, RawStream(server.address) as session:
        run.attach("held")
        run.put(forward(1))
        run.receive()
        session.send(Message(Kind.OPEN, open_body(run="held", input_layers=1, output_layers=1)))
        session.send(step(1))
        session.receive()
        assert isinstance(session.receive(), Result)
        ledger = server.server.ledger
        assert all(ledger.used(pool) > 0 for pool in (Pool.CACHES, Pool.ADAPTERS, Pool.ACTIVATIONS, Pool.BUFFERS))
        run.put(Message(Kind.CLOSE, {}))
        assert type(session.refusal()) is RunLostError
        assert eventually(lambda: not server.server.streams)
        assert [ledger.used(pool) for pool in Pool] == [0] * len(Pool)
    server.stop()


# Time


def test_turns_go_by_client_first_and_then_by_session() -> None:
    turns: Turns[str] = Turns()
    for owner in ("one", "two", "three"):
        for item in range(2):
            turns.add(Owner("a", owner), f"a {owner} {item}")
    for item in range(3):
        turns.add(Owner("b", "one"), f"b {item}")
    order = list(iter(turns.next, None))
    assert order[:6] == ["a one 0", "b 0", "a two 0", "b 1", "a three 0", "b 2"]
    assert order[6:] == ["a one 1", "a two 1", "a three 1"]


def test_long_frames_are_read_and_modules_built_beside_the_event_loop(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    loop, seen = server.thread, list[tuple[str, bool]]()

    def watch(owner: Any, name: str, what: Callable[..., bool] = lambda *_arguments: True) -> None:
        original = getattr(owner, name)

        def watched(*arguments: Any, **more: Any) -> Any:
            if what(*arguments):
                seen.append((name, threading.current_thread() is loop))
            return original(*arguments, **more)

        monkeypatch.setattr(owner, name, watched)

    watch(AdapterSpec, "put_on")
    watch(MiddleBlocks, "second_adapter_copy")
    for reader in (fedsea.server.pipeline, fedsea.server.stream):
        watch(reader, "decode", lambda data: len(data) >= MIB)
    rows = Rows.uniform(8, 0, 512)
    with RawRun(server.address) as run, RawStream(server.address) as session:
        run.attach("long")
        run.put(Forward(1, 1, rows, torch.zeros(rows.total, 64), recompute=True))
        run.receive()
        session.open()
        session.send(Step(1, Rows.uniform(16, 0, 256), torch.zeros(4096, 64)))
        session.receive()
        run.put(Message(Kind.CLOSE, {}))
    assert {name for name, _ in seen} == {"put_on", "second_adapter_copy", "decode"}
    assert not [name for name, on_the_loop in seen if on_the_loop]
    server.stop()


def test_one_long_text_of_a_few_bytes_is_bounded(shared: Shared) -> None:
    for rows, says in (
        (Rows((0,), (65,)), "a text of 65 tokens is over the server's limit of 64 in training"),
        (Rows((0,), (513,)), "longer than the model's 512 positions"),
        (Rows((0, 0), (1, 4000)), "over 4096 places"),
    ):
        with shared.run("a") as stream:
            body = attach("narrow", adapter=attach()["adapter"] | {"narrow": 1})
            stream.send(Message(Kind.OPEN, body))
            stream.receive()
            stream.put(Forward(1, 1, rows, torch.zeros(rows.total, 1)))
            assert says in str(stream.refusal())
        with shared.run("a") as stream:
            stream.put(Message(Kind.OPEN, body | {"begin": False}))
            stream.receive()
            stream.close_run()


# Tensors by name


def frame_of(header: bytes) -> bytes:
    """A TENSORS frame with a header of safetensors of a test's own."""
    whole = encode(Tensors(1, {"x": torch.zeros(1)}))
    body = len(header).to_bytes(8, "little") + header
    start = len(whole) - int.from_bytes(whole[8:12], "little")
    return whole[:8] + len(body).to_bytes(4, "little") + whole[12:start] + body


def test_tensors_are_checked_by_their_names_before_any_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_data: bytes) -> Any:
        raise AssertionError("made")

    monkeypatch.setattr(tensors, "load", never)
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    many = "{" + ",".join(f'"n{number}":{entry}' for number in range(MAX_TENSORS + 1)) + "}"
    for header, says in (
        (many.encode(), f"{MAX_TENSORS} are allowed"),
        (b" " * (1 << 20) + b" ", "header of a frame's tensors is over"),
        (f'{{"stranger":{entry}}}'.encode(), "the adapter has no weight 'stranger'"),
        (b"[" * 100_000, "not in the safetensors format"),
        (b"\xff\xff", "not in the safetensors format"),
        (b"[]", "not in the safetensors format"),
    ):
        with pytest.raises(ProtocolError, match=says):
            decode(frame_of(header), knows=lambda name: name == "x")


# Streams, counts, words


def opens(server: RunningServer) -> bool:
    """Whether there is room for a stream."""
    with RawStream(server.address) as stream, contextlib.suppress(LimitExceededError):
        return bool(stream.open())
    return False


def test_watchers_of_the_health_are_counted_with_a_clients_streams(start_server: StartServer) -> None:
    server = start_server(limits=Limits(client_sessions=2))
    serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
    with grpc.insecure_channel(server.address, contract.channel_options(1 << 20)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=contract.SERVICE)
        watching = [stub.Watch(request) for _ in range(4)]
        assert [next(one) for one in watching] == [serving] * 4
        one_more = stub.Watch(request)
        with pytest.raises(grpc.RpcError):
            next(one_more)
        assert isinstance(contract.error_from(one_more.details(), one_more.trailing_metadata()), LimitExceededError)
        assert stub.Check(request) == serving
        watching[0].cancel()
        assert eventually(lambda: opens(server))
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert next(watching[1]).status == health_pb2.HealthCheckResponse.NOT_SERVING
        stopping.join()


def test_what_a_peer_counts_fits_the_fields_that_it_goes_on_in() -> None:
    attached = Attached(True, 0, 0, 1 << 20, 64).to_body()
    for name in ("number", "version", "frame_bytes", "micro_batches"):
        with pytest.raises(ProtocolError, match=f"'{name}' must be a whole number"):
            Attached.from_body(attached | {name: 1 << 31})
    with pytest.raises(ProtocolError, match="'narrow'"):
        Open.from_body(open_body(narrow=1 << 31))
    for frame in (step(1 << 32), forward(1, 1 << 33), Command(1 << 54, {}), replace(forward(), received=1 << 32)):
        with pytest.raises(ProtocolError, match="does not fit"):
            encode(frame)


def test_what_a_client_is_told_is_short_and_shows_no_control_characters(
    shared: Shared, caplog: pytest.LogCaptureFixture
) -> None:
    with shared.run("a") as stream:
        stream.attach("words")
        stream.put(Command(1, {"do": "\x1b]0;x\x07\n" * 3000}))
        error = stream.refusal()
    assert type(error) is ProtocolError
    assert "there is no command" in str(error)
    assert len(str(error)) <= 1000
    lines = [record.getMessage() for record in caplog.records if "no command" in record.getMessage()]
    assert lines
    assert all(len(line) < 2000 and line.isprintable() for line in lines)


def test_of_two_runs_of_a_client_with_one_name_a_rounds_takes_the_others_place() -> None:
    reasons: list[FedSEAError] = []
    table = table_of()
    first = table.attach(replace(begin(table, "seat").request, run="other"), "a", reasons.append)[0]
    second = table.begin(first.request, "a", first.make, first.adapter, lambda _reason: None)
    assert table.find("other", "a") is second
    assert [type(reason) for reason in reasons] == [RunLostError]
    with pytest.raises(RunLostError):
        table.do(first, forward(1))
