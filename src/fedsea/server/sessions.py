"""Sessions: KV-cached conversations with the middle. Their life is a lease's (leases.py), with one more way to end:

    ATTACHED --> idle_seconds pass between two steps: ENDED, with the reason for its client

All of it belongs to the thread of the event loop, except `SessionTable.do`, which computes in the worker's. One step
of a session is under way at a time: `admit`, `do`, and only then the next.
"""

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from fedsea.errors import FedSEAError, LimitExceededError, ProtocolError
from fedsea.parts import BLOCK, MiddleBlocks, RowCache
from fedsea.server.leases import Lease, LeaseTable, State
from fedsea.server.ledger import Kept, Pool
from fedsea.server.scheduler import Owner
from fedsea.server.trainer import Trainer
from fedsea.wire.codec import encode
from fedsea.wire.frames import Result, Step
from fedsea.wire.tensors import to_wire


@dataclass(eq=False, kw_only=True)
class Session(Lease):
    """One client's KV-cached conversation with the middle."""

    layers: range
    wire_dtype: torch.dtype
    cache: RowCache | None  # None once it has ended; a step that is being computed then keeps its own reference
    trainer: Trainer | None = None  # of the run whose adapter it goes through; None for the base model
    step: int = 0  # the last one done
    changes: int = 0  # the adapter's, as the cache was begun: keys of older weights do not mix with newer
    cache_bytes: int = 0  # set aside for the cache
    computing: bool = False  # a step waits for its turn or is being computed: the session is not idle

    def __post_init__(self) -> None:
        self.owner = Owner(self.client, f"session {self.name}")

    @property
    def label(self) -> str:
        """Enough to tell two apart, too little to resume one."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:8]

    def give_up(self) -> None:
        """Its cache is given up."""
        self.cache, self.cache_bytes = None, 0


class SessionTable(LeaseTable[Session]):
    """All sessions of a server."""

    kind, closed_by = "session", "cache.close(), model.close() or the program that has it"

    def bounds(self) -> tuple[int, int, float]:
        return self.limits.sessions, self.limits.client_sessions, self.limits.resume_seconds

    @cached_property
    def _block_bytes(self) -> dict[int, int]:
        """Of a block of the cache, in each layer."""
        return {layer: BLOCK * count * self.dtype.itemsize for layer, count in self.middle.numbers_per_token().items()}

    def open(
        self,
        client: str,
        layers: range,
        wire_dtype: torch.dtype,
        end: Callable[[FedSEAError], None],
        trainer: Trainer | None = None,
    ) -> Session:
        """A new session, ATTACHED to the connection that `end` ends; through a run's adapter if it is given."""
        self.check_layers(layers)
        self.make_room(client)
        session = Session(
            name=secrets.token_hex(16),  # unguessable
            client=client,
            changed=self.clock(),
            end=end,
            layers=layers,
            wire_dtype=wire_dtype,
            cache=self.middle.new_cache(),
            trainer=trainer,
        )
        self.add(session, Kept(Pool.CACHES, client, lambda: session.cache_bytes))
        return session

    def attach(
        self, name: str, client: str, layers: range, wire_dtype: torch.dtype, end: Callable[[FedSEAError], None]
    ) -> Session | None:
        """Take a session up again; None if it has ended, or is another client's. Its last step may be under way."""
        session = self.get(name, client)
        if session is None:
            return None
        if session.layers != layers or session.wire_dtype != wire_dtype:
            raise ProtocolError("a session can only be resumed with its own partition and wire dtype")
        self.take_up(session, end)
        session.computing = False
        return session

    def expire(self) -> list[Session]:
        """End those that are idle, and those whose clients were away for too long; returns them."""
        now, limit = self.clock(), self.limits.idle_seconds
        idle = [
            session
            for session in self
            if session.state is State.ATTACHED and not session.computing and now - session.changed > limit
        ]
        for session in idle:
            session.end(LimitExceededError(f"the session was idle for {limit:g} s, the limit"))
            self.close(session)
        return idle + super().expire()

    def admit(self, session: Session, step: Step) -> None:
        """Check that a step follows from the session's state and fits the limits; set memory aside for it."""
        cache, rows = session.cache, step.rows
        if cache is None:
            raise ProtocolError("the session has ended")
        if step.number != session.step + 1:
            raise ProtocolError(f"step {step.number} came after step {session.step}; {session.step + 1} was expected")
        if step.states.dtype != session.wire_dtype:
            raise ProtocolError(f"the session's wire dtype is {session.wire_dtype}, the step has {step.states.dtype}")
        narrow = session.trainer.spec.narrow if session.trainer is not None else 0
        if step.states.shape[1] != (narrow or self.hidden_size):
            raise self.wrong_width(step.states.shape[1], narrow)
        _check_rows(cache.lengths, step)
        if rows.furthest > self.max_tokens:
            raise self.too_long(rows.furthest)
        if sum(rows.ends) > self.limits.session_tokens:
            most = f"the server's limit of {self.limits.session_tokens} tokens a session"
            raise LimitExceededError(f"the session would hold {sum(rows.ends)} tokens, more than {most}")
        wanted = cache.blocks_for(rows, step.row_map) * sum(self._block_bytes[layer] for layer in session.layers)
        if wanted > session.cache_bytes:
            self.ledger.require(Pool.CACHES, session.client, wanted - session.cache_bytes, "the session")
        session.cache_bytes = wanted
        session.computing = True

    @torch.inference_mode()
    def do(self, session: Session, step: Step) -> bytes:
        """Do a step that was admitted, in the worker thread; returns the result's frame.

        ProtocolError if the session has ended meanwhile, or its adapter was trained; UsageError if the result does not
        fit the session's wire dtype.
        """
        cache = session.cache
        if cache is None:
            raise ProtocolError("the session has ended")
        if step.row_map is not None:
            cache.select(step.row_map)
        blocks = self.middle if session.trainer is None else _unchanged(session, session.trainer, step)
        hidden = blocks(
            step.states.to(device=self.device, dtype=self.dtype, copy=True), step.rows, cache, session.layers
        )
        session.step, session.changed, session.computing = step.number, self.clock(), False
        return encode(Result(step.number, to_wire(hidden, session.wire_dtype) if step.want_result else None))


def check_cut(narrow: int, trainer: Trainer | None) -> None:
    """ProtocolError if a session is not cut as narrow as the run: client and server would mean different states."""
    held = trainer.spec.narrow if trainer is not None else 0
    if narrow != held:
        here = f"the run's narrow cut has rank {held}" if held else "there is no narrow cut at the server"
        raise ProtocolError(f"{here}, the session's mechanism has {f'rank {narrow}' if narrow else 'none'}")


def _check_rows(lengths: list[int], step: Step) -> None:
    rows = step.rows
    if step.row_map is not None:
        if any(row >= len(lengths) for row in step.row_map):
            raise ProtocolError(f"the session has {len(lengths)} rows, the row map names row {max(step.row_map)}")
        lengths = [lengths[row] for row in step.row_map]
    if lengths and len(lengths) != len(rows.starts):
        raise ProtocolError(f"the session has {len(lengths)} rows, the step has {len(rows)}")
    for start, length in zip(rows.starts, lengths or [0] * len(rows), strict=True):
        if start > length:
            raise ProtocolError(f"a row holds {length} tokens, the step would go on at {start}")


def _unchanged(session: Session, trainer: Trainer, step: Step) -> MiddleBlocks:
    if not any(step.rows.starts):
        session.changes = trainer.adapter.changes
    elif session.changes != trainer.adapter.changes:
        raise ProtocolError("the adapter was trained since this session's text began; begin it anew")
    if trainer.blocks.training:
        trainer.blocks.eval()
    return trainer.blocks
