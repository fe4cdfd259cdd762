"""The block server: the gRPC service around the sessions, and its life from start to SIGTERM."""

import asyncio
import datetime
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import grpc
import torch

from fedsea.checkpoints import Checkpoint
from fedsea.errors import (
    CredentialsError,
    FedSEAError,
    LimitExceededError,
    ModelMismatchError,
    ProtocolError,
    RunLostError,
    ServerError,
    ServerUnavailableError,
    UsageError,
)
from fedsea.parts import MiddleBlocks
from fedsea.process import raise_file_limit
from fedsea.server.connections import listener_options, log_refusal
from fedsea.server.coordinate import coordinate
from fedsea.server.health import Health
from fedsea.server.ledger import Kept, Ledger, Pool
from fedsea.server.limits import Limits
from fedsea.server.member import Member
from fedsea.server.rounds import Round, RoundTable
from fedsea.server.run_stream import RunStream
from fedsea.server.runs import Run, RunTable
from fedsea.server.scheduler import Owner, Scheduler, spare_the_collector
from fedsea.server.sessions import Session, SessionTable, State, check_cut
from fedsea.server.stream import Stream, StreamCounter
from fedsea.server.trainer import Trainer
from fedsea.wire import contract
from fedsea.wire.address import check_listen, format_address
from fedsea.wire.credentials import Credentials, server_credentials
from fedsea.wire.frames import Kind, Message, Step, encode, wire_dtype
from fedsea.wire.handshake import Open, Opened
from fedsea.wire.roles import COORDINATOR
from fedsea.wire.rounds import ServerDescription
from fedsea.wire.run_frames import Backward, Command, Forward, Tensors
from fedsea.wire.runs import Attach, Attached

Wish = TypeVar("Wish", Open, Attach)
log = logging.getLogger("fedsea.server")
SWEEP_SECONDS = 1.0
OPEN_SECONDS = 30.0  # for a new stream to say what it wants
STOP_SECONDS = 5.0  # for the clients to take note that the server stops


@dataclass(frozen=True)
class ServerOptions:
    """How a block server is run.

    Parameters
    ----------
    listen
        `HOST:PORT`; port 0 takes a free one.
    layers
        The layers to hold, by their numbers in the whole model; None for all.
    credentials
        The server's certificate; None only on a loopback address.
    """

    listen: str = "127.0.0.1:7070"
    layers: range | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    credentials: Credentials | None = None
    limits: Limits = field(default_factory=Limits)


class BlockServer:
    """A server for the middle blocks of one model.

    `start` binds and begins to serve, `wait` returns when `stop` was called. Loading the weights (the constructor) and
    serving are apart, so that a port that is taken is found before and a health check says SERVING only after.

    Parameters
    ----------
    tap
        Called for each new stream; gives what is shown its frames (`Stream`'s `on_frame`). For audits: what a curious
        provider would keep.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: ServerOptions,
        tap: Callable[[], Callable[[bool, bytes], None]] | None = None,
    ) -> None:
        self.options, self._tap = options, tap
        self.host, self.port = check_listen(options.listen, plaintext=options.credentials is None)
        config: Any = checkpoint.config
        layers = options.layers if options.layers is not None else range(config.num_hidden_layers)
        self.num_layers: int = config.num_hidden_layers
        self.middle = MiddleBlocks.from_checkpoint(checkpoint, layers, dtype=options.dtype, device=options.device)
        self.fingerprint = checkpoint.fingerprint()
        limits = options.limits.settled(torch.device(options.device), secure=options.credentials is not None)
        self.ledger = Ledger(limits)
        of_tables: Any = {
            "max_tokens": config.max_position_embeddings,
            "dtype": options.dtype,
            "clock": time.monotonic,
            "ledger": self.ledger,
        }
        self.table = SessionTable(self.middle, limits, **of_tables)
        self.runs = RunTable(self.middle, limits, **of_tables, on_end=self._end_through)
        self.scheduler, self._codec = Scheduler(), Scheduler("fedsea-codec")
        self.rounds = RoundTable(
            self.runs, self.scheduler, secure=options.credentials is not None, report=self._report_straggler
        )
        self._server: grpc.aio.Server | None = None
        self._stopping = False
        self._warned_on: datetime.date | None = None
        self._streams: set[Stream] = set()
        # A stream may wait for its OPEN, or for a client that does not read: those must not pile up either.
        self._counter = StreamCounter(2 * limits.client_sessions)
        self._done = asyncio.Event()

    async def start(self) -> str:
        """Bind and serve; returns the address.

        Raises
        ------
        UsageError
            If the address is taken or is not this machine's.
        """
        raise_file_limit()
        spare_the_collector()
        self._warn_of_end()
        settings = listener_options(self.table.limits.frame_bytes)
        # Of one connection; more than a client may have, so that who has too many is told, and does not wait.
        settings.append(("grpc.max_concurrent_streams", self._counter.allowed + 16))
        server = grpc.aio.server(options=settings)
        handlers = {
            contract.SESSION: grpc.stream_stream_rpc_method_handler(self._session),
            contract.RUN: grpc.stream_stream_rpc_method_handler(self._run),
            contract.COORDINATE: grpc.stream_stream_rpc_method_handler(self._coordinate),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(contract.SERVICE, handlers),))
        self._add_health(server)
        try:
            self.port = self._bind(server)
        except RuntimeError as error:
            raise UsageError(
                f"cannot listen on {self.options.listen}: the address is taken or not this machine's"
            ) from error
        await server.start()
        self._server = server
        self._sweeper = asyncio.create_task(self._sweep())
        return format_address(self.host, self.port)

    def _bind(self, server: grpc.aio.Server) -> int:
        address = format_address(self.host, self.port)
        if self.options.credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, server_credentials(self.options.credentials)))

    def _add_health(self, server: grpc.aio.Server) -> None:
        from grpc_health.v1 import health_pb2_grpc

        self._health = Health(self._counter)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)

    async def wait(self) -> None:
        """Wait until the server has stopped."""
        await self._done.wait()

    async def stop(self) -> None:
        """Tell the sessions and runs, let the running step finish, and stop."""
        if self._stopping or self._server is None:
            return
        self._stopping = True
        self._health.stop()
        self._sweeper.cancel()
        for stream in list(self._streams):
            stream.end(ServerUnavailableError("the block server is stopping"))
        await self._server.stop(grace=STOP_SECONDS)
        await self.scheduler.shutdown()
        await self._codec.shutdown()
        self._done.set()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self._warn_of_end()
            self._expire()  # apart: a name in here would hold the last run that ended until another one does

    def _expire(self) -> None:
        for session in self.table.expire():
            log.info("session ended session=%s client=%s reason=expired", short(session), session.client)
        for run in self.runs.expire():
            log.info("run ended run=%s client=%s reason=expired", run.name, run.client)
        for label in self.rounds.expire():
            log.info("round ended round=%s reason=expired", label)

    def _warn_of_end(self) -> None:
        """Once a day, if the certificate ends soon."""
        today = datetime.datetime.now(datetime.UTC).date()
        if self.options.credentials is not None and self._warned_on != today:
            self._warned_on = today
            if (warning := self.options.credentials.ends_soon()) is not None:
                log.warning(warning)

    async def _session(self, _requests: Any, context: Any) -> None:
        """A call with a session."""
        await self._call(context, self._serve_session)

    async def _run(self, _requests: Any, context: Any) -> None:
        """A call with a run."""
        await self._call(context, self._serve_run)

    async def _coordinate(self, _requests: Any, context: Any) -> None:
        """A call of a coordinator's."""
        await self._call(context, self._serve_coordinator)

    async def _call(self, context: Any, serve: Callable[[Stream], Awaitable[FedSEAError | None]]) -> None:
        """One call: a stream that is in the server's list while it lasts."""
        stream = Stream(
            context, self.table.limits.frame_bytes, self._codec, self._tap() if self._tap is not None else None
        )
        self.ledger.keep(stream, Kept(Pool.BUFFERS, stream.client, lambda: stream.held))
        try:
            with self._counter.counted(stream.client):
                self._streams.add(stream)
                refusal = await serve(stream)
                # Not within an `except`: gRPC keeps what ends a call, and with it would keep a failed step's tensors.
                if refusal is not None:
                    await stream.refuse(refusal)
                return
        except FedSEAError as error:
            refused = error.with_traceback(None)
        finally:
            self._streams.discard(stream)
            self.ledger.release(stream)
        log_refusal(stream, "stream", "-", refused)
        await stream.refuse(refused)

    async def _serve_session(self, stream: Stream) -> FedSEAError | None:
        """OPEN, then steps until CLOSE, an error (which is returned), or the loss of the connection."""
        session: Session | None = None

        async def steps() -> None:
            nonlocal session
            session = await self._open(stream)
            if session is None:
                return
            # What the session's lost connection has left in the worker comes first: it moves the cache and the step.
            owner = Owner(session.client, f"session {session.name}")
            await self.scheduler.settled(owner)
            log.info("session opened session=%s client=%s step=%d", short(session), stream.client, session.step)
            await stream.write(encode(Message(Kind.OPENED, self._opened(session).to_body())))
            while (frame := await stream.read()) is not None:
                if isinstance(frame, Message) and frame.kind is Kind.CLOSE:
                    self._close(session, "closed")
                    return
                if not isinstance(frame, Step):
                    raise ProtocolError("a step or CLOSE was expected")
                self.table.admit(session, frame)
                await stream.write(await self.scheduler.run(owner, self._work(session, frame)))
            # The stream ended without CLOSE (a killed client looks like this too): the session may be taken up again.
            self._lose(stream, session)

        return await self._guarded(
            stream, steps, lambda: self._lose(stream, session), lambda error: self._end(stream, session, error)
        )

    async def _serve_run(self, stream: Stream) -> FedSEAError | None:
        """OPEN, then operations until CLOSE, an error (which is returned), or the loss of the connection."""
        run: Run | None = None

        async def operations() -> None:
            nonlocal run
            wish = await self._read_open(stream, Attach.from_body)
            if wish is None:
                return
            table = self.runs if wish.token is None else self.rounds
            run, new = table.attach(wish, stream.client, self.num_layers, stream.end)
            self.ledger.keep(stream, run.adapter)
            trainer = await self._trainer(run)
            log.info("run %s run=%s client=%s", "begun" if new else "taken up", run.name, stream.client)
            limits, member_of = self.table.limits, self.rounds.of(run)
            attached = Attached(
                new,
                run.number,
                run.version,
                limits.frame_bytes,
                limits.run_micro_batches,
                shared=member_of is not None and member_of.weighs(run),
            )
            await stream.write(encode(Message(Kind.OPENED, attached.to_body())))
            room = partial(self.ledger.room, Pool.BUFFERS, stream.client)
            async with RunStream(
                stream, received=wish.received, room=room, knows=trainer.knows, count=run.count
            ) as frames:
                for number, answer in list(run.replies.items()):
                    if number > wish.received and answer is not None:
                        await frames.write(number, answer)
                while (item := await frames.read()) is not None:
                    frame, received = item
                    if stream.reason is not None:
                        raise stream.reason  # another stream has the run now, and does what is to be done
                    if isinstance(frame, Message) and frame.kind is Kind.CLOSE:
                        self.runs.close(run)
                        log.info("run ended run=%s client=%s reason=closed", run.name, stream.client)
                        return
                    if not isinstance(frame, Forward | Backward | Command | Tensors):
                        raise ProtocolError("an operation or CLOSE was expected")
                    self.runs.admit(run, frame, received)
                    answer = (
                        await member_of.do(run, frame)
                        if member_of is not None
                        else await self.scheduler.run(run.owner, partial(self.runs.do, run, frame))
                    )
                    await frames.write(frame.number, answer)
                    del frame, item, answer
            self._leave(stream, run)

        def refuse(error: FedSEAError) -> None:
            name = run.name if run is not None else "-"
            log_refusal(stream, "run", name, error)
            self._leave(stream, run)

        return await self._guarded(stream, operations, lambda: self._leave(stream, run), refuse)

    async def _guarded(
        self,
        stream: Stream,
        serve: Callable[[], Awaitable[None]],
        lose: Callable[[], None],
        end: Callable[[FedSEAError], None],
    ) -> FedSEAError | None:
        """Serve a stream, whatever happens; returns the error that its client is to be told, if any."""

        def refusal(error: FedSEAError) -> FedSEAError:
            end(error)
            return error

        try:
            await serve()
        except FedSEAError as error:
            return refusal(error.with_traceback(None))
        except asyncio.CancelledError:
            if stream.reason is None:
                lose()
                raise
            return refusal(stream.reason)
        except grpc.aio.InternalError:
            lose()
        except torch.OutOfMemoryError:
            return refusal(LimitExceededError("the server's device is out of memory; try a shorter text or later"))
        except Exception:
            log.exception("a step failed client=%s", stream.client)
            return refusal(ServerError("the server failed at this step; its log says why"))
        return None

    async def _serve_coordinator(self, stream: Stream) -> FedSEAError | None:
        """OPEN, then commands until the stream ends or an error (which is returned)."""
        description = ServerDescription(self.fingerprint, self.middle.layers, self.num_layers)

        async def commands() -> None:
            if self._stopping:
                raise ServerUnavailableError("the block server is stopping")
            await coordinate(stream, self.rounds, description)

        def refuse(error: FedSEAError) -> None:
            log_refusal(stream, "coordinator", stream.client, error)

        return await self._guarded(stream, commands, lambda: None, refuse)

    def _report_straggler(self, opened: Round, member: Member) -> None:
        log.warning("going on without round=%s client=%s state=%s", opened.plan.label, member.seat.client, member.state)

    def _work(self, session: Session, step: Step) -> Any:
        return lambda: encode(self.table.run(session, step))

    async def _read_open(self, stream: Stream, read: Callable[[dict[str, Any]], Wish]) -> Wish | None:
        """What the stream's OPEN asks for, of this model; None if it asks for nothing."""
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                frame = await stream.read()
        except TimeoutError:
            raise ProtocolError(f"no OPEN came within {OPEN_SECONDS:g} s") from None
        if frame is None:
            return None
        if not isinstance(frame, Message) or frame.kind is not Kind.OPEN:
            raise ProtocolError("a stream begins with OPEN")
        if stream.client == COORDINATOR:
            raise CredentialsError("a coordinator's certificate opens rounds; sessions and runs are for clients")
        wish = read(frame.body)
        if self._stopping:
            raise ServerUnavailableError("the block server is stopping")
        different = self.fingerprint.mismatches(wish.fingerprint)
        if different:
            raise ModelMismatchError(
                f"client and server hold different models: {', '.join(different[:4])}"
                f"{' and more' if len(different) > 4 else ''} differ; load the same checkpoint on both sides"
            )
        return wish

    async def _open(self, stream: Stream) -> Session | None:
        """The session that the stream asks for; None if it asks for nothing."""
        wish = await self._read_open(stream, Open.from_body)
        if wish is None:
            return None
        layers, dtype = wish.partition.middle(self.num_layers), wire_dtype(wish.wire_dtype)
        run = self.runs.find(wish.run, stream.client) if wish.run is not None else None
        adapted = None
        if run is not None:
            self.ledger.keep(stream, run.adapter)
            adapted = await self._trainer(run)
        check_cut(wish.narrow, adapted)
        if wish.resume is not None:
            session = self.table.attach(wish.resume, stream.client, layers, dtype, stream.end)
            if session is not None:
                return session
        if run is not None and run.state is State.ENDED:
            raise RunLostError(f"the run {run.name!r} has ended")
        return self.table.open(stream.client, layers, dtype, stream.end, adapted)

    async def _trainer(self, run: Run) -> Trainer:
        """A run's, built in the worker if it is not there; a run that cannot be built ends."""
        try:
            return await self.scheduler.run(run.owner, lambda: run.trainer)
        except Exception:
            if run.built is None:
                self.runs.close(run)
            raise

    def _opened(self, session: Session) -> Opened:
        held, limits = self.middle.layers, self.table.limits
        return Opened(
            session.name,
            session.step,
            min(self.table.max_tokens, limits.session_tokens),
            limits.frame_bytes,
            (held.start, held.stop),
        )

    def _close(self, session: Session, reason: str) -> None:
        if session.state is not State.ENDED:
            self.table.close(session)
            log.info("session ended session=%s client=%s reason=%s", short(session), session.client, reason)

    def _lose(self, stream: Stream, session: Session | None) -> None:
        if session is not None and session.end == stream.end and session.state is State.ATTACHED:
            self.table.detach(session)
            log.info("connection lost session=%s client=%s", short(session), session.client)

    def _end(self, stream: Stream, session: Session | None, error: FedSEAError) -> None:
        """A stream is refused: its session ends, unless another stream has taken it up."""
        log_refusal(stream, "session", short(session), error)
        if session is not None and session.end == stream.end:
            self._close(session, error.code)

    def _end_through(self, run: Run) -> None:
        """A run has ended, and so do the sessions that go through its adapter: they would hold it."""
        for session in self.table.through(run.built):
            session.end(RunLostError(f"the run {run.name!r} has ended, and with it the sessions through its adapter"))
            self._close(session, "run ended")

    def _leave(self, stream: Stream, run: Run | None) -> None:
        """A run's stream is over, for whatever reason: the run stays, unless another stream has taken it up."""
        if run is not None and run.end == stream.end and run.state is State.ATTACHED:
            self.runs.detach(run)
            log.info("run left run=%s client=%s", run.name, run.client)


def short(session: Session | None) -> str:
    """What the log calls a session: enough to tell two apart, too little to resume one."""
    return hashlib.sha256(session.name.encode()).hexdigest()[:8] if session else "-"
