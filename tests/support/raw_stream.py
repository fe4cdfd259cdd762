"""A stream to a block server that sends whatever a test wants, and a generation that must not notice."""

import queue
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from transformers import StoppingCriteria, StoppingCriteriaList

from fedsea import Partition, SplitModelForCausalLM
from fedsea.checkpoints import open_checkpoint
from fedsea.errors import FedSEAError
from fedsea.parts import Rows
from fedsea.wire import contract
from fedsea.wire.codec import decode, encode
from fedsea.wire.credentials import Credentials, channel_credentials
from fedsea.wire.frames import Frame, Kind, Message, Step
from fedsea.wire.handshake import Open, Opened

HIDDEN = 64


def open_body(name: str = "random:tiny", partition: Partition = Partition(), **more: Any) -> dict[str, Any]:
    """The body of an OPEN frame that a server accepts, with fields replaced."""
    return Open(partition, open_checkpoint(name).fingerprint(), "float32").to_body() | more


def step(number: int = 1, start: int = 0, count: int = 3, rows: int = 1, **more: Any) -> Step:
    """A valid step of the tiny model, with fields replaced."""
    states = torch.randn(rows * count, HIDDEN, generator=torch.Generator().manual_seed(number))
    return replace(Step(number, Rows.uniform(rows, start, count), states), **more)


class RawStream:
    """One stream over a channel of its own, without any of the client's own checks."""

    def __init__(self, address: str, credentials: Credentials | None = None, path: str = contract.SESSION_PATH) -> None:
        self.outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        options = [*contract.channel_options(1 << 30), ("grpc.use_local_subchannel_pool", 1)]
        if credentials is None:
            self.channel = grpc.insecure_channel(address, options)
        else:
            self.channel = grpc.secure_channel(address, channel_credentials(credentials), options)
        self.call: Any = self.channel.stream_stream(path)(iter(self.outgoing.get, None))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_what: object) -> None:
        self.abandon()

    def send(self, data: bytes | Frame) -> None:
        self.outgoing.put(data if isinstance(data, bytes) else encode(data))

    def receive(self) -> Frame:
        """The next frame; raises the server's typed error, or gRPC's if it sent none."""
        try:
            return decode(next(self.call), knows=lambda _name: True)
        except grpc.RpcError:
            error = contract.error_from(self.call.details(), self.call.trailing_metadata())
            if error is None:
                raise
            raise error from None

    def open(self, **more: Any) -> Opened:
        self.send(Message(Kind.OPEN, open_body(**more)))
        frame = self.receive()
        assert isinstance(frame, Message)
        return Opened.from_body(frame.body)

    def refusal(self) -> FedSEAError:
        """The typed error that ends the stream; frames before it are passed over."""
        try:
            while True:
                self.receive()
        except FedSEAError as refused:
            error = refused
        assert "\n" not in str(error)
        return error

    def refuses(self, data: bytes | Frame, kind: type[FedSEAError], says: str) -> None:
        """Send what ends the stream with an error of this kind, and of these words."""
        self.send(data)
        error = self.refusal()
        assert type(error) is kind
        assert says in str(error)

    def abandon(self) -> None:
        """Leave without CLOSE."""
        self.outgoing.put(None)
        self.channel.close()


def is_serving(server: Any) -> bool:
    """What its health check says."""
    with grpc.insecure_channel(server.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=contract.SERVICE))
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def send_nonsense(stream: RawStream, source: random.Random, openings: list[bytes], frames: list[bytes]) -> None:
    """Send random bytes and damaged frames, and read until the server has had enough of them."""

    def damaged(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(source.randint(1, 8)):
            changed[source.randrange(min(60, len(changed)))] = source.randrange(256)
        return bytes(changed)

    for _ in range(4):
        stream.send(source.choice([source.randbytes(source.randrange(200)), damaged(source.choice(frames))]))
        stream.send(source.choice([damaged(source.choice(openings)), *frames]))
    stream.outgoing.put(None)
    try:
        while True:
            stream.receive()
    except (StopIteration, FedSEAError):
        pass


class Midway(StoppingCriteria):
    """Does something once, in the middle of a generation."""

    def __init__(self, act: Callable[[], Any], after: int = 4) -> None:
        self._act, self._left = act, after

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._left -= 1
        if self._left == 0:
            self._act()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether a condition comes true; how long it takes does not matter."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def prompt(rows: int = 1, tokens: int = 7, seed: int = 1) -> torch.Tensor:
    """Token ids that the tiny model takes."""
    return torch.randint(1, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def assert_same_tokens(
    split: SplitModelForCausalLM, whole: Any, midway: Callable[[], Any], ids: torch.Tensor | None = None, **how: Any
) -> None:
    """Generate with both models; in the middle of the split one's generation, `midway` happens."""
    ids = prompt() if ids is None else ids
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | how
    happening = Midway(midway)
    tokens = split.generate(ids, stopping_criteria=StoppingCriteriaList([happening]), **how)
    assert happening._left <= 0, "the generation ended before anything happened"
    assert torch.equal(tokens, whole.generate(ids, **how))
