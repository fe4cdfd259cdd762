"""A session's stream: OPEN, then steps until CLOSE, an error, or the loss of the connection."""

import logging

from fedsea.errors import FedSEAError, ProtocolError, RunLostError
from fedsea.server.leases import State
from fedsea.server.served_stream import ServedStream
from fedsea.server.sessions import Session, check_cut
from fedsea.server.state import ServerState
from fedsea.server.stream import Stream
from fedsea.wire.codec import encode
from fedsea.wire.frames import Kind, Message, Step
from fedsea.wire.handshake import Open, Opened
from fedsea.wire.tensors import wire_dtype

log = logging.getLogger("fedsea.server")


class SessionStream(ServedStream[Session]):
    """A call with a session, which is lost or ended with it."""

    kind = "session"

    def __init__(self, state: ServerState, stream: Stream) -> None:
        super().__init__(state, stream, state.sessions)

    async def serve(self) -> None:
        session = await self.open()
        if session is None:
            return
        stream, scheduler, sessions = self.stream, self.state.scheduler, self.state.sessions
        while (frame := await stream.read()) is not None:
            if isinstance(frame, Step):
                sessions.admit(session, frame)
                await stream.write(await scheduler.run(session.owner, sessions.do, session, frame))
            elif isinstance(frame, Message) and frame.kind is Kind.CLOSE:
                self.state.close_session(session, "closed")
                return
            else:
                raise ProtocolError("a step or CLOSE was expected")
        self.lose()

    async def open(self) -> Session | None:
        """The session that the client asks for, with OPENED sent; None if it asks for nothing."""
        request = await self.open_request(Open.from_body)
        if request is None:
            return None
        session = self.lease = await self._find(request)
        # What the session's lost connection has left in the worker comes first: it moves the cache and the step.
        await self.state.scheduler.settled(session.owner)
        log.info("session opened session=%s client=%s step=%d", session.label, session.client, session.step)
        held, limits = self.state.middle.layers, self.state.limits
        longest = min(self.state.sessions.max_tokens, limits.session_tokens)
        opened = Opened(session.name, session.step, longest, limits.frame_bytes, (held.start, held.stop))
        await self.stream.write(encode(Message(Kind.OPENED, opened.to_body())))
        return session

    async def _find(self, request: Open) -> Session:
        """The session to resume if it is there, else a new one; through a run's adapter, if the client wants that."""
        state, client = self.state, self.stream.client
        layers, dtype = request.partition.middle(state.runs.num_layers), wire_dtype(request.wire_dtype)
        run = state.runs.find(request.run, client) if request.run is not None else None
        trainer = None
        if run is not None:
            state.ledger.keep(self.stream, run.adapter)
            trainer = await state.trainer(run)
        check_cut(request.narrow, trainer)
        if request.resume is not None:
            session = state.sessions.attach(request.resume, client, layers, dtype, self.stream.end)
            if session is not None:
                return session
        if run is not None and run.state is State.ENDED:
            raise RunLostError(f"the run {run.name!r} has ended")
        return state.sessions.open(client, layers, dtype, self.stream.end, trainer)

    def end(self, error: FedSEAError) -> None:
        """The session ends with its stream."""
        super().end(error)
        session = self.own()
        if session is not None:
            self.state.close_session(session, error.code)
