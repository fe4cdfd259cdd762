"""One client's stream as the service sees it: frames in, frames out, and a way to end it from elsewhere."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc

from fedsea.errors import CredentialsError, FedSEAError, LimitExceededError
from fedsea.server.scheduler import Owner, Scheduler
from fedsea.wire import contract
from fedsea.wire.codec import decode
from fedsea.wire.frames import Frame
from fedsea.wire.roles import is_coordinator

T = TypeVar("T")
SMALL = 1 << 16  # bytes of a frame that the event loop reads itself: a decode step's, and whatever takes less than 1 ms


class Stream:
    """One call's frames; to be used by the task that was current when it was made.

    `codec` is where long frames are read; `on_frame` takes each that passes: whether the client sent it, and its bytes.
    """

    def __init__(
        self, context: Any, frame_bytes: int, codec: Scheduler, on_frame: Callable[[bool, bytes], None] | None = None
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._context, self.frame_bytes, self._codec, self._task = context, frame_bytes, codec, task
        self._writing, self._on_frame = False, on_frame
        self.reason: FedSEAError | None = None  # why `end` was called
        self.held = 0  # bytes of the frames that came and are not done with
        self.client, self.coordinator = identity_of(context)
        self.peer = unquote(str(context.peer())).removeprefix("ipv4:").removeprefix("ipv6:")  # HOST:PORT

    async def read(self, knows: Callable[[str], bool] = lambda _name: False) -> Frame | None:
        """The next frame, with tensors of known names alone; None if the stream is over."""
        self.held = 0
        data = await self._context.read()  # as `read_bytes`, a call less for each token
        if data is grpc.aio.EOF:
            return None
        if self._on_frame is not None:
            self._on_frame(True, data)
        self.held = len(data)
        if self.held <= SMALL:
            return decode(data, max_bytes=self.frame_bytes, knows=knows)
        return await self.apart(partial(decode, data, max_bytes=self.frame_bytes, knows=knows), self.held)

    async def read_bytes(self) -> bytes | None:
        """The next frame as it came; None if the stream is over."""
        data: Any = await self._context.read()
        if data is grpc.aio.EOF:
            return None
        if self._on_frame is not None:
            self._on_frame(True, data)
        return data  # type: ignore[no-any-return]

    async def apart(self, work: Callable[[], T], size: int) -> T:
        """Turn `size` bytes into a frame or back: beside the event loop, in the client's turn, if they are many."""
        return work() if size <= SMALL else await self._codec.run(Owner(self.client, str(id(self))), work)

    async def write(self, data: bytes) -> None:
        """Send a frame; waits while the client does not read.

        The reason if `end` was called meanwhile; grpc.aio.InternalError if the connection is lost.
        """
        if self._on_frame is not None:
            self._on_frame(False, data)
        self._writing = True
        try:
            await self._context.write(data)
        finally:
            self._writing = False
        if self.reason is not None:
            raise self.reason

    def end(self, reason: FedSEAError) -> None:
        """Have the stream's task stop: it is cancelled, or finds out once its write is done."""
        if self.reason is not None:
            return
        self.reason = reason
        # gRPC can neither undo a write nor send a status beside it: cancelled there, the call would never end.
        if not self._writing:
            self._task.cancel()

    async def refuse(self, error: FedSEAError) -> None:
        """End the stream with a typed error for the client: raises AbortError, for gRPC, if the client is not gone."""
        with contextlib.suppress(grpc.aio.InternalError):
            await self._context.abort(*contract.refusal(error))


class StreamCounter:
    """Counts the open streams of each client, of which there may be `allowed`."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def counted(self, client: str) -> Iterator[None]:
        """Count a stream while it is open; refuse it if its client has too many, or no name."""
        if not client:
            raise CredentialsError("the client's certificate has no name: get one from `fedsea credentials init DIR`")
        if self._open[client] >= self.allowed:
            raise LimitExceededError(f"client {client!r} has {self.allowed} streams open, twice its session limit")
        self._open[client] += 1
        try:
            yield
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]


def identity_of(context: Any) -> tuple[str, bool]:
    """The name in the certificate of a call's client (empty if it has none), and whether it is a coordinator's.

    Without TLS all clients are one, `anonymous`, and may be a coordinator.
    """
    shown = context.auth_context()
    secure = b"ssl" in shown.get("transport_security_type", ())
    names = shown.get("x509_common_name") or [b""]
    return names[0].decode(errors="replace") if secure else "anonymous", not secure or is_coordinator(shown)
