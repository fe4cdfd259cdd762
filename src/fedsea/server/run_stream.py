"""A run's stream: frames are read ahead and answers written behind, so that link and device work at the same time."""

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc

from fedsea.errors import FedSEAError, ProtocolError
from fedsea.server.stream import Stream
from fedsea.wire.run_frames import RunFrame, decode_run

READ_AHEAD = 4  # frames that wait for their turn; more stay with gRPC, which holds the client back


class RunStream:
    """The two directions of a stream, each in a task of its own. A context manager: leaving it flushes what is written.

    To be used by the task that made `stream`. `count` is told the bytes of each frame, up and down.
    """

    def __init__(self, stream: Stream, count: Callable[[int, int], None] = lambda _up, _down: None) -> None:
        self._stream, self._bytes = stream, count
        self._incoming: asyncio.Queue[tuple[RunFrame, int] | FedSEAError | None] = asyncio.Queue(READ_AHEAD)
        self._outgoing: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        self._main = asyncio.current_task()
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
        # A write that has begun cannot be taken back, and nothing may be sent beside it: wait for it.
        await asyncio.wait({self._writer, self._reader})
        # A task holds its error, that its frame, and that this: the run's memory would wait for the collector.
        del self._reader, self._writer

    async def read(self) -> tuple[RunFrame, int] | None:
        """The next frame and the last reply that the client has; None if the stream is over.

        Raises
        ------
        FedSEAError
            If what came is no frame, or too long.
        """
        item = await self._incoming.get()
        if isinstance(item, FedSEAError):
            raise item
        return item

    def write(self, data: bytes) -> None:
        """Have a frame sent after those before it."""
        self._outgoing.put_nowait(data)

    async def _read_ahead(self) -> None:
        with contextlib.suppress(grpc.aio.InternalError):
            try:
                while (data := await self._stream.read_bytes()) is not None:
                    self._bytes(len(data), 0)
                    await self._incoming.put(decode_run(data, max_bytes=self._stream.frame_bytes))
                    del data
            except FedSEAError as error:
                await self._incoming.put(error.with_traceback(None))
            except Exception as error:
                # Whatever a library makes of hostile bytes: without this, the stream would wait for ever.
                await self._incoming.put(ProtocolError(f"a frame cannot be read: {type(error).__name__}"))
        await self._incoming.put(None)

    async def _write_behind(self) -> None:
        try:
            while (data := await self._outgoing.get()) is not None:
                self._bytes(0, len(data))
                await self._stream.write(data)
        except grpc.aio.InternalError:
            pass  # the connection is lost; the reader finds out as well
        except FedSEAError:
            # The stream was ended from elsewhere while this was writing.
            if self._main is not None:
                self._main.cancel()
