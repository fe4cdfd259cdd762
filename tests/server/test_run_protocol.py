"""Whatever one client sends over a run's stream, it alone is told so; the server stays up, the others train on."""

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea import SplitModelForCausalLM
from fedsea.checkpoints import open_checkpoint
from fedsea.errors import (
    FedSEAError,
    LimitExceededError,
    ModelMismatchError,
    PartitionError,
    ProtocolError,
    RunLostError,
    UsageError,
)
from fedsea.server import Limits
from fedsea.server.stream import Stream
from fedsea.wire.codec import encode
from fedsea.wire.credentials import Credentials
from fedsea.wire.frames import Command, Kind, Message, Outcome, States
from tests.conftest import RunningServer, StartServer, connect
from tests.support.comparing import assert_same_losses
from tests.support.raw_stream import HIDDEN, RawStream, eventually, is_serving, open_body, send_nonsense, step
from tests.support.server_runs import ROWS, SPEC, RawRun, attach, backward, forward, states, update
from tests.support.split_training import adamw, adapted, batch, lora, train, trained, whole_twin

FRAME_BYTES = 1 << 17


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> RunningServer:
    return start_server(layers=range(1, 5), limits=Limits(frame_bytes=FRAME_BYTES, client_runs=100, runs=100))


class Bystander:
    """A run beside, whose losses must stay the whole model's."""

    def __init__(self, server: RunningServer, folder: Path) -> None:
        self.model = adapted(server)
        self._whole = whole_twin(self.model, folder)
        self._optimizers = [adamw(trained(one)) for one in (self.model, self._whole)]
        self._seed = 0

    def trains_on(self, midway: Callable[[], Any]) -> None:
        """Half a step, whatever happens meanwhile, and the other half."""
        self._seed += 1
        one = batch(self._seed, (5, 3))
        loss = self.model(**one).loss
        midway()
        loss.backward()
        self._optimizers[0].step()
        self._optimizers[0].zero_grad()
        assert_same_losses([float(loss.detach())], train(self._whole, [one], optimizer=self._optimizers[1]))


@pytest.fixture(scope="module")
def bystander(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bystander]:
    beside = Bystander(server, tmp_path_factory.mktemp("bystander"))
    yield beside
    beside.model.close()


OPEN = encode(Message(Kind.OPEN, attach()))
OTHER_MODEL = open_checkpoint("random:tiny-qwen2").fingerprint().to_json()


def opening(**more: Any) -> bytes:
    return encode(Message(Kind.OPEN, attach("new") | more))


def on(*target: Any) -> bytes:
    return opening(adapter=SPEC.to_body() | {"targets": [[*target]]})


TOO_LONG = (bytes(FRAME_BYTES + 1), LimitExceededError, f"limit of {FRAME_BYTES} bytes a frame")
# What is wrong with a frame whatever it is for: tests/wire/test_codec.py has all of it.
FIRST_FRAMES: dict[str, tuple[bytes, type[FedSEAError], str]] = {
    "an operation first": (encode(forward()), ProtocolError, "begins with OPEN"),
    "a session's OPEN": (encode(Message(Kind.OPEN, open_body())), ProtocolError, "'run' must be"),
    "a name with a path": (opening(run="../x"), ProtocolError, "'run' must be"),
    "a long name": (opening(run="x" * 65), ProtocolError, "'run' must be"),
    "another wire dtype": (opening(wire_dtype="int8"), ProtocolError, "'wire_dtype' must be"),
    "no adapter": (opening(adapter=None), ProtocolError, "an adapter"),
    "an adapter without end": (on("self_attn.q_proj", 8, 10**400, [1]), ProtocolError, "an adapter"),
    "an adapter on nothing": (on("self_attn.nothing", 8, 8, [2]), ProtocolError, "is not a linear module"),
    "an adapter of a larger model": (on("self_attn.q_proj", 8, 8, [2, 77]), ProtocolError, "does not have; it has 6"),
    "an answer that never was": (opening(received=-1), ProtocolError, "received"),
    "half a request": (opening(begin="yes"), ProtocolError, "'begin' must be"),
    "another model": (opening(fingerprint=OTHER_MODEL), ModelMismatchError, "client and server hold different models"),
    "layers not held": (opening(input_layers=0), PartitionError, "server holds layers 1:5"),
    "a run that is gone": (opening(begin=False), RunLostError, "does not have the run 'new'"),
    "over the server's limit": TOO_LONG,
}


@pytest.mark.parametrize("case", FIRST_FRAMES)
def test_a_wrong_first_frame_is_refused_and_begins_nothing(
    server: RunningServer, bystander: Bystander, case: str
) -> None:
    runs = len(server.server.runs)

    def misbehave() -> None:
        with RawRun(server.address) as stream:
            stream.refuses(*FIRST_FRAMES[case])
        assert is_serving(server)

    bystander.trains_on(misbehave)
    assert len(server.server.runs) == runs


NOT_FINITE = encode(forward(4, 4, states=torch.full((ROWS.total, HIDDEN), float("inf"))))
# After FORWARD 1 (of micro-batch 1) and 2 (of micro-batch 2), and BACKWARD 3 (of micro-batch 1). What does not follow
# from the run's state: test_runs.py has all of it.
LATER_FRAMES: dict[str, tuple[bytes, type[FedSEAError], str]] = {
    "OPEN again": (OPEN, ProtocolError, "an operation or CLOSE was expected"),
    "an answer": (encode(States(4, states())), ProtocolError, "an operation or CLOSE was expected"),
    "a session's step": (encode(step()), ProtocolError, "an operation or CLOSE was expected"),
    "not finite": (NOT_FINITE, ProtocolError, "not finite"),
    "an operation left out": (encode(forward(5, 4)), ProtocolError, "5 came after operation 3; 4 was expected"),
    "an operation again": (encode(backward(3, 1)), ProtocolError, "operation 3 came after operation 3"),
    "a gradient for nothing": (encode(backward(4, 9)), ProtocolError, "is not waiting for one"),
    "over the server's limit": TOO_LONG,
}


@pytest.mark.parametrize("case", LATER_FRAMES)
def test_a_wrong_later_frame_is_refused_and_its_run_goes_on_where_it_was(
    server: RunningServer, bystander: Bystander, case: str
) -> None:
    def misbehave() -> None:
        with RawRun(server.address) as stream:
            assert stream.attach().new
            stream.put(forward(1, 1), forward(2, 2), backward(3, 1))
            answers = [stream.receive() for _ in range(3)]
            stream.refuses(*LATER_FRAMES[case])
        with RawRun(server.address) as stream:
            back = stream.attach(received=1, begin=False)
            assert (back.new, back.number, back.version) == (False, 3, 0)
            again = [stream.receive() for _ in range(2)]
            assert [one.number for one in again] == [2, 3]
            assert torch.equal(again[1].states, answers[2].states)
            stream.put(backward(4, 2, fresh=False), update(5), received=3)
            assert isinstance(stream.receive(), States)
            assert stream.receive() == Outcome(5, {"version": 1})
            stream.close_run()

    bystander.trains_on(misbehave)
    assert is_serving(server)


def test_random_and_damaged_frames_leave_the_server_up(server: RunningServer, bystander: Bystander) -> None:
    source = random.Random(7)
    frames = [encode(one) for one in (forward(), backward(), update(), Command(1, {"do": "export", "after": ""}))]

    def misbehave() -> None:
        for number in range(50):
            with RawRun(server.address) as stream:
                if number % 5:
                    stream.attach(f"random-{number}")
                send_nonsense(stream, source, [OPEN], frames)

    bystander.trains_on(misbehave)
    assert is_serving(server)


def test_a_client_that_pipelines_and_never_reads_is_stopped_and_blocks_nobody(
    server: RunningServer, bystander: Bystander
) -> None:
    greedy = RawRun(server.address)
    greedy.attach("greedy")
    greedy.put(*(Command(number, {"do": "explain"}) for number in range(1, 400)))
    run = server.server.runs.find("greedy", "anonymous")
    bystander.trains_on(lambda: eventually(lambda: run.number >= 256))
    assert run.number == 256
    assert "left unread" in str(greedy.refusal())
    greedy.abandon()


def test_a_stream_that_lost_its_run_to_another_does_nothing_more_in_it(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last answer is stuck in a connection that nobody noticed to be dead; later operations still come in."""
    write = Stream.write
    stuck: list[Stream] = []

    async def sticking(self: Stream, data: bytes) -> None:
        if stuck == [self] or (not stuck and data[1] == Kind.OUTCOME):
            stuck[:] = [self]
            self._writing = True
            await asyncio.sleep(3600)
        await write(self, data)

    monkeypatch.setattr(Stream, "write", sticking)
    with RawRun(server.address) as old, RawRun(server.address) as new:
        old.attach("stuck")
        old.put(Command(1, {"do": "explain"}))
        run = server.server.runs.find("stuck", "anonymous")
        assert eventually(lambda: bool(stuck) and run.number == 1)
        assert new.attach("stuck", begin=False).number == 1
        old.put(Command(2, {"do": "restore", "version": 7, "clear": True}))
        assert not eventually(lambda: run.number == 2, seconds=0.5)
        new.put(Command(2, {"do": "explain"}))
        assert [new.receive().number for _ in range(2)] == [1, 2]
        assert run.version == 0


# Whose run it is


def test_a_clients_runs_are_its_own_and_another_does_not_learn_their_names(
    start_server: StartServer, made: Path
) -> None:
    server = start_server(credentials=Credentials.load(made, "server"))
    a, b = (Credentials.load(made / name, "client") for name in ("client-a", "client-b"))
    with RawRun(server.address, a) as owner:
        assert owner.attach("mine").new
        owner.put(forward())
        owner.receive()
        with RawRun(server.address, b) as thief:
            thief.put(Message(Kind.OPEN, attach("mine", begin=False)))
            there = str(thief.refusal())
        with RawRun(server.address, b) as thief:
            thief.put(Message(Kind.OPEN, attach("nobodys", begin=False)))
            assert str(thief.refusal()) == there.replace("mine", "nobodys")
        with RawStream(server.address, b) as thief:  # a session through the owner's adapter
            thief.send(Message(Kind.OPEN, open_body(run="mine", input_layers=1, output_layers=1)))
            assert isinstance(thief.refusal(), RunLostError)
        with connect(server, credentials=made / "client-b") as model:
            model.add_adapter(lora(), run="mine")
            model.train()(**batch()).loss.backward()
        owner.put(backward())
        assert isinstance(owner.receive(), States)
    server.stop()


@pytest.mark.parametrize("name", ["", "a b", "../a", "x" * 65, "-a"])
def test_a_name_that_no_run_may_have_is_refused_here(server: RunningServer, name: str) -> None:
    with connect(server) as model, pytest.raises(UsageError, match="a run's name has 1 to 64 letters"):
        model.add_adapter(lora(), run=name)


def test_a_named_run_is_taken_up_with_the_same_adapter_only(server: RunningServer) -> None:
    first = adapted(server, run="named")
    train(first, [batch()])
    first.close()
    with connect(server) as model, pytest.raises(ProtocolError, match="trains another adapter: rank 5"):
        model.add_adapter(lora(r=5), run="named", take_up=True)
    with connect(server) as model, pytest.raises(UsageError, match="is at the server already, after 1 optimizer steps"):
        model.add_adapter(lora(), run="named")
    with adapted(server, run="named", take_up=True) as model:
        assert model.middle.run.version == 1
        train(model, [batch()])
        model.adapter.end_run()
    with connect(server) as model:
        model.add_adapter(lora(), run="named")  # the name is free again
        model.adapter.end_run()


def test_a_server_that_came_back_with_another_model_is_told_apart(start_server: StartServer) -> None:
    server = start_server()
    model: SplitModelForCausalLM = adapted(server)
    train(model, [batch()])
    server.stop()
    other = start_server("random:tiny-qwen3", listen=server.address)
    with pytest.raises(ModelMismatchError, match="client and server hold different models"):
        train(model, [batch()])
    model.close()
    other.stop()
