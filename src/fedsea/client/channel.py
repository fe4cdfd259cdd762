"""A run's connection: operations out, answers in, each exactly once, whatever happens to the link.

Operations are numbered and answered in order; several may be under way. Until an answer has come the operation is kept,
and after a lost connection both sides say how far they are: the client sends again what the server has not done, the
server sends again what the client has not got. Only a server that no longer has the run ends it: `RunLostError`.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fedsea.client.connection import CLOSING_SECONDS, ConnectionLost, Endpoint
from fedsea.client.stream import ReconnectingStream, StreamSettings
from fedsea.client.traffic import Traffic
from fedsea.errors import FedSEAError, ProtocolError, RunLostError
from fedsea.parts.adapters import AdapterSpec
from fedsea.wire import contract
from fedsea.wire.frames import Command, Kind, Message, Operation, Outcome, Reply, States, Tensors
from fedsea.wire.runs import Attach, Attached


class RunChannel:
    """The operations of one run. Not for several threads at once."""

    def __init__(
        self, endpoint: Endpoint, settings: StreamSettings, adapter: AdapterSpec, name: str, traffic: Traffic
    ) -> None:
        self._settings, self._adapter, self.name = settings, adapter, name
        self._stream = ReconnectingStream(endpoint, settings, traffic, contract.RUN_PATH)
        self.pending: OrderedDict[int, Operation] = OrderedDict()  # by number: those that are not known to be done
        self._not_waited_for: set[int] = set()  # operations whose answer only matters if it is an error
        self._answers: dict[int, Reply] = {}
        self._number = self._received = 0
        self._refused = False
        self.frame_bytes = self.micro_batches = 0
        self.shared = False
        self.changes = 0  # of the adapter, by what was sent

    def open(self, *, take_up: bool, token: str | None = None) -> Attached:
        """Begin the run at the server, or `take_up` the one there; `token` is of a ticket for a federated round."""
        with self._stream.tried_once():
            if take_up:
                try:
                    return self._connect(begin=False)
                except RunLostError:
                    self._stream.drop()
            return self._connect(begin=True, token=token)

    def submit(self, make: Callable[[int], Operation], *, wait_for_reply: bool = True) -> int:
        """Send an operation, made with its number, and return the number; does not wait.

        Without `wait_for_reply` the answer only matters if it is an error: who waits next gets that.
        """
        if self._stream.closed:
            raise self._stream.closed_error()
        if self._stream.connection is None and not self.pending:
            self._keep_trying(lambda: None)
        self._number += 1
        operation = make(self._number)
        is_step = isinstance(operation, Command) and operation.body["do"] == "update"
        self.changes += is_step or isinstance(operation, Tensors)
        self.pending[self._number] = operation
        if not wait_for_reply:
            self._not_waited_for.add(self._number)
        if self._stream.connection is not None:
            self._put(operation)
        return self._number

    def answer(self, number: int) -> Reply:
        """Wait for an operation's answer; raises what the server refuses: this operation, or one before it.

        RunLostError says that the server came back without the run, ServerUnavailableError that it did not come back.
        """
        if number not in self._answers:
            self._keep_trying(lambda: self._read_until(number))
        return self._answers.pop(number)

    def call(self, make: Callable[[int], Operation]) -> Reply:
        return self.answer(self.submit(make))

    def _keep_trying(self, work: Callable[[], None]) -> None:
        """Do what needs the connection, and connect anew after each loss."""
        self._refused = False
        try:
            self._stream.keep_trying(partial(self._connect, begin=False), work)
        except BaseException:
            # Refused: what was sent behind it is not done either. The run itself goes on, from where it is.
            # Or interrupted, by Ctrl-C or a signal: gRPC has cancelled the stream, and nothing can be said on it.
            # Without a connection the server is out of reach: what was sent is kept, to be sent again.
            if self._stream.connection is not None:
                self._stream.drop()
                self.pending.clear()
                self._not_waited_for.clear()
                self._answers.clear()
                self._refused = True
            raise

    def _connect(self, *, begin: bool, token: str | None = None) -> Attached:
        ours, connection = self._settings, self._stream.connect()
        what = ours.partition, ours.fingerprint, ours.wire_name, self._adapter
        request = Attach(self.name, *what, self._received, begin, token)
        connection.send(Message(Kind.OPEN, request.to_body()))
        attached = Attached.from_body(connection.receive_opened())
        self.frame_bytes, self.micro_batches = attached.frame_bytes, attached.micro_batches
        self.shared = attached.shared
        if not self.pending:
            # Nothing of ours is under way: go on from wherever the run is.
            self._number = self._received = attached.number
        for number, operation in self.pending.items():
            if number > attached.number:
                self._put(operation)
        return attached

    def _put(self, operation: Operation) -> None:
        self._stream.live.send(replace(operation, received=self._received))

    def _read_until(self, number: int) -> None:
        while self._received < number:
            frame = self._stream.live.receive(knows=lambda _name: True)  # `read_pages` checks the names
            if not isinstance(frame, States | Outcome | Tensors):
                raise ProtocolError("the block server sent something that is no answer")
            if frame.number <= self._received:
                continue  # sent again, and not needed
            if frame.number != self._received + 1:
                raise ProtocolError(f"answer {frame.number} came after answer {self._received}")
            self._received = frame.number
            self._stream.progress += 1
            self.pending.pop(frame.number, None)
            if frame.number in self._not_waited_for:
                self._not_waited_for.discard(frame.number)
            else:
                self._answers[frame.number] = frame
        self._stream.traffic.round_trips += 1

    def settle(self) -> None:
        """Wait until everything that was sent is done; raises what `answer` does."""
        if self.pending:
            self._keep_trying(lambda: self._read_until(self._number))

    def drain(self) -> None:
        """Read what is left to read, for a moment at most: a stream is over only once all of it is read."""

        def read() -> None:
            with contextlib.suppress(ConnectionLost, FedSEAError, ValueError):  # gRPC's own, if a read was interrupted
                self._read_until(self._number)

        if self._stream.connection is not None and self.pending:
            reading = threading.Thread(target=read, daemon=True)
            reading.start()
            reading.join(CLOSING_SECONDS)

    def close(self, *, end: bool) -> None:
        """Let go of the connection; with `end`, the server gives the run up. Safe to call twice."""
        self._stream.closed = True
        if end and self._stream.connection is None and self._refused:
            # The server is there and has the run: those who wait for it there should not wait in vain.
            with contextlib.suppress(ConnectionLost, FedSEAError):
                self._connect(begin=False)
        self.abandon(end=end)

    def abandon(self, *, end: bool) -> None:
        """As `close`, but waits for nothing and connects nowhere: any thread may call it, in the middle of anything.

        The garbage collector does, and may have stopped the very thread that would have to answer.
        """
        self._stream.closed = True
        self.changes += 1  # one who takes the run up may change it
        self._stream.leave(Message(Kind.CLOSE, {}) if end else None)
