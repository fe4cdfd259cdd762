"""A run's stream: frames are read ahead and answers written behind, so that link and device work at the same time.

Neither piles up. No frame is read ahead where the client's memory for frames that wait has no room for one more; and
who writes waits until what was written before has left, but for a frame's length.
"""

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

import grpc

from fedsea.errors import FedSEAError, ProtocolError
from fedsea.server.stream import Stream
from fedsea.wire.codec import decode
from fedsea.wire.frames import Frame, Operation

READ_AHEAD = 4  # frames that wait for their turn; more stay with gRPC, which holds the client back


class Pipeline:
    """The two directions of a run's stream, each in a task of its own. A context manager: leaving it flushes answers.

    `received` is the last answer that the client has, `room` says how many bytes may still be kept for it, `knows`
    whether the run has a tensor of a name, and `count` takes each frame's bytes, up and down.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        received: int,
        room: Callable[[], float],
        knows: Callable[[str], bool],
        count: Callable[[int, int], None],
    ) -> None:
        self._stream, self._room, self._knows, self._bytes = stream, room, knows, count
        self._incoming: asyncio.Queue[tuple[Frame, int] | FedSEAError | None] = asyncio.Queue(READ_AHEAD)
        self._outgoing: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._moved = asyncio.Event()  # a frame was taken, or has left
        self._taken = self._queued = 0  # bytes of the frame that was taken last, and of those to be written
        self._sent = received

    async def __aenter__(self) -> Self:
        self._main = asyncio.current_task()
        self._stream.held = 0  # OPEN is done with
        self._reader = asyncio.create_task(self._read_ahead())
        self._writer = asyncio.create_task(self._write_behind())
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._reader.cancel()
        self._outgoing.put_nowait(None)
        if isinstance(error, asyncio.CancelledError) and self._stream.reason is None:
            self._writer.cancel()
        # A write that has begun cannot be undone, and nothing may be sent beside it: wait for it.
        await asyncio.wait({self._writer, self._reader})
        # A task holds its error, that its frame, and that this: the run's memory would wait for the collector.
        del self._reader, self._writer

    async def read(self) -> Frame | None:
        """The next frame; None if the stream is over. The one before is done."""
        self._stream.held -= self._taken
        self._taken = 0
        self._moved.set()
        item = await self._incoming.get()
        if item is None:
            return None
        if isinstance(item, FedSEAError):
            raise item
        frame, self._taken = item
        if isinstance(frame, Operation) and frame.received > self._sent:
            raise ProtocolError(
                f"the client says that it has answer {frame.received}; the last that was sent is {self._sent}"
            )
        return frame

    async def write(self, number: int, data: bytes) -> None:
        """Have an answer sent after those before it; waits while they are more than a frame may have."""
        while self._queued and self._queued + len(data) > self._stream.frame_bytes and not self._writer.done():
            await self._move()
        self._sent = max(self._sent, number)
        self._queued += len(data)
        self._outgoing.put_nowait(data)

    async def _move(self) -> None:
        self._moved.clear()
        await self._moved.wait()

    async def _read_ahead(self) -> None:
        with contextlib.suppress(grpc.aio.InternalError):
            try:
                while (data := await self._next()) is not None:
                    size = len(data)
                    self._bytes(size, 0)
                    self._stream.held += size
                    read = partial(decode, data, max_bytes=self._stream.frame_bytes, knows=self._knows)
                    del data
                    frame = await self._stream.apart(read, size)
                    del read
                    await self._incoming.put((frame, size))
                    del frame
            except FedSEAError as error:
                await self._incoming.put(error.with_traceback(None))
            except Exception as error:
                # Whatever a library makes of hostile bytes: without this, the stream would wait for ever.
                await self._incoming.put(ProtocolError(f"a frame cannot be read: {type(error).__name__}"))
        await self._incoming.put(None)

    async def _next(self) -> bytes | None:
        # A stream that holds nothing may always read: each of its client's goes on, one frame at a time.
        while self._stream.held and self._room() < self._stream.frame_bytes:
            await self._move()
        return await self._stream.read_bytes()

    async def _write_behind(self) -> None:
        try:
            while (data := await self._outgoing.get()) is not None:
                self._bytes(0, len(data))
                await self._stream.write(data)
                self._queued -= len(data)
                self._moved.set()
                del data
        except grpc.aio.InternalError:
            pass  # the connection is lost; the reader finds out as well
        except FedSEAError:
            # The stream was ended from elsewhere while this was writing.
            if self._main is not None:
                self._main.cancel()
        finally:
            self._moved.set()
