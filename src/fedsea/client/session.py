"""A session with the middle blocks: hidden states in, hidden states out, whatever happens to the connection.

What was sent is kept (`Journal`), noise included, so that a lost connection costs time and nothing else: the session is
taken up where the server still has it, or built anew from the journal, and the interrupted step is done again.

For the same reason a session need not stay open while nobody uses it. Where a model has many (outputs that are kept,
each with its cache), those that were used longest ago are parked: ended at the server, and built anew from the journal
when they are used again.
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsea.checkpoints import Fingerprint
from fedsea.client.connection import Connection, ConnectionLost, Endpoint
from fedsea.client.journal import Journal
from fedsea.client.patience import Patience
from fedsea.client.places import Places
from fedsea.client.traffic import Traffic
from fedsea.errors import LimitExceededError, ProtocolError, ServerUnavailableError
from fedsea.partition import Partition
from fedsea.parts import Rows
from fedsea.wire.codec import MAX_PLACES, overhead
from fedsea.wire.frames import Kind, Message, Result, Step
from fedsea.wire.handshake import Open, Opened

_USES = itertools.count(1)
CHUNK_TOKENS = 512  # of a long prompt, so that client, link and server work on different chunks at once


@dataclass(frozen=True)
class SessionSettings:
    """What all sessions of a model have in common.

    Parameters
    ----------
    reconnect_seconds
        How long a lost connection is tried again before it is an error.
    notice
        Told one line when a connection is lost and when it is back.
    run
        The run whose adapter the middle has; None for the base model.
    narrow
        Rank of that run's narrow cut; 0 if it has none.
    turn
        Tokens up to which a text is computed as a short one (`turning_point`); None where that makes no difference.
    changes
        Counts the changes of the run's adapter.
    places
        How many of the sessions are open at once.
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
        """The wire dtype's name."""
        return str(self.wire_dtype).removeprefix("torch.")


class Session:
    """One KV-cached conversation with the middle blocks. One step at a time, whichever threads use it."""

    def __init__(self, endpoint: Endpoint, settings: SessionSettings, traffic: Traffic) -> None:
        self._endpoint, self._settings, self._traffic = endpoint, settings, traffic
        self._journal = Journal(settings.width, settings.wire_dtype)
        self._connection: Connection | None = None
        self._name: str | None = None  # the server's name for it; None until OPENED came
        self._whole = True  # the server's session has all that came before the step that is under way
        self._awaits_opened = False
        self._step = 0  # the last step sent to the server's session
        self._closed = False
        self._begun = False  # whether it was ever open
        self._changes = 0  # of the adapter, before this text began
        self._using = threading.Lock()
        self.last_used = 0
        self._turned: tuple[int, ...] | None = None  # from where on each row was computed as a long text

    @property
    def width(self) -> int:
        """Numbers of a state on its way up."""
        return self._settings.width

    @property
    def run(self) -> str | None:
        """The run whose adapter the middle has; None for the base model."""
        return self._settings.run

    @property
    def is_open(self) -> bool:
        """Whether it has a place at the server."""
        return self._connection is not None

    def open(self) -> Opened:
        """Open the session and wait for the server's answer; tried once, so that a wrong address shows at once.

        Raises
        ------
        FedSEAError
            Why the server cannot be reached, or why it refuses.
        """
        try:
            self._connect(resume=None)
            return self._await_opened()
        except ConnectionLost as lost:
            self.close()
            raise self._endpoint.explain(str(lost)) from None
        except BaseException:
            self.close()
            raise

    def forward(self, states: Callable[[Rows], Tensor], rows: Rows, row_map: Sequence[int] | None = None) -> Tensor:
        """Exchange new tokens' `h_A` for their `h_B`.

        Parameters
        ----------
        states
            Gives `h_A` of some of the step's places, `[tokens, width]`, ready to leave, in the wire dtype. It is
            asked chunk by chunk, each place once: while the server works on one, the client prepares the next.
        rows
            All places of the step.
        row_map
            Applied before the step: row `i` continues what row `row_map[i]` was.

        Returns
        -------
        Tensor
            `h_B`, `[rows.total, hidden]`, in the wire dtype.

        Raises
        ------
        ServerUnavailableError
            If the connection is lost and does not come back within the bound.
        FedSEAError
            What the server refuses.
        """
        with self._using:
            self.last_used = next(_USES)
            return self._forward(states, rows, row_map)

    def _forward(self, states: Callable[[Rows], Tensor], rows: Rows, row_map: Sequence[int] | None) -> Tensor:
        if self._closed:
            raise _closed()
        if row_map is not None:
            self._journal.select(row_map)
        self._note_turn(rows, row_map)
        if not any(rows.starts):
            self._changes = self._settings.changes()
        exchange = _Exchange(self._chunks(rows), row_map)
        patience = Patience(self._settings.reconnect_seconds)
        while True:
            try:
                if self._connection is None and self._begun:
                    self._restore(exchange)
                if patience.reconnecting:
                    self._settings.notice("the connection to the block server is back; going on")
                return self._run(exchange, states)
            except ConnectionLost as lost:
                if self._closed:  # by another thread: that is no loss
                    raise _closed() from None
                self._drop()
                if patience.begin(progressed=exchange.progressed):
                    self._traffic.reconnections += 1
                    what = lost.farewell or "the connection to the block server is lost"
                    self._settings.notice(f"{what}; reconnecting")
                exchange.progressed = False
                if not patience.wait():
                    self.close()
                    why = self._endpoint.explain(str(lost))
                    bound = self._settings.reconnect_seconds
                    raise ServerUnavailableError(f"{why} (tried again for {bound:g} s)") from None
            except BaseException as error:
                if self._may_try_again(error):
                    continue
                # Refused, interrupted, or no noise to be had: the two sides may differ now, so the session is over.
                self.close()
                raise

    def _may_try_again(self, error: BaseException) -> bool:
        """Whether the server had no place for this session, and another has given its own up."""
        if not isinstance(error, LimitExceededError) or not self._awaits_opened or self._closed:
            return False
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        return self._settings.places.give_way(self)

    def park(self) -> Connection | None:
        """End the session at the server, to be built anew when it is used; None if it is in use, or has no place."""
        if not self._using.acquire(blocking=False):
            return None
        try:
            if (connection := self._leave()) is not None:
                self._name = None
            return connection
        finally:
            self._using.release()

    def sent(self, rows: Rows) -> Tensor:
        """What was sent for these places last, `[rows.total, hidden]`, in the wire dtype."""
        return self._journal.read(rows)

    def _run(self, exchange: "_Exchange", states: Callable[[Rows], Tensor]) -> Tensor:
        """Send the chunks that have no result yet; collect the results."""
        if self._connection is None:
            self._connect(resume=None)
        numbers = []
        for index in range(len(exchange.results), len(exchange.chunks)):
            chunk = exchange.chunks[index]
            if index == exchange.prepared:
                self._journal.write(chunk, states(chunk))
                exchange.prepared += 1
            row_map = None if index or exchange.map_done else exchange.row_map
            numbers.append(self._send(chunk, row_map))
            if row_map is not None:
                exchange.map_step = numbers[-1]
        if self._awaits_opened:
            self._await_opened()
        for number, chunk in zip(numbers, exchange.chunks[len(exchange.results) :], strict=True):
            result = self._result(number)
            if result is None or result.shape != (chunk.total, self._settings.hidden_size):
                raise ProtocolError("the block server answered with states of another shape")
            exchange.results.append(result)
            exchange.progressed = True
        self._traffic.round_trips += 1
        return _join(exchange.chunks, exchange.results)

    def _restore(self, exchange: "_Exchange") -> None:
        """Connect anew and bring the server to where the exchange was interrupted."""
        lost = self._name
        self._connect(resume=lost)
        opened = self._await_opened()
        self._step = opened.step
        if opened.session != lost:
            self._whole = False
            exchange.map_done = True  # the journal has moved its rows already
        elif exchange.map_step is not None and opened.step >= exchange.map_step:
            exchange.map_done = True
        # What a session that is still there did of the exchange without our knowing is done again: the frames say where
        # they start. Only moving rows twice would be wrong.
        before = exchange.chunks[len(exchange.results)].starts
        if not self._whole and any(before):
            if self._settings.run is not None and self._changes != self._settings.changes():
                raise ProtocolError("the adapter was trained since this session's text began; begin it anew")
            for chunk in [chunk for piece in self._as_computed(before) for chunk in self._chunks(piece)]:
                self._result(self._send(chunk, None, want_result=False))
        self._whole = True

    def _note_turn(self, rows: Rows, row_map: Sequence[int] | None) -> None:
        if self._settings.turn is None or rows.furthest <= self._settings.turn:
            self._turned = None
        elif self._turned is None or not any(rows.starts):
            self._turned = rows.starts
        elif row_map is not None:
            self._turned = tuple(self._turned[row] for row in row_map)

    def _as_computed(self, ends: tuple[int, ...]) -> list[Rows]:
        """All that came before these ends, in pieces that are computed as they were: as a short text or a long one."""
        turned = ends if self._turned is None else tuple(map(min, self._turned, ends))
        rest = tuple(end - start for start, end in zip(turned, ends, strict=True))
        pieces = [Rows((0,) * len(ends), turned), Rows(turned, rest, (self._settings.turn or 0) + 1)]
        return [piece for piece in pieces if piece.total]

    def _connect(self, resume: str | None) -> None:
        settings = self._settings
        self._connection = self._endpoint.stream(self._traffic)
        self._awaits_opened = self._begun = True
        settings.places.take(self)
        wish = Open(settings.partition, settings.fingerprint, settings.wire_name, resume, settings.run, settings.narrow)
        self._connection.send(Message(Kind.OPEN, wish.to_body()))

    def _await_opened(self) -> Opened:
        frame = self._live().receive()
        if not isinstance(frame, Message) or frame.kind is not Kind.OPENED:
            raise ProtocolError("the block server did not answer OPEN with OPENED")
        opened = Opened.from_body(frame.body)
        self._name, self._awaits_opened = opened.session, False
        self._endpoint.frame_bytes = opened.frame_bytes
        return opened

    def _chunks(self, rows: Rows) -> list[Rows]:
        """A step as frames that are short enough for the server."""
        tokens, limit = CHUNK_TOKENS, self._endpoint.frame_bytes
        if limit is not None:
            a_token = self._settings.hidden_size * self._settings.wire_dtype.itemsize
            tokens = max(1, min(tokens, (limit - overhead(Kind.STEP, len(rows))) // a_token))
        return rows.chunks(tokens, MAX_PLACES)

    def _send(self, rows: Rows, row_map: Sequence[int] | None, *, want_result: bool = True) -> int:
        self._step += 1
        mapping = tuple(row_map) if row_map is not None else None
        self._live().send(Step(self._step, rows, self._journal.read(rows), mapping, want_result))
        return self._step

    def _result(self, number: int) -> Tensor | None:
        frame = self._live().receive()
        if not isinstance(frame, Result) or frame.number != number:
            raise ProtocolError(f"the block server did not answer step {number} with its result")
        return frame.states

    def _live(self) -> Connection:
        if self._closed or self._connection is None:
            raise _closed()
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._endpoint.lost(self._connection)
            self._connection.close()
            self._connection = None

    def close(self, *, wait_seconds: float = 0.0) -> None:
        """End the session; the server frees its cache, which is waited for so long. Safe to call twice."""
        self._closed = True
        connection = self._leave()
        if connection is not None:
            connection.wait_until_over(wait_seconds)

    def _leave(self) -> Connection | None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close(Message(Kind.CLOSE, {}))
        return connection


@dataclass
class _Exchange:
    """How far a step, possibly in several chunks, has come."""

    chunks: list[Rows]
    row_map: Sequence[int] | None
    results: list[Tensor] = field(default_factory=list)
    prepared: int = 0  # chunks that are in the journal
    map_step: int | None = None  # the step that carried the row map to the server's session
    map_done: bool = False  # the server's session has moved its rows
    progressed: bool = False  # something came back since the last loss


def _join(chunks: list[Rows], results: list[Tensor]) -> Tensor:
    """Results of chunks, each row after row, as one tensor, row after row."""
    if len(results) == 1:
        return results[0]
    pieces = [result.split(chunk.counts) for chunk, result in zip(chunks, results, strict=True)]
    return torch.cat([of_chunk[row] for row in range(len(chunks[0])) for of_chunk in pieces])


def _closed() -> ServerUnavailableError:
    return ServerUnavailableError("the session is closed; start a new one")
