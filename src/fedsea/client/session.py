"""A session with the middle blocks: hidden states in, hidden states out, whatever happens to the connection.

What was sent is kept (`SentStates`), noise included, so that a lost connection costs time and nothing else: the session
is taken up where the server still has it, or built anew from that, and the interrupted step is done again.

For the same reason a session need not stay open while it is not used. Where a model has many (outputs that are kept,
each with its cache), those that were used longest ago are parked: ended at the server, and built anew from what was
sent when they are used again.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from fedsea.client.connection import Connection, Endpoint
from fedsea.client.sent import SentStates
from fedsea.client.stream import ReconnectingStream, StreamSettings
from fedsea.client.traffic import Traffic
from fedsea.errors import LimitExceededError, ProtocolError
from fedsea.parts import Rows
from fedsea.wire import contract
from fedsea.wire.codec import MAX_PLACES
from fedsea.wire.frames import Kind, Message, Result, Step
from fedsea.wire.handshake import Open, Opened

T = TypeVar("T")
_USES = itertools.count(1)
_CLOSE = Message(Kind.CLOSE, {})
CHUNK_TOKENS = 512  # of a long prompt, so that client, link and server work on different chunks at once


class Session:
    """One KV-cached conversation with the middle blocks. One step at a time, whichever threads use it."""

    def __init__(self, endpoint: Endpoint, settings: StreamSettings, traffic: Traffic) -> None:
        self.settings = settings
        self._stream = ReconnectingStream(endpoint, settings, traffic, contract.SESSION_PATH)
        self._sent = SentStates(settings.width, settings.wire_dtype)
        self._name: str | None = None  # the server's name for it; None until OPENED came
        self._whole = True  # the server's session has all that came before the step that is under way
        self._awaits_opened = False
        self._number = 0  # of the last step that was sent to the server's session
        self._step = _Step([], None)
        self._begun = False  # whether it was ever open
        self._changes = 0  # of the adapter, before this text began
        self._using = threading.Lock()
        self.last_used = 0
        self._turned: tuple[int, ...] | None = None  # from where on each row was computed as a long text

    @property
    def is_open(self) -> bool:
        """Whether it has a place at the server."""
        return self._stream.connection is not None

    def open(self) -> Opened:
        """Open the session and wait for the server's answer; tried once, so that a wrong address shows at once."""
        with self._stream.tried_once():
            self._connect(resume=None)
            return self._await_opened()

    @contextmanager
    def step(self, rows: Rows, row_map: Sequence[int] | None = None) -> Iterator[list[Rows]]:
        """Exchange new tokens' `h_A` for their `h_B`: `send` each of the chunks that this gives, then `receive`.

        While the server works on one chunk, the client prepares the next. Before the step, row `i` becomes what row
        `row_map[i]` was. An error ends the session, as the two sides may differ then: what the server refuses, or
        ServerUnavailableError if the connection is lost and does not come back within the bound.
        """
        self._stream.endpoint.require_own_process()  # before anything is computed
        with self._using:
            self.last_used = next(_USES)
            if self._stream.closed:
                raise self._stream.closed_error()
            try:
                if row_map is not None:
                    self._sent.select(row_map)
                if self.settings.turn is not None:
                    self._note_turn(self.settings.turn, rows, row_map)
                if not any(rows.starts):
                    self._changes = self.settings.changes()
                self._step = _Step(self._chunks(rows), row_map)
                if self._begun and self._stream.connection is None:
                    self._connected(lambda: None)
                yield self._step.chunks
            except BaseException:  # refused, interrupted, or no noise to be had
                self.close()
                raise

    def send(self, states: Tensor) -> None:
        """Send `h_A` of the step's next chunk, `[chunk.total, width]`, ready to leave, in the wire dtype."""
        chunk = self._step.chunks[self._step.prepared]
        self._sent.write(chunk, states)
        self._step.prepared += 1
        if not self._begun:
            self._connect(resume=None)
        self._put(chunk, states)

    def receive(self) -> Tensor:
        """Wait for the step's `h_B`, `[rows.total, hidden]`, in the wire dtype."""
        return self._connected(self._collect)

    def _connected(self, work: Callable[[], T]) -> T:
        """Do what needs the connection, and restore that after each loss."""
        while True:
            try:
                return self._stream.keep_trying(self._restore, work)
            except LimitExceededError:
                # Where the server has no place for this session, another may give its own up.
                if not self._awaits_opened or self._stream.closed:
                    raise
                self._stream.leave(None)
                if not self.settings.places.give_way(self):
                    raise

    def park(self) -> Connection | None:
        """End the session at the server, to be built anew when it is used; None if it is in use, or has no place."""
        if not self._using.acquire(blocking=False):
            return None
        try:
            if (connection := self._stream.leave(_CLOSE)) is not None:
                self._name = None
            return connection
        finally:
            self._using.release()

    def sent(self, rows: Rows) -> Tensor:
        """What was sent for these places last, `[rows.total, hidden]`, in the wire dtype."""
        return self._sent.read(rows)

    def _collect(self) -> Tensor:
        step = self._step
        if self._awaits_opened:
            self._await_opened()
        for chunk, number in zip(step.chunks[len(step.results) :], step.numbers[len(step.results) :], strict=True):
            frame = self._stream.live.receive()
            if not isinstance(frame, Result) or frame.number != number or frame.states is None:
                raise ProtocolError(f"the block server did not answer step {number} with its result")
            if frame.states.shape != (chunk.total, self.settings.hidden_size):
                raise ProtocolError("the block server answered with states of another shape")
            step.results.append(frame.states)
            self._stream.progress += 1
        self._stream.traffic.round_trips += 1
        results, step.results = step.results, []
        return _join(step.chunks, results) if len(results) > 1 else results[0]

    def _restore(self) -> None:
        """Connect anew and bring the server to where the step was interrupted."""
        lost, step = self._name, self._step
        self._connect(resume=lost)
        opened = self._await_opened()
        self._number = opened.step
        if opened.session != lost:
            self._whole = False
            step.map_done = True  # what was sent is kept with its rows moved already
        elif step.map_number is not None and opened.step >= step.map_number:
            step.map_done = True
        # What a session that is still there did of the step without our knowing is done again: the frames say where
        # they start. Only moving rows twice would be wrong.
        done = len(step.results)
        before = step.chunks[done].starts
        if not self._whole and any(before):
            if self.settings.run is not None and self._changes != self.settings.changes():
                raise ProtocolError("the adapter was trained since this session's text began; begin it anew")
            for chunk in [chunk for piece in self._as_computed(before) for chunk in self._chunks(piece)]:
                self._number += 1
                self._stream.live.send(Step(self._number, chunk, self._sent.read(chunk), None, want_result=False))
                frame = self._stream.live.receive()
                if not isinstance(frame, Result) or frame.number != self._number:
                    raise ProtocolError("the block server did not answer what was sent again")
        self._whole = True
        del step.numbers[done:]
        for chunk in step.chunks[done : step.prepared]:
            self._put(chunk, self._sent.read(chunk))

    def _note_turn(self, turn: int, rows: Rows, row_map: Sequence[int] | None) -> None:
        if rows.furthest <= turn:
            self._turned = None
        elif self._turned is None or not any(rows.starts):
            self._turned = rows.starts
        elif row_map is not None:
            self._turned = tuple(self._turned[row] for row in row_map)

    def _as_computed(self, ends: tuple[int, ...]) -> list[Rows]:
        """All that came before these ends, in pieces that are computed as they were: as a short text or a long one."""
        turned = ends if self._turned is None else tuple(map(min, self._turned, ends))
        rest = tuple(end - start for start, end in zip(turned, ends, strict=True))
        pieces = [Rows((0,) * len(ends), turned), Rows(turned, rest, (self.settings.turn or 0) + 1)]
        return [piece for piece in pieces if piece.total]

    def _connect(self, resume: str | None) -> None:
        ours = self.settings
        self._stream.connect()
        self._awaits_opened = self._begun = True
        ours.places.take(self)
        request = Open(ours.partition, ours.fingerprint, ours.wire_name, resume, ours.run, ours.narrow)
        self._stream.live.send(Message(Kind.OPEN, request.to_body()))

    def _await_opened(self) -> Opened:
        opened = Opened.from_body(self._stream.live.receive_opened())
        self._name, self._awaits_opened = opened.session, False
        self._stream.endpoint.frame_bytes = opened.frame_bytes
        return opened

    def _chunks(self, rows: Rows) -> list[Rows]:
        """A step as frames that are short enough for the server; one token of each row is the shortest there is."""
        if rows.width == 1:
            return [rows]
        tokens, limit = CHUNK_TOKENS, self._stream.endpoint.frame_bytes
        if limit is not None:
            tokens = max(1, min(tokens, self.settings.tokens_of_frame(limit, Kind.STEP, len(rows.starts))))
        return rows.chunks(tokens, MAX_PLACES)

    def _put(self, chunk: Rows, states: Tensor) -> None:
        """Put the step's next frame on its way; the first has the row map."""
        step = self._step
        row_map = None if step.map_done or step.numbers or step.results or step.row_map is None else step.row_map
        self._number += 1
        step.numbers.append(self._number)
        if row_map is not None:
            step.map_number, row_map = self._number, tuple(row_map)
        self._stream.live.send(Step(self._number, chunk, states, row_map))

    def close(self, *, wait_seconds: float = 0.0) -> None:
        """End the session, and wait at most this long until the server has freed its cache. Safe to call twice."""
        self._stream.closed = True
        connection = self._stream.leave(_CLOSE)
        if connection is not None:
            connection.wait_until_over(wait_seconds)


@dataclass
class _Step:
    """How far a step, possibly in several chunks, has come."""

    chunks: list[Rows]
    row_map: Sequence[int] | None
    numbers: list[int] = field(default_factory=list)  # under which chunks were sent
    results: list[Tensor] = field(default_factory=list)
    prepared: int = 0  # chunks whose states are kept
    map_number: int | None = None  # of the frame that carried the row map to the server's session
    map_done: bool = False  # the server's session has moved its rows


def _join(chunks: list[Rows], results: list[Tensor]) -> Tensor:
    """Results of chunks, each row after row, as one tensor, row after row."""
    pieces = [result.split(chunk.counts) for chunk, result in zip(chunks, results, strict=True)]
    return torch.cat([of_chunk[row] for row in range(len(chunks[0])) for of_chunk in pieces])
