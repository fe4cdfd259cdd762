"""One client's stream as the service sees it: frames in, frames out, and a way to end it from elsewhere."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import grpc

from fedsea.errors import FedSEAError
from fedsea.server.connections import peer_of
from fedsea.wire import contract
from fedsea.wire.frames import Frame, decode
from fedsea.wire.roles import is_coordinator


class Stream:
    """A stream, to be used by the task that was current when it was made.

    Parameters
    ----------
    context
        gRPC's context of the call.
    frame_bytes
        Longest frame that may come.
    on_frame
        Shown each frame that passes, as bytes: whether it came from the client, and the frame.

    Attributes
    ----------
    frame_bytes
        Longest frame that may come.
    client
        The name in the client's certificate, empty if it has none; without TLS all clients are one, `anonymous`.
    peer
        Where the client is, `HOST:PORT`.
    coordinator
        Whether the certificate is a coordinator's; without certificates anybody's is.
    reason
        Why `end` was called; None if it was not.
    """

    def __init__(self, context: Any, frame_bytes: int, on_frame: Callable[[bool, bytes], None] | None = None) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._context, self.frame_bytes, self._task = context, frame_bytes, task
        self._writing, self._on_frame = False, on_frame
        self.reason: FedSEAError | None = None
        shown = context.auth_context()
        secure = b"ssl" in shown.get("transport_security_type", ())
        names = shown.get("x509_common_name") or [b""]
        self.coordinator = not secure or is_coordinator(shown)
        self.client: str = names[0].decode(errors="replace") if secure else "anonymous"
        self.peer = peer_of(context)

    async def read(self) -> Frame | None:
        """The next frame; None if the stream is over, with or without a killed client.

        Raises
        ------
        FedSEAError
            If what came is no frame, or too long.
        """
        data = await self.read_bytes()
        return None if data is None else decode(data, max_bytes=self.frame_bytes)

    async def read_bytes(self) -> bytes | None:
        """The next frame as it came; None if the stream is over."""
        data: Any = await self._context.read()
        if data is grpc.aio.EOF:
            return None
        if self._on_frame is not None:
            self._on_frame(True, data)
        return bytes(data)

    async def write(self, data: bytes) -> None:
        """Send a frame; waits while the client does not read.

        Raises
        ------
        FedSEAError
            The reason, if `end` was called meanwhile.
        grpc.aio.InternalError
            If the connection is lost.
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
        """Have the stream's task told to stop: it is cancelled, or finds out once its write is done."""
        if self.reason is not None:
            return
        self.reason = reason
        # gRPC can neither take a write back nor send a status beside it: cancelled there, the call would never end.
        if not self._writing:
            self._task.cancel()

    async def refuse(self, error: FedSEAError) -> None:
        """End the stream with a typed error for the client.

        Raises
        ------
        grpc.aio.AbortError
            For gRPC to see; only a client that is gone already is not told, and nothing is raised.
        """
        with contextlib.suppress(grpc.aio.InternalError):
            await self._context.abort(contract.status_of(error), str(error), contract.trailing_metadata(error))
