"""Rounds at all block servers, as the coordinator sees them: seats are given out, watched, and averaged.

What trains at one time is a whole round of Flower's, one client's turn, or as many clients as fit. Each of its clients
has a seat at one block server; the servers know nothing of each other.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fedsea.errors import FedSEAError, NonFiniteError, ProtocolError, ServerUnavailableError
from fedsea.federation.arrays import Arrays
from fedsea.federation.coordinator.block_server_admin import BlockServerAdmin
from fedsea.federation.coordinator.members import Member
from fedsea.flags import Strategy
from fedsea.partition import layer_of
from fedsea.parts.adapters import AdapterSpec
from fedsea.parts.averaging import WeightedMean
from fedsea.wire.rounds import MemberStatus, RoundPlan, Seat, Ticket, new_seat
from fedsea.wire.runs import OptimizerStep

RETRY_SECONDS, RETRIES = 1.0, 3
ServersFor = Callable[[range], list[str]]  # addresses of the servers that hold these layers


@dataclass(frozen=True)
class RoundTerms:
    """What all rounds of a federation have in common; the last four are those of `RoundPlan`.

    `shapes` are of the whole adapter's weights, by name.
    """

    adapter: AdapterSpec
    num_layers: int
    shapes: Mapping[str, tuple[int, ...]]
    join_seconds: float
    straggler_seconds: float
    step: OptimizerStep | None = None
    max_norm: float | None = None

    def middle_of(self, member: Member) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a client's middle weights: those that its block server trains."""
        middle = member.partition.middle(self.num_layers)
        return {name: shape for name, shape in self.shapes.items() if layer_of(name) in middle}

    def local_of(self, member: Member) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights that a client trains itself."""
        middle = self.middle_of(member)
        return {name: shape for name, shape in self.shapes.items() if name not in middle}

    def plan(self, label: str, strategy: Strategy, seats: Sequence[Seat]) -> RoundPlan:
        """One round at one block server."""
        seconds = self.join_seconds, self.straggler_seconds
        return RoundPlan(label, strategy, self.adapter, tuple(seats), *seconds, self.step, self.max_norm)


@dataclass
class Seats:
    """Seats at block servers; `BlockServers.open` makes them.

    By client: its block server, the ticket for its seat, and why its block server cannot serve it.
    """

    label: str
    server_of: dict[str, BlockServerAdmin]
    tickets: dict[str, Ticket]
    failed: dict[str, str] = field(default_factory=dict)

    def of(self, admin: BlockServerAdmin) -> list[str]:
        """The clients at a block server."""
        return [name for name, its in self.server_of.items() if its is admin]

    @property
    def admins(self) -> list[BlockServerAdmin]:
        """The block servers that take part."""
        return list({id(admin): admin for admin in self.server_of.values()}.values())


class BlockServers:
    """All block servers of a federation; `notice` gets one line of what goes wrong with one."""

    def __init__(self, admins: Sequence[BlockServerAdmin], terms: RoundTerms, notice: Callable[[str], None]) -> None:
        self.admins, self.terms, self._notice = list(admins), terms, notice

    def open(
        self, label: str, strategy: Strategy, members: Sequence[Member], weights: Arrays, servers_for: ServersFor
    ) -> Seats:
        """Open a round of this label at as many block servers as there are for the members.

        A server that does not answer is left out; if none does, they are tried again until `join_seconds` are over.

        Raises
        ------
        ServerUnavailableError
            If no block server answers.
        FedSEAError
            What a block server refuses.
        """
        tensors = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
        end = time.monotonic() + self.terms.join_seconds
        while True:
            seats, down = self._try(label, strategy, members, tensors, servers_for)
            for why in down.values():
                self._notice(why)
            if seats.server_of or not members:
                return seats
            if time.monotonic() >= end:
                raise ServerUnavailableError(next(iter(down.values()), "no block server serves these clients"))
            time.sleep(RETRY_SECONDS)

    def _try(
        self,
        label: str,
        strategy: Strategy,
        members: Sequence[Member],
        tensors: Mapping[str, Tensor],
        servers_for: ServersFor,
    ) -> tuple[Seats, dict[str, str]]:
        """Open a round at the servers that answer; those that do not, and why."""
        down: dict[str, str] = {}
        while True:
            # From the beginning whenever a server turns out to be down: the others' rounds get its clients as well.
            seats, before = Seats(label, {}, {}), len(down)
            groups, lost = self._assign(members, down, servers_for)
            seats.failed |= {name: f"no block server is there for it: {why}" for name, why in lost.items()}
            for admin, group in groups:
                its = [new_seat(admin.address, label, member.name, float(member.examples)) for member in group]
                try:
                    admin.open_round(self.terms.plan(label, strategy, [seat for seat, _ in its]), tensors)
                except ServerUnavailableError as error:
                    down[admin.address] = str(error)
                    continue
                seats.tickets |= {ticket.client: ticket for _, ticket in its}
                seats.server_of |= {ticket.client: admin for _, ticket in its}
            if len(down) == before:
                return seats, down

    def _assign(
        self, members: Sequence[Member], down: Mapping[str, str], servers_for: ServersFor
    ) -> tuple[list[tuple[BlockServerAdmin, list[Member]]], dict[str, str]]:
        """Each member to the server of the fewest that holds its middle; those for whom there is none, and why."""
        by_address = {admin.address: admin for admin in self.admins}
        groups: dict[str, list[Member]] = {}
        lost = {}
        for member in members:
            able = servers_for(member.partition.middle(self.terms.num_layers))
            up = [address for address in able if address not in down]
            if up:
                chosen = min(up, key=lambda address: len(groups.get(address, ())))
                groups.setdefault(chosen, []).append(member)
            else:
                lost[member.name] = next((down[address] for address in able if address in down), "none has its layers")
        return [(by_address[address], group) for address, group in groups.items()], lost

    def status(self, seats: Seats) -> dict[str, MemberStatus]:
        """How the clients stand, as far as their block servers answer."""
        found: dict[str, MemberStatus] = {}
        for admin in seats.admins:
            try:
                found |= {member.client: member for member in admin.status(seats.label).members}
            except FedSEAError:
                continue  # it is noticed when the average is asked for
        return found

    def average(
        self, seats: Seats, members: Mapping[str, Member], examples: Mapping[str, float], mean: WeightedMean
    ) -> None:
        """Add the average of clients' middle layers at each block server to `mean`; their rounds are over then.

        `examples` is the weight of each client that counts. Clients whose part cannot be had are put into
        `seats.failed`.
        """
        for admin in seats.admins:
            counted = {name: examples[name] for name in seats.of(admin) if name in examples}
            try:
                found = self._average(admin, seats, counted)
            except FedSEAError as error:
                why = f"its block server failed: {error.code}: {error}"
                seats.failed |= {name: why for name in counted if name not in seats.failed}
                continue
            counted = {name: weight for name, weight in counted.items() if name not in seats.failed}
            shares: dict[str, float] = {}
            for client, weight in counted.items():
                for name in self.terms.middle_of(members[client]):
                    shares[name] = shares.get(name, 0.0) + weight
            wrong = next((name for name in shares if not self._fits(name, found.get(name))), None)
            if wrong is not None:
                seats.failed |= dict.fromkeys(counted, f"its block server's average of {wrong} cannot be used")
                continue
            for name, weight in shares.items():
                mean.add(name, found[name], weight)

    def _fits(self, name: str, value: Tensor | None) -> bool:
        return (
            value is not None
            and tuple(value.shape) == tuple(self.terms.shapes[name])
            and value.dtype is torch.float32
            and bool(torch.isfinite(value).all())
        )

    def _average(self, admin: BlockServerAdmin, seats: Seats, counted: dict[str, float]) -> dict[str, Tensor]:
        """One server's average over those of its clients whose middle can be used; the others are failed."""
        states = {member.client: member.state for member in admin.status(seats.label).members} if counted else {}
        for name in counted:
            if states.get(name) != "finished":
                seats.failed[name] = "it says that it has trained, and its block server knows nothing of it"
        while left := {name: weight for name, weight in counted.items() if name not in seats.failed}:
            try:
                return _retried(partial(admin.aggregate, seats.label, left))
            except NonFiniteError as error:
                named = {name for name in str(error).rpartition(":")[2].replace(",", " ").split() if name in left}
                if not named:
                    raise
                seats.failed |= dict.fromkeys(named, f"{error.code}: its middle blocks' adapter is not finite")
        self._close_at(admin, seats.label)
        return {}

    def close(self, seats: Seats) -> None:
        """Give the round up at all its block servers."""
        for admin in seats.admins:
            self._close_at(admin, seats.label)

    def _close_at(self, admin: BlockServerAdmin, label: str) -> None:
        """Give a round up; a server that does not answer gives it up itself after a while."""
        try:
            admin.close_round(label)
        except (ServerUnavailableError, ProtocolError) as error:
            self._notice(f"the round {label} could not be closed at {admin.address}: {error}")


def _retried(aggregate: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Retry if the connection was lost: the server has what a whole round has made."""
    for _ in range(RETRIES):
        try:
            return aggregate()
        except ServerUnavailableError:
            time.sleep(RETRY_SECONDS)
    return aggregate()
