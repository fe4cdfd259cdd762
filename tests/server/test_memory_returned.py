"""Whatever ends a session, a run or a round, at whatever frame: the server gives back all the memory that it took.

Frames of real clients are recorded and played to a real server again, up to each of them in turn. There the stream is
killed, closed, or goes on with something that no client sends. Afterwards the server must hold what it held before: in
its tables, in tensors that Python knows, and in bytes from the allocator, which also shows what only C++ still holds.
"""

import contextlib
import ctypes
import gc
import queue
import random
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch

from fedsea.checkpoints import open_checkpoint
from fedsea.federation.coordinator.block_server_admin import BlockServerAdmin
from fedsea.parts.adapters import AdapterSpec
from fedsea.server import Limits
from fedsea.wire import contract
from fedsea.wire.codec import decode, encode
from fedsea.wire.frames import Backward, Command, Forward, Kind, Message, Step, Tensors
from fedsea.wire.rounds import Ticket
from tests.conftest import RunningServer, StartServer, connect
from tests.support.raw_stream import eventually, prompt
from tests.support.rounds import invite, take_part, together
from tests.support.split_training import adamw, adapted, batch, lora, train, trained

Frames = list[bytes]
LARGEST = struct.pack("<f", torch.finfo(torch.float32).max)
CLOSE = encode(Message(Kind.CLOSE, {}))
TEXTS = (20, 20)  # tokens: what the micro-batches that are broken off would leave behind is far more than the slack
SLACK = 3 << 20  # bytes that allocators, caches and gRPC may come to hold by themselves


class Recorder:
    """Keeps the frames that clients send to a server, stream by stream, while it is on."""

    def __init__(self) -> None:
        self.on = False
        self.streams: list[Frames] = []

    def __call__(self) -> Callable[[bool, bytes], None]:
        if not self.on:
            return lambda _from_client, _data: None
        frames: Frames = []
        self.streams.append(frames)
        return lambda from_client, data: frames.append(bytes(data)) if from_client else None

    def record(self, work: Callable[[], Any]) -> list[Frames]:
        """The frames of each stream that `work` opens."""
        self.on, self.streams = True, []
        try:
            work()
        finally:
            self.on = False
        assert eventually(lambda: all(frames for frames in self.streams))
        return self.streams


class Playback:
    """One stream, of many on a channel, that sends what it is told and may end at any time."""

    def __init__(self, channel: grpc.Channel, path: str) -> None:
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call: Any = channel.stream_stream(path)(iter(self._outgoing.get, None))

    def send(self, data: bytes) -> None:
        self._outgoing.put(data)

    def receive(self) -> bytes | None:
        """The next frame; None if the server has ended the stream, with an error or without."""
        try:
            return next(self._call, None)
        except grpc.RpcError:
            return None

    def ask(self, data: bytes) -> bytes | None:
        self.send(data)
        return self.receive()

    def cut(self) -> None:
        self._call.cancel()
        self._outgoing.put(None)


def reopened(frame: bytes, **changes: Any) -> bytes:
    """An OPEN frame with fields of its body replaced."""
    message = decode(frame)
    assert isinstance(message, Message)
    return encode(Message(message.kind, message.body | changes))


def reshaped(data: bytes) -> bytes:
    """Well-formed, and not what is expected here."""
    frame = decode(data, knows=lambda _name: True)
    if isinstance(frame, Step | Forward):
        return encode(replace(frame, states=frame.states[:, :8]))
    if isinstance(frame, Backward):
        return encode(replace(frame, gradient=frame.gradient[1:]))
    if isinstance(frame, Tensors):
        return encode(replace(frame, tensors={name: one[:1] for name, one in frame.tensors.items()}))
    if isinstance(frame, Command):
        return encode(replace(frame, body={"do": "update", "micros": [[]], "after": 0, "version": -1}))
    return data


def far_too_large(data: bytes) -> bytes:
    """Numbers that are finite, and no longer are once they are computed with."""
    count, rest = divmod(len(data) - 48, 4)
    return data[:48] + b"\xff\xff\x7f\x7f" * count + data[len(data) - rest :]


def flipped(data: bytes, places: int) -> bytes:
    """With another bit among the first bytes."""
    draw = random.Random(len(data))
    changed = bytearray(data)
    changed[draw.choice(range(min(places, len(data))))] ^= 1 << draw.randrange(8)
    return bytes(changed)


# What comes in place of a frame, or after those before it.
Instead = Callable[[Frames, int], bytes]
AT_EVERY_KIND: list[Instead] = [
    lambda _frames, _at: CLOSE,
    lambda frames, at: frames[at][: len(frames[at]) // 2],
    lambda frames, at: reshaped(frames[at]),
    lambda frames, at: frames[at] + bytes(256),  # too long
    lambda frames, at: frames[at][:-4] + b"\xff\xff\xff\xff",  # not finite
    lambda frames, at: far_too_large(frames[at]),
    lambda frames, at: flipped(frames[at], 32),
    lambda frames, at: flipped(frames[at], len(frames[at])),
    lambda frames, at: frames[min(at + 1, len(frames) - 1)],  # out of turn
    lambda frames, at: frames[at - 1],  # a second time
]


def killed(stream: Playback, _frames: Frames, _at: int) -> None:
    stream.cut()


def killed_while_it_computes(stream: Playback, frames: Frames, at: int) -> None:
    stream.send(frames[at])
    stream.cut()


def sending(instead: Instead) -> Callable[[Playback, Frames, int], object]:
    return lambda stream, frames, at: stream.ask(instead(frames, at))


AT_EVERY_FRAME = [killed, killed_while_it_computes]
IN_ALL_WAYS = [*AT_EVERY_FRAME, *map(sending, AT_EVERY_KIND)]


def breaks(frames: Frames) -> Iterator[tuple[Callable[..., None], int]]:
    """How to break off, and at which frame: in all ways where a frame of a kind comes after another the first time."""
    seen = set()
    for at in range(1, len(frames)):
        here = frames[at - 1][1], frames[at][1]
        for breaks_off in AT_EVERY_FRAME if here in seen else IN_ALL_WAYS:
            yield breaks_off, at
        seen.add(here)


@contextlib.contextmanager
def all_given_back(server: RunningServer) -> Iterator[None]:
    """What is taken in here is given back when the last stream has ended."""
    assert eventually(idle(server))
    tensors, size = count_tensors(), allocated()
    yield
    assert eventually(idle(server))
    assert eventually(lambda: count_tensors() <= tensors), f"{count_tensors() - tensors} tensors are left"
    assert allocated() - size < SLACK, f"{allocated() - size} bytes are left"


def count_tensors() -> int:
    """Those that Python knows."""
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def allocated() -> int:
    """Bytes that the C library has given out; 0 where it does not say."""
    if not sys.platform.startswith("linux") or not hasattr(LIBC, "mallinfo2"):
        return 0
    LIBC.mallinfo2.restype = _MallocInfo
    info = LIBC.mallinfo2()
    return int(info.uordblks + info.hblkhd)


class _MallocInfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in names.split(" "))


LIBC = ctypes.CDLL(None)


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def server(start_server: StartServer, recorder: Recorder) -> Iterator[RunningServer]:
    """Forgets who is away at once, and takes any number of streams."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsea.server.service.SWEEP_SECONDS", 0.02)
        limits = Limits(run_seconds=0.0, resume_seconds=0.0, client_sessions=1000, sessions=1000)
        running = start_server(tap=recorder, limits=limits)
        yield running
        running.stop()


@pytest.fixture(scope="module")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address, contract.channel_options(1 << 30)) as one:
        yield one


def idle(server: RunningServer) -> Callable[[], bool]:
    """Whether no stream is served, and the tables are empty."""
    one = server.server
    return lambda: not (one.streams or len(one.sessions) or len(one.runs) or one.rounds.rounds)


def text(model: Any) -> None:
    """A prompt, single tokens, beams that move rows, and a part that is taken back."""
    cache = model.new_cache()
    ids = prompt(rows=2, tokens=20)
    with torch.no_grad():
        for start, stop in ((0, 18), (18, 19)):
            model(ids[:, start:stop], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        model(ids[:, 19:], past_key_values=cache)
        cache.crop(-4)
        model(ids[:, 16:18], past_key_values=cache)
    cache.close()


def record_text(server: RunningServer, recorder: Recorder) -> Frames:
    with connect(server) as model:
        [frames] = recorder.record(lambda: text(model))
    return frames


def record_training(server: RunningServer, recorder: Recorder) -> Frames:
    """Weights that are set, a loss that is never taken back, two steps, and all of it read out."""

    def work() -> None:
        with adapted(server, lora(lora_dropout=0.1)) as model:
            model.set_adapter_state(model.adapter_state())
            optimizer = adamw(trained(model))
            train(model, [batch(0, TEXTS)], optimizer=optimizer)
            model.micro_batches = 1
            model(**batch(1, TEXTS))
            gc.collect()
            train(model, [batch(2, TEXTS)], optimizer=optimizer)
            model.adapter.training_state(optimizer)

    streams = recorder.record(work)
    return max(streams, key=len)


# What is played: at each turn some streams send their next frame, and then all of them are answered.
Turns = list[list[tuple[int, bytes]]]


def play(channel: grpc.Channel, paths: list[str], turns: Turns, breaks_off: Callable[..., None], at: int) -> None:
    """Play the turns before one, at which the first stream in it breaks off; the others go on as if nothing were."""
    streams = [Playback(channel, path) for path in paths]
    for turn in turns[:at]:
        for number, frame in turn:
            streams[number].send(frame)
        assert all(streams[number].receive() is not None for number, _frame in turn)
    for number, frame in turns[at][1:]:
        streams[number].send(frame)
    broken = turns[at][0][0]
    frames = [frame for turn in turns for number, frame in turn if number == broken]
    before = sum(number == broken for turn in turns[:at] for number, _frame in turn)
    breaks_off(streams[broken], frames, before)
    for stream in streams:
        stream.cut()


@pytest.mark.parametrize(
    ("path", "record"), [(contract.SESSION_PATH, record_text), (contract.RUN_PATH, record_training)]
)
def test_a_stream_that_breaks_off_at_any_frame_leaves_nothing_behind(
    server: RunningServer,
    channel: grpc.Channel,
    recorder: Recorder,
    path: str,
    record: Callable[[RunningServer, Recorder], Frames],
) -> None:
    frames = record(server, recorder)
    names = (f"played-{number}" for number in range(10**6))

    def play_to(breaks_off: Callable[..., None], at: int) -> None:
        opening = reopened(frames[0], run=next(names)) if path == contract.RUN_PATH else frames[0]
        play(channel, [path], [[(0, frame)] for frame in (opening, *frames[1:])], breaks_off, at)

    with all_given_back(server):
        for breaks_off, at in breaks(frames):
            play_to(breaks_off, at)


@pytest.fixture(scope="module")
def patient(start_server: StartServer, recorder: Recorder) -> Iterator[RunningServer]:
    """Keeps a round for as long as its coordinator does."""
    running = start_server(tap=recorder, limits=Limits(client_sessions=1000))
    yield running
    running.stop()


def record_round(server: RunningServer, recorder: Recorder, admin: BlockServerAdmin, strategy: str) -> Turns:
    """A coordinator opens a round, two members train in it, and the coordinator takes the average."""
    spec = AdapterSpec.from_config(lora(), open_checkpoint("random:tiny").config)
    with adapted(server) as model:
        weights = model.adapter_state()
    tickets: dict[str, Ticket] = {}

    def member(name: str, seed: int) -> None:
        with connect(server) as model:
            model.adapter.join_round(tickets[name], lora())
            model.adapter.set_local(weights)
            take_part(model.train(), [batch(seed, TEXTS)])

    # Nobody is given up for being slow.
    patience = {"straggler_seconds": 600.0, "join_seconds": 600.0}
    [opening] = recorder.record(lambda: tickets.update(invite(admin, spec, weights, ["a", "b"], strategy, **patience)))
    members = recorder.record(lambda: together(lambda: member("a", 1), lambda: member("b", 2)))
    [averaging] = recorder.record(lambda: admin.aggregate("test.1", {"a": 1.0, "b": 2.0}))
    one, other = (frames for frames in members if len(frames) > 3)
    return [
        *([(0, frame)] for frame in opening[:-1]),
        *([(1, mine), (2, theirs)] for mine, theirs in zip(one, other, strict=True)),
        *([(0, frame)] for frame in averaging[1:]),
    ]


@pytest.mark.parametrize("strategy", ["server-hierarchical", "client-batch"])
def test_a_round_that_breaks_off_at_any_frame_leaves_nothing_behind(
    patient: RunningServer, recorder: Recorder, strategy: str
) -> None:
    """The other member is at the barrier by then, where it stays until the coordinator gives the round up."""
    paths = [contract.COORDINATE_PATH, contract.RUN_PATH, contract.RUN_PATH]
    options = contract.channel_options(1 << 30)
    with (
        BlockServerAdmin(patient.address, insecure=True) as admin,
        grpc.insecure_channel(patient.address, options) as channel,
    ):
        turns = record_round(patient, recorder, admin, strategy)

        def play_to(breaks_off: Callable[..., None], at: int) -> None:
            play(channel, paths, turns, breaks_off, at)
            admin.close_round("test.1")

        with all_given_back(patient):
            for breaks_off, at in breaks([turn[0][1] for turn in turns]):
                play_to(breaks_off, at)
