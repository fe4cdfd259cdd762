"""A call at the server as its kinds have it in common: how it opens, and what happens when it ends."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from fedsea.errors import CredentialsError, FedSEAError, ModelMismatchError, ProtocolError, ServerUnavailableError
from fedsea.server.leases import Lease, LeaseTable, State
from fedsea.server.state import ServerState
from fedsea.server.stream import Stream
from fedsea.wire.frames import Kind, Message
from fedsea.wire.handshake import Open
from fedsea.wire.roles import COORDINATOR
from fedsea.wire.runs import Attach

log = logging.getLogger("fedsea.server")
OPEN_SECONDS = 30.0  # for a new stream to say what it is for
MESSAGE_CHARACTERS = 300  # of what a peer has sent, in a line of the log
Request = TypeVar("Request", Open, Attach)
L = TypeVar("L", bound=Lease)


class ServedStream(Generic[L]):
    """One call, from OPEN to its end, and the lease in `table` that it serves, if another has not taken it up."""

    kind: str  # what the log calls that

    def __init__(self, state: ServerState, stream: Stream, table: LeaseTable[L] | None = None) -> None:
        self.state, self.stream, self._table = state, stream, table
        self.lease: L | None = None

    async def serve(self) -> None:
        """Serve the client until it says CLOSE, or its stream is over; FedSEAError says why it is refused."""
        raise NotImplementedError

    def lose(self) -> None:
        """The stream is over without CLOSE, as a killed client's is too: what it served may be taken up again."""
        lease = self.own()
        if lease is not None and self._table is not None and lease.state is State.ATTACHED:
            self._table.detach(lease)
            log.info("connection lost %s=%s client=%s", self.kind, lease.label, lease.client)

    def end(self, error: FedSEAError) -> None:
        """The client is refused, and a line of the log says whose stream it was, from where, and why."""
        label, stream = self.lease.label if self.lease is not None else "-", self.stream
        who = (self.kind, label, stream.client, stream.peer, error.code)
        log.warning("refused %s=%s client=%s peer=%s error=%s message=%r", *who, str(error)[:MESSAGE_CHARACTERS])

    def own(self) -> L | None:
        """The lease, if no other stream has taken it up."""
        return self.lease if self.lease is not None and self.lease.end == self.stream.end else None

    async def open_body(self) -> dict[str, Any] | None:
        """The body of the OPEN that a stream begins with, in time; None if it is over before."""
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
        """What a client's OPEN asks for, of this model, as `read` gives it; None if the stream is over before."""
        body = await self.open_body()
        if body is None:
            return None
        if self.stream.client == COORDINATOR:
            raise CredentialsError("a coordinator's certificate opens rounds; sessions and runs are for clients")
        request = read(body)
        different = self.state.fingerprint.mismatches(request.fingerprint)
        if different:
            names = ", ".join(different[:4]) + (" and more" if len(different) > 4 else "")
            raise ModelMismatchError(
                f"client and server hold different models: {names} differ; load the same checkpoint on both sides"
            )
        return request
