"""What one exchange with clients has: its round, who takes part, what became of them; and a look at who is late."""

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
    """What a strategy works with."""

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

    Attributes
    ----------
    weights
        The global adapter; in sequential training, as the last turn left it.
    mean
        Of the middle's weights.
    clients
        Metrics of those that count, by name.
    dropped
        Why others do not.
    stragglers
        Those of whom the others of their stage did not wait to the end.
    """

    number: int
    weights: Arrays
    config: ConfigRecord
    members: dict[int, Member]
    training: bool
    mean: WeightedMean = field(default_factory=WeightedMean)
    clients: dict[str, dict[str, float]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    stragglers: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)


class LatenessCheck:
    """Looks at the block servers while replies are waited for.

    Attributes
    ----------
    straggled
        Clients of whom the others did not wait to the end.
    """

    def __init__(self, federation: FederationContext, this: RoundContext, stage: Seats) -> None:
        self._federation, self._round, self._stage = federation, this, stage
        self.straggled: set[str] = set()

    def __call__(self, waiting: set[int]) -> dict[int, str]:
        """Which nodes among those that have not replied are late, and why."""
        federation, this, stage = self._federation, self._round, self._stage
        states = federation.servers.status(stage)
        self.straggled |= {name for name, member in states.items() if member.straggled}
        members = {name: dict(vars(member)) for name, member in sorted(states.items())}
        doing = "training" if this.training else "evaluating"
        federation.show(doing, this.number, stage=stage.label, members=members)
        terms = federation.servers.terms
        late: dict[str, str] = {}
        for admin in stage.admins:
            here = {name: states[name] for name in stage.of(admin) if name in states}
            late |= lateness(here, terms.join_seconds, terms.straggler_seconds, training=this.training)
        return {node: late[this.members[node].name] for node in waiting if this.members[node].name in late}
