"""The asyncio side of a `Link`: it accepts connections, opens those to the target, and passes on how they end."""

import asyncio
import contextlib
import socket
import struct
from typing import cast

from fedsea.wire.address import format_address, parse_address
from fedsea_bench.lane import Lane, Pipe


class _End(asyncio.BufferedProtocol):
    """One of the two sockets of a relayed connection. A buffer of its own size sets how much is read at once."""

    def __init__(self, connection: "_Connection", outgoing: Pipe, incoming: Pipe, read_bytes: int) -> None:
        self.outgoing = outgoing
        self.incoming = incoming
        self.transport: asyncio.Transport | None = None
        self.lost = False
        self.failed = False
        self._connection = connection
        self._buffer = bytearray(read_bytes)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.outgoing.source = self.transport
        self.incoming.sink = self.transport
        self._connection.opened(self)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.outgoing.put(bytes(self._buffer[:nbytes]))

    def eof_received(self) -> bool:
        self.outgoing.end()
        # The other direction may still carry data: the connection closes once both have ended.
        return True

    def pause_writing(self) -> None:
        self.incoming.set_full(True)

    def resume_writing(self) -> None:
        self.incoming.set_full(False)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.failed = exc is not None
        self._connection.lost(self)

    def reset(self) -> None:
        """Close at once, so that the peer gets a connection reset."""
        if self.transport is None or self.lost:
            return
        with contextlib.suppress(OSError):  # the peer may have reset it first
            linger = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.transport.abort()


class _Connection:
    """A client's connection, and the one to the target that belongs to it."""

    def __init__(self, relay: "Relay") -> None:
        self._relay = relay
        up, down = Pipe(relay.up, self._ended), Pipe(relay.down, self._ended)
        self.client_end = _End(self, up, down, relay.up.read_bytes)
        self.target_end = _End(self, down, up, relay.down.read_bytes)
        self._opening: asyncio.Task[None] | None = None

    def opened(self, end: _End) -> None:
        if end is self.client_end and end.transport is not None:
            self._relay.connections.add(self)
            self._relay.accepted += 1
            end.transport.pause_reading()
            self._opening = asyncio.get_running_loop().create_task(self._open_target(end.transport))

    def deliver(self) -> None:
        self.client_end.outgoing.deliver()
        self.target_end.outgoing.deliver()

    def lost(self, end: _End) -> None:
        other = self._other(end)
        end.incoming.drop()
        if self._opening is not None:
            self._opening.cancel()
        if other.transport is None or other.lost:
            self._relay.connections.discard(self)
        elif end.outgoing.finished:
            self._close(other, failed=end.failed)
        else:
            end.outgoing.end()

    def cut(self) -> None:
        for end in (self.client_end, self.target_end):
            end.outgoing.drop()
            end.reset()

    async def _open_target(self, client: asyncio.Transport) -> None:
        relay = self._relay
        try:
            # TCP's own handshake takes a round trip; the local accept has hidden it.
            await asyncio.sleep(relay.up.delay + relay.down.delay)
            await asyncio.get_running_loop().create_connection(lambda: self.target_end, relay.host, relay.port)
        except OSError:
            self.client_end.reset()
        else:
            client.resume_reading()

    def _ended(self, pipe: Pipe) -> None:
        """Pass on the end of a stream that has gone through the link."""
        source = self.client_end if pipe is self.client_end.outgoing else self.target_end
        sink = self._other(source)
        if sink.transport is None or sink.transport.is_closing():
            return
        if source.lost:
            self._close(sink, failed=source.failed)
        elif sink.outgoing.finished:
            self._close(sink, failed=False)
            self._close(source, failed=False)
        else:
            sink.transport.write_eof()

    def _close(self, end: _End, *, failed: bool) -> None:
        if failed:
            end.reset()
        elif end.transport is not None:
            end.transport.close()

    def _other(self, end: _End) -> _End:
        return self.target_end if end is self.client_end else self.client_end


class Relay:
    """A TCP relay in the running event loop. `Link` has the documentation of what it does.

    Attributes
    ----------
    up, down
        The direction to the target, and the one from it.
    connections
        Those that are open.
    accepted
        Connections accepted since the start.
    """

    def __init__(self, target: str, delay: float, rate: float | None) -> None:
        self.host, self.port = parse_address(target)
        self.up, self.down = Lane(delay, rate), Lane(delay, rate)
        self.connections: set[_Connection] = set()
        self.accepted = 0
        # Bound and never listening: it keeps the port ours while new connections are refused.
        self._holder = _bound_socket(0)
        self._listen_port: int = self._holder.getsockname()[1]
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        return format_address("127.0.0.1", self._listen_port)

    async def listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.get_running_loop().create_server(
                lambda: _Connection(self).client_end, sock=_bound_socket(self._listen_port)
            )

    async def refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def cut(self) -> None:
        for connection in tuple(self.connections):
            connection.cut()
        while self.connections:
            await asyncio.sleep(0)

    async def set_paused(self, paused: bool) -> None:
        self.up.paused = self.down.paused = paused
        for connection in tuple(self.connections):
            connection.deliver()

    async def close(self) -> None:
        await self.refuse()
        await self.cut()
        self._holder.close()


def _bound_socket(port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound
