"""What delays and limits the bytes of a `Link`.

What comes in at one end of a `Pipe` is stamped with the moment at which a network would deliver it, and waits until
then. Reading goes on meanwhile, so a delay costs no bandwidth.
"""

import asyncio
from collections import deque
from collections.abc import Callable

_READ_BYTES = 65536
# What a pipe holds beyond the link's own content, so that a reader paused and resumed never leaves the link idle.
_SLACK_BYTES = 256 * 1024
# Without a rate, what a pipe holds at most: with a delay of d seconds, its bandwidth ends at this / d.
_UNLIMITED_BYTES = 64 * 1024 * 1024
# By how much a timer of the operating system may be late: the loop wakes that much earlier, and polls the rest.
_TIMER_LATENESS = 0.0004


class Lane:
    """One direction of the link, shared by all connections.

    Parameters
    ----------
    delay
        One way, in seconds.
    rate
        In bytes per second of TCP payload; None for no limit.
    """

    def __init__(self, delay: float, rate: float | None) -> None:
        self.delay = delay
        self.total_bytes = 0
        self.paused = False
        self._seconds_per_byte = 1 / rate if rate else 0.0
        self._free_at = 0.0
        # A piece is delivered once its last byte is through: pieces of one millisecond keep that fine-grained.
        self.read_bytes = min(_READ_BYTES, max(1500, int(rate / 1000))) if rate else _READ_BYTES
        self.capacity = int(rate * delay) + min(_SLACK_BYTES, 50 * self.read_bytes) if rate else _UNLIMITED_BYTES

    def due(self, now: float, size: int) -> float:
        """When `size` bytes that enter at `now` have left the link: after what is before them, and the delay."""
        self.total_bytes += size
        self._free_at = max(self._free_at, now) + size * self._seconds_per_byte
        return self._free_at + self.delay


class Pipe:
    """One direction of one connection, from `source` to `sink`. None in its queue is the end of the stream."""

    def __init__(self, lane: Lane, on_end: Callable[["Pipe"], None]) -> None:
        self.source: asyncio.Transport | None = None
        self.sink: asyncio.Transport | None = None
        self.finished = False
        self._lane = lane
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[float, bytes | None]] = deque()
        self._queued = 0
        self._timer: asyncio.Handle | None = None
        self._ended = False
        self._sink_full = False
        self._source_paused = False

    def put(self, data: bytes) -> None:
        self._queue.append((self._lane.due(self._loop.time(), len(data)), data))
        self._queued += len(data)
        if self._queued > self._lane.capacity and self.source and not self._source_paused:
            self._source_paused = True
            self.source.pause_reading()
        self._wake()

    def end(self) -> None:
        """Let the stream end behind what is under way."""
        if not self._ended:
            self._ended = True
            self._queue.append((self._lane.due(self._loop.time(), 0), None))
            self._wake()

    def deliver(self) -> None:
        """Hand on what is due, and set a timer for what is not."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue and not self._sink_full and not self._lane.paused:
            due, data = self._queue[0]
            if due > self._loop.time():
                self._timer = self._wait(due)
                break
            self._queue.popleft()
            if data is None:
                self.finished = True
                self._on_end(self)
            else:
                self._queued -= len(data)
                if self.sink and not self.sink.is_closing():
                    self.sink.write(data)
        if self._source_paused and self._queued <= self._lane.capacity:
            self._source_paused = False
            if self.source and not self.source.is_closing():
                self.source.resume_reading()

    def set_full(self, full: bool) -> None:
        """Stop handing on while the receiver takes no more; go on when it does."""
        self._sink_full = full
        if not full:
            self.deliver()

    def drop(self) -> None:
        """Forget what is under way."""
        self._queue.clear()
        self._queued = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, due: float) -> asyncio.Handle:
        # Only the end of a burst is worth polling for: it is what a receiver waits for, and pieces before it that are
        # late do not make it later.
        early = _TIMER_LATENESS if self._queue[-1][0] - due < _TIMER_LATENESS else 0.0
        if due - self._loop.time() <= early:
            return self._loop.call_soon(self.deliver)
        return self._loop.call_at(due - early, self.deliver)

    def _wake(self) -> None:
        if self._timer is None:
            self.deliver()
