"""The ledger: what the server keeps for its clients, in bytes, by what it is kept in and by client.

Everything that outlives the frame it came with is in it: caches, adapters with their gradients and optimizers, inputs
and activations of micro-batches that wait, frames that were read ahead, answers that were not read. Sizes are read
when they are needed, so growth need not be reported. What several hold (an adapter: its run, the sessions that go
through it, the streams that serve them) is counted once, to the client it was made for, until the last of them is
released.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from fedsea.errors import LimitExceededError
from fedsea.server.limits import MIB, Limits


class Pool(Enum):
    """A kind of memory with a limit of its own; the value is what errors call it."""

    CACHES = "caches"
    ADAPTERS = "adapters"
    ACTIVATIONS = "activations"
    BUFFERS = "frames that wait"


@dataclass(eq=False)
class Kept:
    """Something that is kept for a client; `size` gives its bytes as they are now, to any thread."""

    pool: Pool
    client: str
    size: Callable[[], int]


class Ledger:
    """What is kept, and how much more may be: an amount of None is not limited, a share of None is all of it.

    Written by the thread of the event loop, and read by the worker's as well.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = {
            Pool.CACHES: limits.cache_bytes,
            Pool.ADAPTERS: limits.run_bytes,
            Pool.ACTIVATIONS: limits.graph_bytes,
            Pool.BUFFERS: limits.buffer_bytes,
        }
        self._share = 1.0 if limits.client_share is None else limits.client_share
        self._kept: dict[Pool, dict[Kept, set[object]]] = {pool: {} for pool in Pool}

    def keep(self, holder: object, *things: Kept) -> None:
        """Count things for as long as `holder` holds them."""
        for kept in things:
            self._kept[kept.pool].setdefault(kept, set()).add(holder)

    def release(self, holder: object) -> None:
        """It holds nothing any more."""
        for things in self._kept.values():
            for kept, holders in list(things.items()):
                holders.discard(holder)
                if not holders:
                    del things[kept]

    def used(self, pool: Pool, client: str | None = None) -> int:
        """Bytes that are kept in a pool, for a client or for all."""
        return sum(kept.size() for kept in list(self._kept[pool]) if client is None or kept.client == client)

    def room(self, pool: Pool, client: str) -> float:
        """Bytes that may still be kept for a client; below 0 if it has more than it may."""
        limit = self._limits[pool]
        if limit is None:
            return float("inf")
        return min(limit - self.used(pool), self._share * limit - self.used(pool, client))

    def require(self, pool: Pool, client: str, more: int, what: str) -> None:
        """LimitExceededError if `more` bytes are above the limit in all, or the part of it that one client may have."""
        limit = self._limits[pool]
        if limit is None or more <= self.room(pool, client):
            return
        needs, memory = f"{what} needs {more / MIB:.1f} MiB", f"the server's memory for {pool.value}"
        if self.used(pool) + more > limit:
            raise LimitExceededError(f"{memory} ({limit / MIB:.1f} MiB) is used up: {needs}")
        raise LimitExceededError(
            f"client {client!r} has {self.used(pool, client) / MIB:.1f} MiB of {memory}, "
            f"one client may have {self._share * limit / MIB:.1f} MiB: {needs} more"
        )


def nbytes(tensors: Mapping[str, Tensor] | None) -> int:
    """Memory of some tensors, in bytes."""
    return sum(tensor.nbytes for tensor in list((tensors or {}).values()))
