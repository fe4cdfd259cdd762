"""The block server: the gRPC service around what it holds, and its life from start to SIGTERM."""

import asyncio
import contextlib
import datetime
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import torch
from grpc_health.v1 import health_pb2_grpc

from fedsea.checkpoints import Checkpoint
from fedsea.errors import FedSEAError, LimitExceededError, ServerError, ServerUnavailableError, UsageError
from fedsea.process import raise_file_limit
from fedsea.server.coordinator_stream import CoordinatorStream
from fedsea.server.health import Health
from fedsea.server.ledger import Kept, Pool
from fedsea.server.run_stream import RunStream
from fedsea.server.scheduler import spare_the_collector
from fedsea.server.served_stream import ServedStream
from fedsea.server.session_stream import SessionStream
from fedsea.server.state import ServerOptions, ServerState
from fedsea.server.stream import Stream, StreamCounter
from fedsea.wire import contract
from fedsea.wire.address import check_listen, format_address
from fedsea.wire.credentials import server_credentials

log = logging.getLogger("fedsea.server")
SWEEP_SECONDS = 1.0
HANDSHAKE_MS = 10_000  # a connection that has not done its TLS handshake by then is closed; gRPC's own is two minutes
STOP_SECONDS = 5.0  # for the clients to take note that the server stops
Serves = Callable[[ServerState, Stream], ServedStream[Any]]
KINDS: dict[str, Serves] = {
    contract.SESSION: SessionStream,
    contract.RUN: RunStream,
    contract.COORDINATE: CoordinatorStream,
}


class BlockServer:
    """A server for the middle blocks of one model: `start` binds and begins to serve, `wait` waits for `stop`.

    Parameters
    ----------
    checkpoint
        The model's; its weights are loaded at once, so that a health check says SERVING only after.
    options
        Where and how it is served.
    tap
        Called for each new stream; gives what takes its frames (`Stream`'s `on_frame`). For audits: what a curious
        provider would keep.

    Attributes
    ----------
    host, port
        Where it listens.
    middle, sessions, runs, rounds, ledger
        What it holds (`ServerState`).
    streams
        Those that are open.

    Raises
    ------
    UsageError
        If it is to listen without certificates on an address that other machines reach.
    ModelNotFoundError, PartitionError
        If the checkpoint does not have the layers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: ServerOptions,
        tap: Callable[[], Callable[[bool, bytes], None]] | None = None,
    ) -> None:
        self.options, self._tap = options, tap
        self.host, self.port = check_listen(options.listen, plaintext=options.credentials is None)
        self.state = state = ServerState(checkpoint, options)
        self.middle, self.sessions, self.runs = state.middle, state.sessions, state.runs
        self.rounds, self.ledger = state.rounds, state.ledger
        self.streams: set[Stream] = set()
        self._server: grpc.aio.Server | None = None
        self._warned_on: datetime.date | None = None
        # A stream may wait for its OPEN, or for a client that does not read: those must not pile up either.
        self._counter = StreamCounter(2 * state.limits.client_sessions)
        self._health = Health(self._counter)
        self._done = asyncio.Event()

    async def start(self) -> str:
        """Bind and serve; returns the address. UsageError if it is taken or is not this machine's."""
        raise_file_limit()
        spare_the_collector()
        self._warn_of_end()
        settings = [
            *contract.channel_options(self.state.limits.frame_bytes + 4096),
            ("grpc.so_reuseport", 0),  # without this, a second server on the port would silently share it
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            # Of one connection; more than a client may have: one with too many gets an error, and does not wait.
            ("grpc.max_concurrent_streams", self._counter.allowed + 16),
        ]
        server = grpc.aio.server(options=settings)
        handlers = {
            name: grpc.stream_stream_rpc_method_handler(partial(self._serve, kind)) for name, kind in KINDS.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(contract.SERVICE, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        address, credentials = format_address(self.host, self.port), self.options.credentials
        try:
            if credentials is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, server_credentials(credentials))
        except RuntimeError as error:
            listen = self.options.listen
            raise UsageError(f"cannot listen on {listen}: the address is taken or not this machine's") from error
        await server.start()
        self._server = server
        self._sweeper = asyncio.create_task(self._sweep())
        return format_address(self.host, self.port)

    async def wait(self) -> None:
        await self._done.wait()

    async def stop(self) -> None:
        """Tell the sessions and runs, let the running step finish, and stop."""
        if self.state.stopping or self._server is None:
            return
        self.state.stopping = True
        self._health.stop()
        self._sweeper.cancel()
        for stream in list(self.streams):
            stream.end(ServerUnavailableError("the block server is stopping"))
        await self._server.stop(grace=STOP_SECONDS)
        await self.state.scheduler.shutdown()
        await self.state.codec.shutdown()
        self._done.set()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self._warn_of_end()
            self.state.expire()  # apart: a name in here would hold the last run that ended until another one does

    def _warn_of_end(self) -> None:
        """Once a day, if the certificate ends soon."""
        today = datetime.datetime.now(datetime.UTC).date()
        if self.options.credentials is not None and self._warned_on != today:
            self._warned_on = today
            if (warning := self.options.credentials.ends_soon()) is not None:
                log.warning(warning)

    async def _serve(self, kind: Serves, _requests: Any, context: Any) -> None:
        """One call, whatever happens in it; where it is refused, its client gets the reason."""
        state, refusal = self.state, None
        stream = Stream(context, state.limits.frame_bytes, state.codec, self._tap() if self._tap is not None else None)
        served = kind(state, stream)
        with contextlib.ExitStack() as until_its_end:
            state.ledger.keep(stream, Kept(Pool.BUFFERS, stream.client, lambda: stream.held))
            until_its_end.callback(state.ledger.release, stream)
            try:
                until_its_end.enter_context(self._counter.counted(stream.client))
                self.streams.add(stream)
                until_its_end.callback(self.streams.discard, stream)
                await served.serve()
            except grpc.aio.InternalError:
                served.lose()
            except asyncio.CancelledError:
                if stream.reason is None:
                    served.lose()
                    raise
                refusal = stream.reason
            except Exception as error:
                refusal = _refusal_for(error, stream)
            if refusal is not None:
                served.end(refusal)
                # Not within an `except`, and without what was served: gRPC keeps what ends a call, and with it would
                # keep a failed step's tensors.
                del served
                await stream.refuse(refusal)


def _refusal_for(error: Exception, stream: Stream) -> FedSEAError:
    """The error that the client gets for a failure."""
    if isinstance(error, FedSEAError):
        return error.with_traceback(None)
    if isinstance(error, torch.OutOfMemoryError):
        return LimitExceededError("the server's device is out of memory; try a shorter text or later")
    log.error("a step failed client=%s", stream.client, exc_info=error)
    return ServerError("the server failed at this step; its log says why")
