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
from fedsea.federation.arrays import Arrays, Shapes
from fedsea.federation.coordinator.block_server_admin import BlockServerAdmin
from fedsea.federation.coordinator.members import Member
from fedsea.federation.settings import Settings
from fedsea.flags import Strategy
from fedsea.partition import layer_of
from fedsea.parts.adapters import AdapterSpec
from fedsea.parts.averaging import WeightedMean
from fedsea.wire.rounds import MemberStatus, RoundPlan, Seat, Ticket, new_seat
from fedsea.wire.runs import OptimizerStep

RETRY_SECONDS, RETRIES = 1.0, 3


@dataclass
class Seats:
    """The tickets of clients that have a seat at a block server, and why others have none or do not count any more."""

    label: str
    tickets: dict[str, Ticket] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    over: bool = False  # its rounds are closed

    def by_server(self) -> dict[str, list[str]]:
        """The clients that have a seat, by the address of their block server."""
        found: dict[str, list[str]] = {}
        for ticket in self.tickets.values():
            found.setdefault(ticket.server, []).append(ticket.client)
        return found


class BlockServers:
    """The federation's block servers; `notice` gets one line about what goes wrong at one of them.

    `shapes` are of the whole adapter's weights, by name; `num_layers` the model's.
    """

    def __init__(
        self,
        admins: Sequence[BlockServerAdmin],
        adapter: AdapterSpec,
        shapes: Shapes,
        num_layers: int,
        settings: Settings,
        notice: Callable[[str], None],
    ) -> None:
        self._admins = {admin.address: admin for admin in admins}
        self.described = {address: admin.describe() for address, admin in self._admins.items()}
        self._adapter, self._shapes, self._num_layers = adapter, shapes, num_layers
        self._settings, self._notice = settings, notice
        self._step = OptimizerStep("adamw", settings.local_steps, 1.0, settings.lr, settings.weight_decay)

    def holding(self, middle: range) -> list[str]:
        """Addresses of the servers that hold these layers."""
        held = {address: described.layers for address, described in self.described.items()}
        return [address for address, its in held.items() if its.start <= middle.start and middle.stop <= its.stop]

    def middle_of(self, member: Member) -> Shapes:
        """Names and shapes of a client's middle weights: those that its block server trains."""
        middle = member.partition.middle(self._num_layers)
        return {name: shape for name, shape in self._shapes.items() if layer_of(name) in middle}

    def local_of(self, member: Member) -> Shapes:
        """Names and shapes of the weights that a client trains itself."""
        middle = self.middle_of(member)
        return {name: shape for name, shape in self._shapes.items() if name not in middle}

    def open(self, label: str, strategy: Strategy, members: Sequence[Member], weights: Arrays) -> Seats:
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
        end = time.monotonic() + self._settings.join_seconds
        while True:
            down: dict[str, str] = {}
            # From the beginning whenever a server turns out to be down: the others' rounds get its clients as well.
            while (seats := self._try(label, strategy, members, tensors, down)) is None:
                pass
            for why in down.values():
                self._notice(why)
            if seats.tickets or not members:
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
        down: dict[str, str],
    ) -> Seats | None:
        """Seats at the servers that are not down; None if a further one is, which is then put there with the reason."""
        seats = Seats(label)
        groups: dict[str, list[Member]] = {}
        for member in members:
            able = self.holding(member.partition.middle(self._num_layers))
            if up := [address for address in able if address not in down]:
                chosen = min(up, key=lambda address: len(groups.get(address, ())))
                groups.setdefault(chosen, []).append(member)
            else:
                why = next((down[address] for address in able), "none has its layers")
                seats.failed[member.name] = f"no block server is there for it: {why}"
        for address, group in groups.items():
            its = [new_seat(address, label, member.name, float(member.examples)) for member in group]
            try:
                self._admins[address].open_round(self._plan(label, strategy, [seat for seat, _ in its]), tensors)
            except ServerUnavailableError as error:
                down[address] = str(error)
                return None
            seats.tickets |= {ticket.client: ticket for _, ticket in its}
        return seats

    def _plan(self, label: str, strategy: Strategy, seats: Sequence[Seat]) -> RoundPlan:
        settings = self._settings
        seconds, most = (settings.join_seconds, settings.straggler_seconds), settings.max_norm or None
        return RoundPlan(label, strategy, self._adapter, tuple(seats), *seconds, self._step, most)

    def status(self, seats: Seats) -> dict[str, MemberStatus]:
        """How the clients stand, as far as their block servers answer."""
        found: dict[str, MemberStatus] = {}
        for address in seats.by_server():
            try:
                found |= {member.client: member for member in self._admins[address].status(seats.label).members}
            except FedSEAError:
                continue  # it is noticed when the average is asked for
        return found

    def average(
        self, seats: Seats, members: Sequence[Member], examples: Mapping[str, float], mean: WeightedMean
    ) -> None:
        """Add the average of clients' middle layers at each block server to `mean`; their rounds are over then.

        `examples` is the weight of each client that counts. Clients whose part cannot be had are put into
        `seats.failed`.
        """
        middles = {member.name: self.middle_of(member) for member in members}
        for address, names in seats.by_server().items():
            counted = {name: examples[name] for name in names if name in examples}
            try:
                found = self._average(self._admins[address], seats, counted)
            except FedSEAError as error:
                why = f"its block server failed: {error.code}: {error}"
                seats.failed |= {name: why for name in counted if name not in seats.failed}
                continue
            counted = {name: weight for name, weight in counted.items() if name not in seats.failed}
            shares: dict[str, float] = {}
            for client, weight in counted.items():
                for name in middles[client]:
                    shares[name] = shares.get(name, 0.0) + weight
            wrong = next((name for name in shares if not self._fits(name, found.get(name))), None)
            if wrong is not None:
                seats.failed |= dict.fromkeys(counted, f"its block server's average of {wrong} cannot be used")
                continue
            for name, weight in shares.items():
                mean.add(name, found[name], weight)
        seats.over = True

    def _fits(self, name: str, value: Tensor | None) -> bool:
        return (
            value is not None
            and tuple(value.shape) == tuple(self._shapes[name])
            and value.dtype is torch.float32
            and bool(torch.isfinite(value).all())
        )

    def _average(self, admin: BlockServerAdmin, seats: Seats, counted: Mapping[str, float]) -> dict[str, Tensor]:
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
        """Give the round up at all its block servers, unless it is over."""
        if not seats.over:
            for address in seats.by_server():
                self._close_at(self._admins[address], seats.label)

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
