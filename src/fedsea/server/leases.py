"""Leases: what a server keeps for a client by a name, while a connection serves it and for a while after.

    add                    attach
     |        +-------------------------------+
     v        v                               |
    ATTACHED -+--> connection lost: DETACHED -+--> its time is up, or its client needs the room: ENDED
     |
     +--> closed: ENDED

An attached lease has a connection that serves it; `attach` takes it from that one if the client is already back on
another. A detached one keeps what it has for the client to come back to; it still counts against the limits, but gives
way when its own client begins a new one and is at a limit. From ENDED nothing leads back: the name is forgotten and
what it held is given up.

Names are the client's own: two clients' leases of one name are two leases, and neither client learns of the other's.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

import torch

from fedsea.checkpoints import longest_text
from fedsea.errors import FedSEAError, LimitExceededError, PartitionError, ProtocolError
from fedsea.parts import MiddleBlocks
from fedsea.server.ledger import Kept, Ledger
from fedsea.server.limits import Limits

L = TypeVar("L", bound="Lease")


class State(Enum):
    """Where a lease is in its life."""

    ATTACHED = "attached"
    DETACHED = "detached"
    ENDED = "ended"


@dataclass(eq=False, kw_only=True)
class Lease:
    """What is kept for a client under a name."""

    name: str
    client: str
    changed: float  # when it was last used or its state last changed, in the table's clock
    end: Callable[[FedSEAError], None]  # ends the connection that serves it, with a reason for the client
    state: State = State.ATTACHED
    reserved: bool = False  # it ends with something else (a round): it has no place of its client's, and never expires

    @property
    def label(self) -> str:
        """What the log calls it."""
        return self.name

    def give_up(self) -> None:
        """Drop what it holds; it has ended."""


class LeaseTable(Generic[L]):
    """All leases of a kind at the server of one model, and the limits on them, which must be settled here.

    It belongs to the thread of the event loop. `on_end` is called for each lease that ends.
    """

    kind: str  # what errors call one; with an "s" it is in the flags of `fedsea serve`
    closed_by: str  # what ends one, at its client

    def __init__(
        self,
        middle: MiddleBlocks,
        limits: Limits,
        *,
        dtype: torch.dtype,
        clock: Callable[[], float] = time.monotonic,
        ledger: Ledger | None = None,
        on_end: Callable[[L], None] = lambda _lease: None,
    ) -> None:
        self.middle, self.limits, self.dtype, self.clock = middle, limits, dtype, clock
        self.ledger, self._on_end = ledger or Ledger(limits), on_end
        self.max_tokens = longest_text(middle.config)
        self.num_layers: int = middle.config.num_hidden_layers
        self.hidden_size: int = middle.config.hidden_size
        self.device = middle.device
        self._most, self._most_of_client, self._away_seconds = self.bounds()
        self._leases: dict[tuple[str, str], L] = {}

    def bounds(self) -> tuple[int, int, float]:
        """Most leases, most of one client, and for how many seconds one is kept without its client."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[L]:
        return iter(list(self._leases.values()))  # of a copy: the worker's thread goes through them too

    # What a client's frames are checked for, against the model

    def check_layers(self, layers: range) -> None:
        """PartitionError if the server does not hold the layers."""
        held = self.middle.layers
        if layers and not (held.start <= layers.start and layers.stop <= held.stop):
            partition = f"the partition's middle is {layers.start}:{layers.stop}"
            raise PartitionError(f"the server holds layers {held.start}:{held.stop}, {partition}")

    def wrong_width(self, width: int, narrow: int) -> ProtocolError:
        """For a state of other numbers than the narrow cut leaves (0 for none), or the model's have."""
        what = f"the run's narrow cut has rank {narrow}" if narrow else f"the model's hidden size is {self.hidden_size}"
        return ProtocolError(f"{what}, the states that came have {width} numbers")

    def too_long(self, tokens: int) -> LimitExceededError:
        """For a row that is longer than the model allows."""
        return LimitExceededError(f"a row of {tokens} tokens is longer than the model's {self.max_tokens} positions")

    # How leases begin and end

    def get(self, name: str, client: str) -> L | None:
        """A client's lease; None if there is none."""
        return self._leases.get((client, name))

    def make_room(self, client: str) -> None:
        """See that a client may begin another one; where there are too many, its own that was left first gives way."""
        own = [lease for lease in self if lease.client == client and not lease.reserved]
        if len(own) < self._most_of_client and len(self) < self._most:
            return
        left = [lease for lease in own if lease.state is State.DETACHED]
        if left:
            self.close(min(left, key=lambda lease: lease.changed))
        elif len(own) >= self._most_of_client:
            raise LimitExceededError(
                f"client {client!r} has {len(own)} {self.kind}s open, the limit of {self.kind}s per client; "
                f"close one first ({self.closed_by}), or have --max-client-{self.kind}s raised"
            )
        else:
            raise LimitExceededError(
                f"the server has {len(self)} {self.kind}s open, its limit (--max-{self.kind}s); try again later"
            )

    def add(self, lease: L, *things: Kept) -> None:
        """Take a new lease in, and count what it holds. One of its client's that has the name must have ended."""
        self._leases[lease.client, lease.name] = lease
        self.ledger.keep(lease, *things)

    def take_up(self, lease: L, end: Callable[[FedSEAError], None]) -> None:
        """DETACHED, or ATTACHED to a connection that was not missed yet, -> ATTACHED to the one that `end` ends."""
        if lease.state is State.ATTACHED:
            lease.end(ProtocolError(f"another connection has taken the {self.kind} up"))
        lease.state, lease.changed, lease.end = State.ATTACHED, self.clock(), end

    def detach(self, lease: L) -> None:
        """Its connection is lost: ATTACHED -> DETACHED, for a while."""
        if lease.state is State.ATTACHED:
            lease.state, lease.changed = State.DETACHED, self.clock()

    def close(self, lease: L) -> bool:
        """Any state -> ENDED: the name is forgotten, what it held given up. Says whether it was in the table."""
        lease.state = State.ENDED
        lease.give_up()
        self.ledger.release(lease)
        if self._leases.get((lease.client, lease.name)) is not lease:
            return False
        del self._leases[lease.client, lease.name]
        self._on_end(lease)
        return True

    def expire(self) -> list[L]:
        """End those whose clients were away for too long, and return them."""
        now = self.clock()
        over = [
            lease
            for lease in self
            if lease.state is State.DETACHED and not lease.reserved and now - lease.changed > self._away_seconds
        ]
        for lease in over:
            self.close(lease)
        return over
