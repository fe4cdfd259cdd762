"""A stream to the block server that is connected anew when it is lost; a session and a run have one each."""

from collections.abc import Callable
from typing import TypeVar

from fedsea.client.backoff import Backoff
from fedsea.client.connection import Connection, ConnectionLost, Endpoint
from fedsea.client.traffic import Traffic
from fedsea.errors import ServerUnavailableError
from fedsea.wire import contract
from fedsea.wire.frames import Message

T = TypeVar("T")


class ReconnectingStream:
    """One stream of the service, again and again. What is said on it is its user's business.

    `connection` is the one that lives, None while there is none. The user counts answers in `progress`: after each, the
    time to reconnect begins anew. `closed` says whether the user is done with it.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        traffic: Traffic,
        *,
        seconds: float,
        notice: Callable[[str], None],
        of: str,
        path: str = contract.SESSION_PATH,
    ) -> None:
        self.endpoint, self.traffic, self._path = endpoint, traffic, path
        self._seconds, self._notice, self._of = seconds, notice, of
        self.connection: Connection | None = None
        self.progress = 0
        self.closed = False

    def connect(self) -> None:
        """Begin another connection. Does not wait for the server."""
        self.connection = self.endpoint.stream(self.traffic, self._path)

    @property
    def live(self) -> Connection:
        """The connection; ServerUnavailableError if there is none, as the stream is closed."""
        if self.connection is None:
            raise self.closed_error()
        return self.connection

    def keep_trying(self, restore: Callable[[], object], work: Callable[[], T]) -> T:
        """Do some work on the connection; after each loss, restore it and do the work again.

        ServerUnavailableError says that it did not come back within the bound, or that the stream was closed meanwhile.
        """
        backoff, before = None, self.progress
        while True:
            try:
                if self.connection is None and not self.closed:
                    restore()
                    if backoff is not None:
                        self._notice("the connection to the block server is back; going on")
                return work()
            except ConnectionLost as lost:
                if self.closed:  # by another thread: that is no loss
                    raise self.closed_error() from None
                self.drop()
                if backoff is None or self.progress > before:
                    backoff = Backoff(self._seconds)
                    self.traffic.reconnections += 1
                    self._notice(f"{lost.end_reason or 'the connection to the block server is lost'}; reconnecting")
                before = self.progress
                if not backoff.wait():
                    why = self.endpoint.explain(str(lost))
                    raise ServerUnavailableError(f"{why} (tried again for {self._seconds:g} s)") from None

    def closed_error(self) -> ServerUnavailableError:
        """What is raised where a closed stream is used."""
        return ServerUnavailableError(f"the {self._of} is closed; start a new one")

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
