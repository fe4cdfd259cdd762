"""A call at the server as its kinds have it in common: how it opens, and what happens when it ends."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from fedsea.errors import CredentialsError, FedSEAError, ModelMismatchError, ProtocolError, ServerUnavailableError
from fedsea.server.state import ServerState
from fedsea.server.stream import Stream
from fedsea.wire.frames import Kind, Message
from fedsea.wire.handshake import Open
from fedsea.wire.roles import COORDINATOR
from fedsea.wire.runs import Attach

OPEN_SECONDS = 30.0  # for a new stream to say what it is for
Request = TypeVar("Request", Open, Attach)


class ServedStream:
    """One call, from OPEN to its end. A kind of stream says what is done in between."""

    def __init__(self, state: ServerState, stream: Stream) -> None:
        self.state, self.stream = state, stream

    async def serve(self) -> None:
        """Serve the client until it says CLOSE, or its stream is over; FedSEAError says why it is refused."""
        raise NotImplementedError

    def lose(self) -> None:
        """The connection is lost: what the client had may be taken up again."""

    def end(self, error: FedSEAError) -> None:
        """The client is refused."""
        raise NotImplementedError

    async def open_body(self) -> dict[str, Any] | None:
        """The body of the OPEN that a stream begins with; None if it is over before.

        ProtocolError if something else comes, or nothing in time; ServerUnavailableError if the server is stopping.
        """
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                frame = await self.stream.read()
        except TimeoutError:
            raise ProtocolError(f"no OPEN came within {OPEN_SECONDS:g} s") from None
        if frame is None:
            return None
        if not isinstance(frame, Message) or frame.kind is not Kind.OPEN:
            raise ProtocolError("a stream begins with OPEN")
        if self.state.stopping:
            raise ServerUnavailableError("the block server is stopping")
        return frame.body

    async def open_request(self, read: Callable[[dict[str, Any]], Request]) -> Request | None:
        """What a client's OPEN asks for, of this model; None if the stream is over before.

        CredentialsError if the client is a coordinator, ModelMismatchError if it holds another model; what `read`
        raises.
        """
        body = await self.open_body()
        if body is None:
            return None
        if self.stream.client == COORDINATOR:
            raise CredentialsError("a coordinator's certificate opens rounds; sessions and runs are for clients")
        request = read(body)
        different = self.state.fingerprint.mismatches(request.fingerprint)
        if different:
            raise ModelMismatchError(
                f"client and server hold different models: {', '.join(different[:4])}"
                f"{' and more' if len(different) > 4 else ''} differ; load the same checkpoint on both sides"
            )
        return request
