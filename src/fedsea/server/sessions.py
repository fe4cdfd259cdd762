"""Sessions: whose they are, what they hold, and when they end. No network and no clock of its own in here.

    open()                 attach()
      |        +-------------------------------+
      v        v                               |
    ATTACHED --+--> connection lost: DETACHED -+--> resume_seconds pass, or its client needs the room: ENDED
      |
      +--> CLOSE, an error, idle_seconds pass between two steps: ENDED

An attached session has a connection that serves it; `attach` takes it from that one if the client is already back on
another. A detached one keeps its cache for the client to come back to; it still counts against the limits, but gives
way when its own client opens a new one and is at a limit. From ENDED nothing leads back: the name is forgotten and the
cache is given up.

All of it belongs to the thread of the event loop, except `SessionTable.run`, which computes in the worker's. One step
of a session is under way at a time: `admit`, `run`, and only then the next.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch

from fedsea.errors import FedSEAError, LimitExceededError, PartitionError, ProtocolError
from fedsea.parts import MiddleBlocks, RowCache
from fedsea.parts.adapters import AdapterSpec
from fedsea.server.ledger import Kept, Ledger, Pool
from fedsea.server.limits import Limits
from fedsea.wire.frames import Result, Step, to_wire


class State(Enum):
    """Where a session is in its life."""

    ATTACHED = "attached"
    DETACHED = "detached"
    ENDED = "ended"


class Adapted(Protocol):
    """What a session needs of a run whose adapter it goes through."""

    blocks: MiddleBlocks
    spec: AdapterSpec

    @property
    def changes(self) -> int:
        """Counts up whenever the adapter changes."""


@dataclass(eq=False)
class Session:
    """One client's KV-cached conversation with the middle.

    Attributes
    ----------
    name
        Unguessable name.
    client
        Whose it is.
    layers
        The middle layers of its partition.
    step
        The last step done.
    cache
        Keys and values; None once the session has ended. A step that is being computed then keeps its own reference.
    cache_bytes
        What is set aside for the cache.
    changed
        When the state or the step last changed, in the table's clock.
    computing
        Whether a step is waiting for its turn or being computed; such a session is not idle.
    end
        Ends the connection that serves it, with a reason for the client.
    adapted
        The run whose adapter it goes through; None for the base model.
    changes
        The run's `changes` when the session's cache was begun: keys and values of older weights do not mix with newer.
    """

    name: str
    client: str
    layers: range
    wire_dtype: torch.dtype
    cache: RowCache | None
    changed: float
    end: Callable[[FedSEAError], None]
    adapted: Adapted | None = None
    state: State = State.ATTACHED
    step: int = 0
    changes: int = 0
    cache_bytes: int = 0
    computing: bool = False


class SessionTable:
    """All sessions of a server, and the limits on them.

    Parameters
    ----------
    middle
        The middle blocks that they share.
    limits
        What is allowed; `cache_bytes` must be a number here.
    max_tokens
        Tokens that a row may have: the model's positions.
    clock
        Seconds, monotonic.
    ledger
        What all tables of the server keep; None for one of its own.
    """

    def __init__(
        self,
        middle: MiddleBlocks,
        limits: Limits,
        *,
        max_tokens: int,
        dtype: torch.dtype,
        clock: Callable[[], float],
        ledger: Ledger | None = None,
    ) -> None:
        assert limits.cache_bytes is not None
        self.middle, self.limits, self.max_tokens, self.dtype, self.clock = middle, limits, max_tokens, dtype, clock
        self.ledger = ledger or Ledger(limits)
        self._sessions: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def cache_bytes(self) -> int:
        """Memory that is set aside for the sessions' caches now."""
        return self.ledger.used(Pool.CACHES)

    def open(
        self,
        client: str,
        layers: range,
        wire_dtype: torch.dtype,
        end: Callable[[FedSEAError], None],
        adapted: Adapted | None = None,
    ) -> Session:
        """A new session, ATTACHED to the connection that `end` ends; through a run's adapter if it is given.

        Raises
        ------
        PartitionError
            If the server does not hold the layers.
        LimitExceededError
            If there are too many sessions, in all or of this client.
        """
        check_layers(self.middle, layers)
        self._make_room(client)
        name = secrets.token_hex(16)
        session = Session(name, client, layers, wire_dtype, self.middle.new_cache(), self.clock(), end, adapted)
        self._sessions[name] = session
        self.ledger.keep(session, Kept(Pool.CACHES, client, lambda: session.cache_bytes))
        return session

    def _make_room(self, client: str) -> None:
        own = [session for session in self._sessions.values() if session.client == client]
        everyone, limits = len(self._sessions), self.limits
        if len(own) < limits.client_sessions and everyone < limits.sessions:
            return
        lost = [session for session in own if session.state is State.DETACHED]
        if lost:
            self.close(min(lost, key=lambda session: session.changed))
        elif len(own) >= limits.client_sessions:
            raise LimitExceededError(
                f"client {client!r} has {len(own)} sessions open, the limit of sessions per client; close one first "
                "(cache.close(), model.close() or the program that has it), or have --max-client-sessions raised"
            )
        else:
            raise LimitExceededError(
                f"the server has {everyone} sessions open, its limit (--max-sessions); try again later"
            )

    def attach(
        self,
        name: str,
        client: str,
        layers: range,
        wire_dtype: torch.dtype,
        end: Callable[[FedSEAError], None],
    ) -> Session | None:
        """Take a session up again: DETACHED, or ATTACHED to a connection not missed yet, -> ATTACHED.

        None if it has ended, or is another client's. Its last step may still be being computed.

        Raises
        ------
        ProtocolError
            If the session is of other layers or another wire dtype.
        """
        session = self._sessions.get(name)
        if session is None or session.client != client:
            return None
        if session.layers != layers or session.wire_dtype != wire_dtype:
            raise ProtocolError("a session can only be resumed with its own partition and wire dtype")
        if session.state is State.ATTACHED:
            session.end(ProtocolError("another connection has taken the session up"))
        session.state, session.changed, session.end, session.computing = State.ATTACHED, self.clock(), end, False
        return session

    def detach(self, session: Session) -> None:
        """The session's connection is lost: ATTACHED -> DETACHED, for a while."""
        if session.state is State.ATTACHED:
            session.state, session.changed = State.DETACHED, self.clock()

    def through(self, adapted: Adapted | None) -> list[Session]:
        """The sessions that go through a run's adapter."""
        return [one for one in self._sessions.values() if one.adapted is adapted is not None]

    def close(self, session: Session) -> None:
        """Any state -> ENDED: the name is forgotten, the cache given up."""
        session.state, session.cache, session.cache_bytes = State.ENDED, None, 0
        self._sessions.pop(session.name, None)
        self.ledger.release(session)

    def expire(self) -> list[Session]:
        """End the sessions whose time is up, and return them; the connections of idle ones are told."""
        now, over = self.clock(), []
        for session in list(self._sessions.values()):
            age = now - session.changed
            if session.state is State.DETACHED:
                if age > self.limits.resume_seconds:
                    over.append(session)
            elif age > self.limits.idle_seconds and not session.computing:
                session.end(LimitExceededError(f"the session was idle for {self.limits.idle_seconds:g} s, the limit"))
                over.append(session)
        for session in over:
            self.close(session)
        return over

    def admit(self, session: Session, step: Step) -> None:
        """Check that a step may be run now, and set memory aside for it.

        Raises
        ------
        ProtocolError
            If the step does not follow from the session's state.
        LimitExceededError
            If the step would make the session or the caches larger than allowed.
        """
        cache = _live(session)
        self._check(session, cache, step)
        self._reserve(session, cache, step)
        session.computing = True

    @torch.inference_mode()
    def run(self, session: Session, step: Step) -> Result:
        """Do a step that was admitted. Runs in the worker thread.

        Raises
        ------
        ProtocolError
            If the session has ended meanwhile.
        UsageError
            If the result cannot be said in the session's wire dtype.
        """
        cache = _live(session)
        if step.row_map is not None:
            cache.select(step.row_map)
        blocks = self.middle if session.adapted is None else _unchanged(session, session.adapted, step)
        hidden = step.rows.unpack(step.states.to(device=blocks.device, dtype=self.dtype))
        hidden = step.rows.pack(blocks(hidden, step.rows, cache, session.layers))
        if not session.layers:
            cache.lengths = list(step.rows.ends)
        session.step, session.changed, session.computing = step.number, self.clock(), False
        return Result(step.number, to_wire(hidden, session.wire_dtype) if step.want_result else None)

    def _check(self, session: Session, cache: RowCache, step: Step) -> None:
        rows, limits = step.rows, self.limits
        if step.number != session.step + 1:
            raise ProtocolError(f"step {step.number} came after step {session.step}; {session.step + 1} was expected")
        if step.states.dtype != session.wire_dtype:
            raise ProtocolError(f"the session's wire dtype is {session.wire_dtype}, the step has {step.states.dtype}")
        narrow = session.adapted.spec.narrow if session.adapted is not None else 0
        check_width(step.states.shape[1], narrow, self.middle.config.hidden_size)
        before = cache.lengths
        if step.row_map is not None:
            if any(row >= len(before) for row in step.row_map):
                raise ProtocolError(f"the session has {len(before)} rows, the row map names row {max(step.row_map)}")
            before = [before[row] for row in step.row_map]
        if before and len(before) != len(rows):
            raise ProtocolError(f"the session has {len(before)} rows, the step has {len(rows)}")
        for start, length in zip(rows.starts, before or [0] * len(rows), strict=True):
            if start > length:
                raise ProtocolError(f"a row holds {length} tokens, the step would go on at {start}")
        longest = rows.furthest
        if longest > self.max_tokens:
            raise LimitExceededError(
                f"a row of {longest} tokens is longer than the model's {self.max_tokens} positions"
            )
        if sum(rows.ends) > limits.session_tokens:
            raise LimitExceededError(
                f"the session would hold {sum(rows.ends)} tokens, "
                f"more than the server's limit of {limits.session_tokens} tokens a session"
            )

    def _reserve(self, session: Session, cache: RowCache, step: Step) -> None:
        per_token = self.middle.cache_bytes_per_token(self.dtype, session.layers)
        wanted = per_token * len(step.rows) * cache.capacity_for(step.rows)
        if wanted > session.cache_bytes:
            self.ledger.require(Pool.CACHES, session.client, wanted - session.cache_bytes, "the session")
        session.cache_bytes = wanted


def check_layers(middle: MiddleBlocks, layers: range) -> None:
    """Check that the server holds some layers.

    Raises
    ------
    PartitionError
        If it does not.
    """
    held = middle.layers
    if layers and not (held.start <= layers.start and layers.stop <= held.stop):
        raise PartitionError(
            f"the server holds layers {held.start}:{held.stop}, the partition's middle is {layers.start}:{layers.stop}"
        )


def check_width(width: int, narrow: int, hidden_size: int) -> None:
    """Check how many numbers a state that came has.

    Raises
    ------
    ProtocolError
        If they are not as many as the narrow cut leaves (`narrow`, 0 for none), or as the model's have.
    """
    if width != (narrow or hidden_size):
        what = f"the run's narrow cut has rank {narrow}" if narrow else f"the model's hidden size is {hidden_size}"
        raise ProtocolError(f"{what}, the states that came have {width} numbers")


def check_cut(narrow: int, adapted: Adapted | None) -> None:
    """Check that a session is cut as narrow as the run is whose adapter it goes through.

    Raises
    ------
    ProtocolError
        If it is not: client and server would mean different states.
    """
    held = adapted.spec.narrow if adapted is not None else 0
    if narrow != held:
        here = f"the run's narrow cut has rank {held}" if held else "there is no narrow cut at the server"
        raise ProtocolError(f"{here}, the session's mechanism has {f'rank {narrow}' if narrow else 'none'}")


def _unchanged(session: Session, adapted: Adapted, step: Step) -> MiddleBlocks:
    if not any(step.rows.starts):
        session.changes = adapted.changes
    elif session.changes != adapted.changes:
        raise ProtocolError("the adapter was trained since this session's text began; begin it anew")
    if adapted.blocks.training:
        adapted.blocks.eval()
    return adapted.blocks


def _live(session: Session) -> RowCache:
    if session.cache is None:
        raise ProtocolError("the session has ended")
    return session.cache
