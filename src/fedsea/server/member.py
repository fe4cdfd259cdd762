"""A client's place in a federated round, as the block server sees it."""

import asyncio
from dataclasses import dataclass

from fedsea.server.runs import Run
from fedsea.wire.rounds import MemberState, Seat
from fedsea.wire.run_frames import Operation


@dataclass(eq=False)
class Member:
    """A client's place in a round.

    Attributes
    ----------
    run
        What it has begun with its ticket.
    heard
        When it was last heard of, in the table's clock.
    waiting
        The operation that waits for those of the others, and where its answer goes.
    computing
        Whether its operation is being done.
    """

    seat: Seat
    heard: float
    run: Run | None = None
    finished: bool = False
    straggled: bool = False
    ended: bool = False
    waiting: "tuple[Operation, asyncio.Future[bytes]] | None" = None
    computing: bool = False

    def seconds_silent(self, now: float) -> float:
        """How long it has had an answer, or nothing to wait for, and has said nothing."""
        return 0.0 if self.computing or self.waiting is not None else now - self.heard

    @property
    def state(self) -> MemberState:
        """As the coordinator is told."""
        if self.finished:
            return "finished"
        if self.ended or (self.run is None and self.straggled):
            return "gone"
        return "joined" if self.run is not None else "expected"

    @property
    def awaited(self) -> bool:
        """Whether the others wait for it."""
        return not (self.finished or self.straggled or self.ended)
