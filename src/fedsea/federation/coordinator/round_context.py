"""What the parts of a federation's coordinator share, what one exchange with clients gathers, and who is late in it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord

from fedsea.federation.arrays import Arrays
from fedsea.federation.coordinator.block_servers import BlockServers, Seats
from fedsea.federation.coordinator.folder import FederationFolder
from fedsea.federation.coordinator.members import Directory, Member
from fedsea.federation.flower.grid import lateness
from fedsea.federation.settings import Settings
from fedsea.parts.averaging import WeightedMean


@dataclass
class FederationContext:
    """What a round works with."""

    settings: Settings
    lora: Mapping[str, Any]
    servers: BlockServers
    directory: Directory
    folder: FederationFolder
    notice: Callable[[str], None]

    def show(self, doing: str, number: int, **more: Any) -> None:
        """Write what is going on in which round."""
        refused = dict(self.directory.refused.values())
        whole = {"rounds": self.settings.rounds, "mode": self.settings.mode, "name": self.settings.name}
        self.folder.show(doing=doing, round=number, **whole, refused=refused, **more)


@dataclass
class RoundContext:
    """One exchange with clients: a round's training or its evaluation.

    `weights` is the global adapter; in sequential training, as the last turn left it. `mean` is of the middle's
    weights. `clients` has the metrics of those that count, by name, `dropped` why others do not, and `stragglers` those
    for whom the others did not wait to the end.
    """

    number: int
    weights: Arrays
    config: ConfigRecord
    members: dict[int, Member]
    training: bool
    mean: WeightedMean = field(default_factory=WeightedMean)
    clients: dict[str, dict[str, float]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    stragglers: set[str] = field(default_factory=set)
    began: float = field(default_factory=time.monotonic)


class LatenessCheck:
    """Polls the block servers while replies are waited for; `straggled` are those that they did not wait for."""

    def __init__(self, federation: FederationContext, this: RoundContext, seats: Seats) -> None:
        self._federation, self._round, self._seats = federation, this, seats
        self.straggled: set[str] = set()

    def __call__(self, waiting: set[int]) -> dict[int, str]:
        """Which nodes among those that have not replied are late, and why."""
        federation, this, seats = self._federation, self._round, self._seats
        states = federation.servers.status(seats)
        self.straggled |= {name for name, member in states.items() if member.straggled}
        members = {name: dict(vars(member)) for name, member in sorted(states.items())}
        doing = "training" if this.training else "evaluating"
        federation.show(doing, this.number, stage=seats.label, members=members)
        terms = federation.servers.terms
        late: dict[str, str] = {}
        for admin in seats.admins:
            here = {name: states[name] for name in seats.of(admin) if name in states}
            late |= lateness(here, terms.join_seconds, terms.straggler_seconds, training=this.training)
        return {node: late[this.members[node].name] for node in waiting if this.members[node].name in late}
