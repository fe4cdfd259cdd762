"""All federated rounds of a server: how they are opened, found, averaged and closed. A single one: server_round.py."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedsea.errors import FedSEAError, LimitExceededError, PartitionError, ProtocolError, RefusedTicketError
from fedsea.server.runs import Run, RunTable
from fedsea.server.scheduler import Scheduler
from fedsea.server.server_round import ServerRound
from fedsea.wire.roles import COORDINATOR
from fedsea.wire.rounds import RoundPlan
from fedsea.wire.runs import Attach


@dataclass(eq=False)
class RoundTable:
    """All rounds of a server; `secure` if clients show certificates, so that a ticket can be held against them."""

    runs: RunTable
    scheduler: Scheduler
    secure: bool
    rounds: dict[str, ServerRound] = field(default_factory=dict)

    def open(self, plan: RoundPlan, weights: dict[str, Tensor], opener: str = COORDINATOR) -> None:
        """Open a round; one of the same name is given up. `opener` is the coordinator, as its certificate calls it.

        `weights` are the adapter's at the start, of this server's layers, by whole-model names; others start as the
        plan says. ProtocolError, PartitionError or LimitExceededError if the model or the server has no place for it.
        """
        runs, middle = self.runs, self.runs.middle
        if plan.adapter.narrow:
            raise ProtocolError("federated rounds train no narrow cuts: they compute several clients' states together")
        if not plan.adapter.within(middle.layers):
            raise PartitionError("the adapter has no target in the layers that the block server holds")
        self.close(plan.label)
        expected = sum(len(other.plan.members) for other in self.rounds.values())
        if expected + len(plan.members) > runs.limits.runs:
            raise LimitExceededError(
                f"{len(plan.members)} members do not fit: the server's limit is {runs.limits.runs} runs, "
                f"{expected} seats of other rounds are taken"
            )
        shapes = plan.adapter.weight_shapes(runs.modules, middle.layers)
        for name, weight in weights.items():  # refused now, not at the first member
            if name not in shapes:
                raise ProtocolError(f"the round's adapter has no weight {name!r} in the block server's layers")
            if tuple(weight.shape) != shapes[name]:
                raise ProtocolError(f"{name} has shape {list(weight.shape)}, the model's {list(shapes[name])}")
        self.rounds[plan.label] = ServerRound(
            plan, weights, opener, runs=runs, scheduler=self.scheduler, secure=self.secure
        )

    def find(self, label: str) -> ServerRound:
        """A round; ProtocolError if there is none of this name."""
        found = self.rounds.get(label)
        if found is None:
            raise ProtocolError(f"there is no round {label!r} at this block server")
        return found

    def attach(self, request: Attach, client: str, end: Callable[[FedSEAError], None]) -> tuple[Run, bool]:
        """Begin the run of a ticket's holder, and say that it is new.

        RefusedTicketError if the ticket is no good: unknown, used, another client's, or the round is over.
        ModelMismatchError, PartitionError or StragglerError if the client cannot take part.
        """
        for opened in self.rounds.values():
            if request.run in opened.members:
                return opened.join(request, client, end), True
        raise RefusedTicketError(f"there is no round with a seat for {request.run!r}; it may be over")

    def of(self, run: Run) -> ServerRound | None:
        """The round that a run belongs to; None for a client's own."""
        return next((one for one in self.rounds.values() if one.owner == run.owner), None)

    async def aggregate(self, label: str, weights: Mapping[str, float]) -> None:
        """Have a round compute the average of its members' weights (`ServerRound.compute_average`)."""
        opened = self.find(label)
        await self.scheduler.run(opened.owner, opened.compute_average, weights)

    def close(self, label: str) -> None:
        """Give a round up, if it is there."""
        opened = self.rounds.pop(label, None)
        if opened is not None:
            opened.close()

    def expire(self) -> list[str]:
        """Give up the rounds of which nothing was heard for as long as a run may be away."""
        now = self.runs.clock()
        over = [label for label, one in self.rounds.items() if now - one.heard > self.runs.limits.run_seconds]
        for label in over:
            self.close(label)
        return over
