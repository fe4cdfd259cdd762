"""A round at the block servers, as the coordinator sees it: seats are given out, watched, and averaged.

A stage is what trains at one time: a whole round of Flower's, one client's turn, or as many clients as fit. Each of its
clients has a seat at one block server; the servers know nothing of each other.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fedsea.errors import FedSEAError, NonFiniteError, ProtocolError, ServerUnavailableError
from fedsea.federation.arrays import Arrays
from fedsea.federation.coordinator.members import Member
from fedsea.partition import layer_of
from fedsea.parts.adapters import AdapterSpec
from fedsea.parts.averaging import WeightedMean
from fedsea.wire.rounds import MemberStatus, RoundPlan, RoundStatus, Seat, ServerDescription, Strategy, Ticket, new_seat
from fedsea.wire.runs import OptimizerStep

RETRY_SECONDS, RETRIES = 1.0, 3


class Admin(Protocol):
    """A block server's administration: `BlockServerAdmin`."""

    address: str

    def describe(self) -> ServerDescription:
        """What it holds."""

    def open_round(self, plan: RoundPlan, weights: Mapping[str, Tensor]) -> None:
        """Open a round."""

    def status(self, label: str) -> RoundStatus:
        """How a round stands."""

    def aggregate(self, label: str, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """The average of some clients' middle layers; the round is over then."""

    def close_round(self, label: str) -> None:
        """Give a round up."""


@dataclass(frozen=True)
class RoundTerms:
    """What all stages of a federation have in common.

    Attributes
    ----------
    adapter, num_layers
        What is trained, in a model of how many layers.
    shapes
        Of the whole adapter's weights, by name.
    join_seconds, straggler_seconds
        Deadlines.
    step, max_norm
        What a client's optimizer steps at a block server are, and how much its gradient counts: `RoundPlan`.
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
        middle = member.partition.middle(self.num_layers)
        return {name: shape for name, shape in self.shapes.items() if layer_of(name) not in middle}


@dataclass
class Seats:
    """Seats at block servers. `BlockServers.open` makes it.

    Attributes
    ----------
    server_of, tickets
        By client: its block server, and what it needs to take its seat.
    failed
        By client: why its block server cannot serve it.
    """

    label: str
    server_of: dict[str, Admin]
    tickets: dict[str, Ticket]
    failed: dict[str, str] = field(default_factory=dict)

    def of(self, admin: Admin) -> list[str]:
        """The clients at a block server."""
        return [name for name, its in self.server_of.items() if its is admin]

    @property
    def admins(self) -> list[Admin]:
        """The block servers that take part."""
        return list({id(admin): admin for admin in self.server_of.values()}.values())


class BlockServers:
    """All block servers of a federation.

    Parameters
    ----------
    admins
        One for each.
    terms
        What their rounds have in common.
    notice
        Told one line of what goes wrong with a server.
    """

    def __init__(self, admins: Sequence[Admin], terms: RoundTerms, notice: Callable[[str], None]) -> None:
        self.admins, self.terms, self._notice = list(admins), terms, notice

    def open(
        self,
        label: str,
        strategy: Strategy,
        members: Sequence[Member],
        weights: Arrays,
        servers_for: Callable[[range], list[str]],
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
            stage, down = self._try(label, strategy, members, tensors, servers_for)
            for why in down.values():
                self._notice(why)
            if stage.server_of or not members:
                return stage
            if time.monotonic() >= end:
                raise ServerUnavailableError(next(iter(down.values()), "no block server serves these clients"))
            time.sleep(RETRY_SECONDS)

    def _try(
        self,
        label: str,
        strategy: Strategy,
        members: Sequence[Member],
        tensors: Mapping[str, Tensor],
        servers_for: Callable[[range], list[str]],
    ) -> tuple[Seats, dict[str, str]]:
        """Open a round at the servers that answer; those that do not, and why."""
        down: dict[str, str] = {}
        while True:
            # From the beginning whenever a server turns out to be down: the others' rounds get its clients as well.
            stage, before = Seats(label, {}, {}), len(down)
            groups, lost = self._assign(members, down, servers_for)
            stage.failed |= {name: f"no block server is there for it: {why}" for name, why in lost.items()}
            for admin, group in groups:
                try:
                    self._open(admin, stage, strategy, group, tensors)
                except ServerUnavailableError as error:
                    down[admin.address] = str(error)
            if len(down) == before:
                return stage, down

    def _assign(
        self, members: Sequence[Member], down: Mapping[str, str], servers_for: Callable[[range], list[str]]
    ) -> tuple[list[tuple[Admin, list[Member]]], dict[str, str]]:
        """Each member to the server of the fewest that holds its middle; those for whom there is none, and why."""
        by_address = {admin.address: admin for admin in self.admins}
        load = dict.fromkeys(by_address, 0)
        groups: dict[str, list[Member]] = {}
        lost = {}
        for member in members:
            able = servers_for(member.partition.middle(self.terms.num_layers))
            up = [address for address in able if address not in down]
            if not up:
                lost[member.name] = next((down[address] for address in able if address in down), "none has its layers")
                continue
            chosen = min(up, key=lambda address: load[address])
            load[chosen] += 1
            groups.setdefault(chosen, []).append(member)
        return [(by_address[address], group) for address, group in groups.items()], lost

    def _open(
        self, admin: Admin, stage: Seats, strategy: Strategy, group: Sequence[Member], tensors: Mapping[str, Tensor]
    ) -> None:
        seats: list[Seat] = []
        tickets: dict[str, Ticket] = {}
        for member in group:
            seat, tickets[member.name] = new_seat(admin.address, stage.label, member.name, float(member.examples))
            seats.append(seat)
        terms = self.terms
        plan = RoundPlan(
            stage.label,
            strategy,
            terms.adapter,
            tuple(seats),
            terms.join_seconds,
            terms.straggler_seconds,
            terms.step,
            terms.max_norm,
        )
        admin.open_round(plan, tensors)
        stage.tickets |= tickets
        stage.server_of |= dict.fromkeys(tickets, admin)

    def status(self, stage: Seats) -> dict[str, MemberStatus]:
        """How the clients of a stage stand, as far as their block servers answer."""
        found: dict[str, MemberStatus] = {}
        for admin in stage.admins:
            try:
                found |= {member.client: member for member in admin.status(stage.label).members}
            except FedSEAError:
                continue  # it is noticed when the average is asked for
        return found

    def average(
        self, stage: Seats, members: Mapping[str, Member], examples: Mapping[str, float], mean: WeightedMean
    ) -> None:
        """Take the average of those clients' middle layers from each block server, into `mean`; the stage is over.

        Clients whose part cannot be had are put into `stage.failed`.

        Parameters
        ----------
        members
            Clients by name.
        examples
            Weight of each client that counts.
        """
        for admin in stage.admins:
            counted = {name: examples[name] for name in stage.of(admin) if name in examples}
            try:
                found = self._average(admin, stage, counted)
            except FedSEAError as error:
                why = f"its block server failed: {error.code}: {error}"
                stage.failed |= {name: why for name in counted if name not in stage.failed}
                continue
            counted = {name: weight for name, weight in counted.items() if name not in stage.failed}
            shares: dict[str, float] = {}
            for client, weight in counted.items():
                for name in self.terms.middle_of(members[client]):
                    shares[name] = shares.get(name, 0.0) + weight
            wrong = next((name for name in shares if not self._fits(name, found.get(name))), None)
            if wrong is not None:
                stage.failed |= dict.fromkeys(counted, f"its block server's average of {wrong} cannot be used")
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

    def _average(self, admin: Admin, stage: Seats, counted: dict[str, float]) -> dict[str, Tensor]:
        """One server's average over those of its clients whose middle can be used; the others are failed."""
        states = {member.client: member.state for member in admin.status(stage.label).members} if counted else {}
        for name in counted:
            if states.get(name) != "finished":
                stage.failed[name] = "it says that it has trained, and its block server knows nothing of it"
        while left := {name: weight for name, weight in counted.items() if name not in stage.failed}:
            try:
                return self._patiently(partial(admin.aggregate, stage.label, left))
            except NonFiniteError as error:
                named = {name for name in str(error).rpartition(":")[2].replace(",", " ").split() if name in left}
                if not named:
                    raise
                stage.failed |= dict.fromkeys(named, f"{error.code}: its middle blocks' adapter is not finite")
        self.close_at(admin, stage.label)
        return {}

    def _patiently(self, ask: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Ask again if the connection was lost: the server has what a whole round has made."""
        for _ in range(RETRIES):
            try:
                return ask()
            except ServerUnavailableError:
                time.sleep(RETRY_SECONDS)
        return ask()

    def close(self, stage: Seats) -> None:
        """Give a stage up at all its block servers."""
        for admin in stage.admins:
            self.close_at(admin, stage.label)

    def close_at(self, admin: Admin, label: str) -> None:
        """Give a round up; a server that does not answer gives it up itself after a while."""
        try:
            admin.close_round(label)
        except (ServerUnavailableError, ProtocolError) as error:
            self._notice(f"the round {label} could not be closed at {admin.address}: {error}")
