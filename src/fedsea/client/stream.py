"""A stream to the block server that is connected anew when it is lost; a session and a run have one each."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from fedsea.checkpoints import Fingerprint
from fedsea.client.connection import Connection, ConnectionLost, Endpoint
from fedsea.client.places import Places
from fedsea.client.traffic import Traffic
from fedsea.errors import ServerUnavailableError
from fedsea.partition import Partition
from fedsea.wire.codec import overhead
from fedsea.wire.frames import Kind, Message

T = TypeVar("T")
BACKOFF_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class StreamSettings:
    """What all sessions and runs of a model have in common.

    `run` is that whose adapter the middle has, None for the base model; `narrow` the rank of its narrow cut, or 0;
    `changes` counts the changes of the adapter. Up to `turn` tokens a text is computed as a short one
    (`turning_point`). `places` bounds how many of the sessions are open at once.
    """

    partition: Partition
    fingerprint: Fingerprint
    wire_dtype: torch.dtype
    hidden_size: int
    reconnect_seconds: float
    notice: Callable[[str], None]
    run: str | None = None
    narrow: int = 0
    turn: int | None = None
    changes: Callable[[], int] = lambda: 0
    places: Places = field(default_factory=Places)

    @property
    def width(self) -> int:
        """Numbers of a state on its way up."""
        return self.narrow or self.hidden_size

    @property
    def wire_name(self) -> str:
        return str(self.wire_dtype).removeprefix("torch.")

    def tokens_of_frame(self, frame_bytes: int, kind: Kind, rows: int) -> int:
        """How many tokens a frame of the server may have, with this number of rows."""
        return (frame_bytes - overhead(kind, rows)) // (self.hidden_size * self.wire_dtype.itemsize)


class ReconnectingStream:
    """One stream of the service, again and again. What is said on it is its user's business.

    `connection` is the one that lives, None while there is none. The user counts answers in `progress`: after each, the
    time to reconnect begins anew. `closed` says whether the user is done with it.
    """

    def __init__(self, endpoint: Endpoint, settings: StreamSettings, traffic: Traffic, path: str) -> None:
        self.endpoint, self.traffic, self._path = endpoint, traffic, path
        self._seconds, self._notice = settings.reconnect_seconds, settings.notice
        self.connection: Connection | None = None
        self.progress = 0
        self.closed = False

    def connect(self) -> Connection:
        """Begin another connection. Does not wait for the server."""
        self.connection = self.endpoint.stream(self.traffic, self._path)
        return self.connection

    @property
    def live(self) -> Connection:
        """The connection; ServerUnavailableError if there is none, as the stream is closed."""
        if self.connection is None:
            raise self.closed_error()
        return self.connection

    @contextmanager
    def tried_once(self) -> Iterator[None]:
        """Connect without a second try, so that a wrong address shows at once: says why the server was not reached."""
        try:
            yield
        except ConnectionLost as lost:
            self.drop()
            raise self.endpoint.explain(str(lost)) from None

    def keep_trying(self, restore: Callable[[], object], work: Callable[[], T]) -> T:
        """Do some work on the connection; after each loss, restore it and do the work again.

        ServerUnavailableError says that it did not come back within the bound, or that the stream was closed meanwhile.
        """
        waits, before = None, self.progress
        while True:
            try:
                if self.connection is None and not self.closed:
                    restore()
                    if waits is not None:
                        self._notice("the connection to the block server is back; going on")
                return work()
            except ConnectionLost as lost:
                if self.closed:  # by another thread: that is no loss
                    raise self.closed_error() from None
                self.drop()
                if waits is None or self.progress > before:
                    waits = _back_off(self._seconds)
                    self.traffic.reconnections += 1
                    self._notice(f"{lost.end_reason or 'the connection to the block server is lost'}; reconnecting")
                before = self.progress
                if (wait := next(waits, None)) is None:
                    why = self.endpoint.explain(str(lost))
                    raise ServerUnavailableError(f"{why} (tried again for {self._seconds:g} s)") from None
                time.sleep(wait)

    def closed_error(self) -> ServerUnavailableError:
        """What is raised where a closed stream is used."""
        return ServerUnavailableError(f"the {self._path.rpartition('/')[2].lower()} is closed; start a new one")

    def drop(self) -> None:
        """Give a connection up that is lost, or on which both sides may differ."""
        if self.connection is not None:
            self.endpoint.lost(self.connection)
            self.connection.close()
            self.connection = None

    def leave(self, last: Message | None) -> Connection | None:
        """End the connection with a last message, or at once without one; returns what ends. Waits for nothing."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close(last)
        return connection


def _back_off(seconds: float) -> Iterator[float]:
    """How long to wait before each further try, within a bound that begins now."""
    deadline = time.monotonic() + seconds
    for wait in itertools.chain(BACKOFF_SECONDS, itertools.repeat(BACKOFF_SECONDS[-1])):
        if (left := deadline - time.monotonic()) <= 0:
            return
        yield min(wait, left)
