"""A TCP link with the delay and the bandwidth of a network, on one machine: what benches and tests measure over.

It stands between a client and a server on loopback, delays each byte, limits the rate, counts what passes, and breaks
on request. It needs no privileges and no kernel support. It runs in a process of its own, so that it does not disturb
the timing of the one that measures.
"""

import asyncio
import contextlib
import json
import selectors
import socket
import struct
import sys
import tempfile
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedsea.errors import UsageError
from fedsea.process import Child
from fedsea.wire.address import format_address, parse_address

RTT_SECONDS, LINK_MBIT = 0.020, 100.0  # of the slow link that benches measure over
ANSWER_SECONDS = 60.0
_READ_BYTES = 65536
# What a direction holds beyond the link's own content, so that a reader paused and resumed never leaves the link idle.
_SLACK_BYTES = 256 * 1024
# Without a rate, what a direction holds at most: with a delay of d seconds, its bandwidth ends at this / d.
_UNLIMITED_BYTES = 64 * 1024 * 1024
# By how much a timer of the operating system may be late: the relay wakes that much earlier, and polls the rest.
_TIMER_LATENESS = 0.0004

_REQUESTS = ("listen", "refuse", "cut", "pause", "resume", "counters", "reset_counters")  # methods of `Relay`


@dataclass(frozen=True)
class LinkCounters:
    bytes_up: int  # TCP payload that entered the link towards the target
    bytes_down: int  # and from it
    accepted: int  # connections
    connections: int  # that are open now


class Link(AbstractContextManager["Link"]):
    """A link in a process of its own; a context manager. The process ends with this one, however that ends.

    Parameters
    ----------
    target
        Address that connections are relayed to.
    delay_ms
        One-way delay in milliseconds, which opening a connection takes twice; the relay itself adds some tenths.
    rate_mbit
        Bandwidth of each direction in Mbit/s of TCP payload, shared by all connections; None for no limit.

    Attributes
    ----------
    address
        Where to connect to instead of `target`.

    Raises
    ------
    UsageError
        If the address, the delay or the rate cannot be used.
    FedSEAError
        From every method, if the process has ended.
    """

    def __init__(self, target: str, *, delay_ms: float = 0.0, rate_mbit: float | None = None) -> None:
        parse_address(target)
        if not 0 <= delay_ms < float("inf"):
            raise UsageError(f"a link's delay is 0 ms or more; got {delay_ms}")
        if rate_mbit is not None and not 0 < rate_mbit < float("inf"):
            raise UsageError(f"a link's rate is more than 0 Mbit/s; got {rate_mbit}")
        rate = None if rate_mbit is None else rate_mbit * 1e6 / 8
        self._folder = tempfile.TemporaryDirectory(prefix="fedsea-link-")
        settings = json.dumps({"target": target, "delay": delay_ms / 1000, "rate": rate})
        self._process = Child("fedsea_bench.link", [], Path(self._folder.name) / "log", stdin=settings)
        try:
            self.address = str(self._process.answer(ANSWER_SECONDS)["result"])
        except BaseException:
            self.close()
            raise

    def counters(self) -> LinkCounters:
        """What has passed since the start, or since `reset_counters`."""
        return LinkCounters(**self._ask("counters"))

    def reset_counters(self) -> None:
        """Count from zero again. Open connections stay counted."""
        self._ask("reset_counters")

    def cut(self) -> None:
        """Reset all connections now; what was under way is lost. New connections are still accepted."""
        self._ask("cut")

    def refuse(self, refused: bool = True) -> None:
        """Refuse new connections, or accept them again at the same address. Open connections stay."""
        self._ask("refuse" if refused else "listen")

    def pause(self) -> None:
        """Deliver nothing more, and close nothing: a network that has gone silent."""
        self._ask("pause")

    def resume(self) -> None:
        """Deliver what was held back since `pause`, and all that follows."""
        self._ask("resume")

    def close(self) -> None:
        """Reset all connections and stop. Safe to call twice."""
        if self._process.running:
            with contextlib.suppress(Exception):  # the process is killed below
                self._ask("close")
        self._process.stop()
        self._folder.cleanup()

    @property
    def bytes_up(self) -> int:
        return self.counters().bytes_up

    @property
    def bytes_down(self) -> int:
        return self.counters().bytes_down

    @property
    def connections(self) -> int:
        return self.counters().connections

    def __exit__(self, *_what: object) -> None:
        self.close()

    def _ask(self, request: str) -> Any:
        self._process.tell(request)
        return self._process.answer(ANSWER_SECONDS)["result"]


def slow(target: str) -> Link:
    return Link(target, delay_ms=1000 * RTT_SECONDS / 2, rate_mbit=LINK_MBIT)


class LinkDirection:
    """One direction of the link, shared by all connections; `delay` in seconds, `rate` in bytes per second."""

    def __init__(self, delay: float, rate: float | None) -> None:
        self.delay = delay
        self.total_bytes = 0
        self.flows = asyncio.Event()  # unless the link is paused
        self.flows.set()
        self._seconds_per_byte = 1 / rate if rate else 0.0
        self._free_at = 0.0
        # A piece is delivered once its last byte is through: pieces of one millisecond keep that fine-grained.
        self.read_bytes = min(_READ_BYTES, max(1500, int(rate / 1000))) if rate else _READ_BYTES
        self.capacity = int(rate * delay) + min(_SLACK_BYTES, 50 * self.read_bytes) if rate else _UNLIMITED_BYTES

    def due(self, size: int) -> float:
        """When `size` bytes that enter now have left the link: after what is before them, and the delay."""
        self.total_bytes += size
        self._free_at = max(self._free_at, asyncio.get_running_loop().time()) + size * self._seconds_per_byte
        return self._free_at + self.delay


class _Stream:
    """One direction of one connection. In its queue, b"" is the end of the stream, and None that it was reset."""

    def __init__(self, direction: LinkDirection, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        self._direction, self._source, self._sink = direction, source, sink
        self._queue: deque[tuple[float, bytes | None]] = deque()
        self._held = 0
        self._changed = asyncio.Event()

    async def carry(self) -> bool:
        """Relay until the stream has ended; False if it was reset at either end."""
        reading = asyncio.create_task(self._read())
        try:
            return await self._deliver()
        except OSError:
            return False
        finally:
            reading.cancel()

    async def _read(self) -> None:
        data: bytes | None = b"first"
        while data:
            try:
                data = await self._source.read(self._direction.read_bytes)
            except OSError:
                data = None
            self._queue.append((self._direction.due(len(data or b"")), data))
            self._held += len(data or b"")
            self._changed.set()
            # Reading goes on while pieces wait for their time, so a delay costs no bandwidth.
            while self._held > self._direction.capacity:
                await self._change()

    async def _deliver(self) -> bool:
        while True:
            while not self._queue:
                await self._change()
            await self._wait_for(self._queue[0][0])
            await self._direction.flows.wait()
            _due, data = self._queue.popleft()
            if not data:
                if data is None:
                    _reset(self._sink)
                elif not self._sink.is_closing():
                    self._sink.write_eof()
                return data is not None
            self._held -= len(data)
            self._changed.set()
            self._sink.write(data)
            await self._sink.drain()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _wait_for(self, due: float) -> None:
        time = asyncio.get_running_loop().time
        # Only the end of a burst is worth polling for: it is what a receiver waits for, and pieces before it that are
        # late do not make it later.
        early = _TIMER_LATENESS if self._queue[-1][0] - due < _TIMER_LATENESS else 0.0
        if due - early > time():
            await asyncio.sleep(due - early - time())
        while due > time():
            await asyncio.sleep(0)


class Relay:
    """The link's side of its process: it accepts connections, opens those to the target, and passes on how they end."""

    def __init__(self, target: str, delay: float, rate: float | None) -> None:
        self._target = parse_address(target)
        self._up, self._down = LinkDirection(delay, rate), LinkDirection(delay, rate)
        self._connections: set[asyncio.Task[Any]] = set()
        self._accepted = 0
        # Bound and never listening: it keeps the port ours while new connections are refused.
        self._holder = _bound_socket(0)
        self._port: int = self._holder.getsockname()[1]
        self._server: asyncio.Server | None = None

    async def listen(self) -> str:
        if self._server is None:
            sock, limit = _bound_socket(self._port), self._up.read_bytes
            self._server = await asyncio.start_server(self._relay, sock=sock, limit=limit)
        return format_address("127.0.0.1", self._port)

    async def refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def cut(self) -> None:
        while self._connections:
            for connection in tuple(self._connections):
                connection.cancel()
            await asyncio.wait(tuple(self._connections))

    async def pause(self) -> None:
        self._up.flows.clear()
        self._down.flows.clear()

    async def resume(self) -> None:
        self._up.flows.set()
        self._down.flows.set()

    async def counters(self) -> dict[str, int]:
        found = LinkCounters(self._up.total_bytes, self._down.total_bytes, self._accepted, len(self._connections))
        return asdict(found)

    async def reset_counters(self) -> None:
        self._up.total_bytes = self._down.total_bytes = self._accepted = 0

    async def _relay(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self._accepted += 1
        ends, well = [client], False
        try:
            # TCP's own handshake takes a round trip; the local accept has hidden it.
            await asyncio.sleep(self._up.delay + self._down.delay)
            target_reader, target = await asyncio.open_connection(*self._target, limit=self._down.read_bytes)
            ends.append(target)
            up, down = _Stream(self._up, client_reader, target), _Stream(self._down, target_reader, client)
            well = all(await asyncio.gather(up.carry(), down.carry()))
        except (OSError, asyncio.CancelledError):  # the target cannot be reached; the link is cut
            pass
        finally:
            self._connections.discard(task)
            for end in ends:
                end.close() if well else _reset(end)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close at once, so that the peer gets a connection reset."""
    with contextlib.suppress(OSError):  # the peer may have reset it first
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def _bound_socket(port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound


async def _serve() -> None:
    """Run a link as its standard input says: settings, then a request a line; each is answered with a line of JSON."""
    relay = Relay(**json.loads(sys.stdin.readline()))
    print(json.dumps({"result": await relay.listen()}), flush=True)
    while (request := (await asyncio.to_thread(sys.stdin.readline)).strip()) in _REQUESTS:
        print(json.dumps({"result": await getattr(relay, request)()}), flush=True)
    await relay.refuse()
    await relay.cut()
    await asyncio.sleep(0)  # the transports close
    print(json.dumps({"result": None}), flush=True)


if __name__ == "__main__":
    # epoll waits in whole milliseconds, which would show in every delay; select waits in microseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(_serve())
