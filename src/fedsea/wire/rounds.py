"""What coordinator, block server and clients tell each other about a federated round.

A coordinator opens a round at a block server, with a seat for each client. It hands each client a ticket for its seat
(by Flower), and the client shows the ticket when it begins its run. The server never sees a ticket before that: it
has the hash, so what it knows is not enough to take a client's seat elsewhere.

`from_body` of these raises ProtocolError if a field is missing or not what it should be.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

from fedsea.checkpoints import Fingerprint
from fedsea.errors import ProtocolError, UsageError
from fedsea.fields import Fields
from fedsea.flags import STRATEGIES, Strategy
from fedsea.parts.adapters import AdapterSpec
from fedsea.wire.codec import MAX_WEIGHT
from fedsea.wire.runs import NAME, OptimizerStep

MemberState = Literal["expected", "joined", "finished", "gone"]
MAX_MEMBERS = 512  # what a message has room for
MAX_SECONDS = 86_400.0
MAX_BYTES = 1 << 62  # that a server counts of a member's frames
_HASH = re.compile(r"[0-9a-f]{64}")


def hash_token(token: str) -> str:
    """What a block server keeps of a ticket's token: its SHA-256, hexadecimal."""
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True)
class Seat:
    """A client's place in a round, as the block server knows it."""

    client: str  # its certificate's common name, where there are certificates
    token_hash: str  # of the ticket that it must show
    # How much its gradient counts beside those of others where all train one adapter; None for what it says itself.
    weight: float | None = None

    def admits(self, token: str) -> bool:
        """Whether this is the seat's ticket."""
        return hmac.compare_digest(hash_token(token), self.token_hash)


@dataclass(frozen=True)
class Ticket:
    """What a client needs to take its seat."""

    server: str  # address of the block server, HOST:PORT
    run: str  # its name there
    client: str
    token: str = field(repr=False)  # good for one use

    def to_body(self) -> dict[str, str]:
        return dict(vars(self))

    @classmethod
    def from_body(cls, body: Any) -> "Ticket":
        read = Fields(body, "a ticket")
        return cls(*(read.text(name) for name in ("server", "run", "client", "token")))


def run_name(label: str, client: str) -> str:
    """The run of a client in a round; UsageError if the two do not make a run's name."""
    name = f"{label}.{client}"
    if NAME.fullmatch(name) is None:
        raise UsageError(
            "names of federations and clients have letters, digits, dots, dashes and underscores, "
            f"60 together; got {name!r}"
        )
    return name


def new_seat(server: str, label: str, client: str, weight: float | None = None) -> tuple[Seat, Ticket]:
    """A seat in a round, and its ticket."""
    ticket = Ticket(server, run_name(label, client), client, secrets.token_urlsafe(32))
    return Seat(client, hash_token(ticket.token), weight), ticket


@dataclass(frozen=True)
class RoundPlan:
    """A round at a block server."""

    label: str  # its name there; a round of the same name is replaced
    strategy: Strategy  # client-batch: one adapter, which all members train together; else an adapter for each member
    adapter: AdapterSpec
    members: tuple[Seat, ...]
    join_seconds: float = 60.0  # that the first step waits for members that have not come
    straggler_seconds: float = 60.0  # that a step waits for a member that has nothing to do yet
    # What every optimizer step is but for its scale, and the last one's number; None for what most members ask for.
    step: OptimizerStep | None = None
    # The norm with which a member's gradient of one step counts at most where all train one adapter; None for any.
    max_norm: float | None = None

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UsageError(f"the strategy must be one of {', '.join(STRATEGIES)}; got {self.strategy!r}")
        if not self.members:
            raise UsageError("a round needs at least one member")
        for name in ("join_seconds", "straggler_seconds"):
            if not 0 < getattr(self, name) <= MAX_SECONDS:
                raise UsageError(f"{name} must be above 0, at most {MAX_SECONDS:g}; got {getattr(self, name)}")
        for seat in self.members:
            run_name(self.label, seat.client)
        if len({seat.client for seat in self.members}) < len(self.members):
            raise UsageError("a client has one seat in a round")
        bounds = {"a seat's weight": [seat.weight for seat in self.members], "max_norm": [self.max_norm]}
        for what, values in bounds.items():
            if any(value is not None and not 0 < value <= MAX_WEIGHT for value in values):
                raise UsageError(f"{what} must be above 0, at most {MAX_WEIGHT:g}")

    @property
    def shared(self) -> bool:
        """Whether all members train one adapter."""
        return self.strategy == "client-batch"

    def refusal(self, step: OptimizerStep) -> str | None:
        """Why a member may not make this optimizer step, in words; None if it may."""
        if self.step is None:
            return None
        if step.step > self.step.step:
            return f"the round has {self.step.step} optimizer steps; this would be step {step.step}"
        if settings_of(step) != settings_of(self.step):
            return "this optimizer step has other settings than those of the round"
        return None

    def to_body(self) -> dict[str, Any]:
        return {
            **vars(self),
            "adapter": self.adapter.to_body(),
            "members": [[seat.client, seat.token_hash, seat.weight] for seat in self.members],
            "step": self.step.to_body() if self.step is not None else None,
        }

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> "RoundPlan":
        read = Fields(body, "a round")
        seats = [
            Seat(row.text("client"), row.text("token_hash", like=_HASH), row.maybe(row.number, "weight"))
            for row in read.rows("members", ("client", "token_hash", "weight"), MAX_MEMBERS)
        ]
        step = body.get("step")
        try:
            return cls(
                read.text("label"),
                cast(Strategy, read.one_of("strategy", STRATEGIES)),
                AdapterSpec.from_body(body.get("adapter")),
                tuple(seats),
                read.number("join_seconds"),
                read.number("straggler_seconds"),
                step=OptimizerStep.from_body(step) if step is not None else None,
                max_norm=read.maybe(read.number, "max_norm"),
            )
        except UsageError as error:
            raise ProtocolError(str(error)) from None


def settings_of(step: OptimizerStep) -> OptimizerStep:
    """An optimizer step without what differs from step to step and from member to member."""
    return replace(step, step=0, scale=1.0, fresh=False)


@dataclass(frozen=True)
class MemberStatus:
    """How a member of a round stands."""

    client: str
    state: MemberState
    steps: int  # of the optimizer, done
    straggled: bool  # the others went on without it
    bytes_up: int  # of its frames
    bytes_down: int
    seconds_since: float  # it was last heard of; of an expected one, since the round was opened


@dataclass(frozen=True)
class RoundStatus:
    """How a round stands."""

    label: str
    strategy: str
    members: tuple[MemberStatus, ...]

    def to_body(self) -> dict[str, Any]:
        return {**vars(self), "members": [dict(vars(member)) for member in self.members]}

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> "RoundStatus":
        read = Fields(body, "a round's status")
        members = []
        for given in read.items("members"):
            member = Fields(given, "a member's status", MemberStatus.__annotations__)
            counts = {name: member.count(name, 0, MAX_BYTES) for name in ("steps", "bytes_up", "bytes_down")}
            members.append(
                MemberStatus(
                    member.text("client"),
                    cast(MemberState, member.one_of("state", get_args(MemberState))),
                    straggled=member.switch("straggled"),
                    seconds_since=member.number("seconds_since"),
                    **counts,
                )
            )
        return cls(read.text("label"), read.text("strategy"), tuple(members))


@dataclass(frozen=True)
class ServerDescription:
    """What a block server says of itself to a coordinator."""

    fingerprint: Fingerprint
    layers: range  # that it holds
    num_layers: int  # of the model

    def to_body(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint.to_json(),
            "layers": [self.layers.start, self.layers.stop],
            "num_layers": self.num_layers,
        }

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> "ServerDescription":
        read = Fields(body, "a block server's description")
        first, end = read.counts("layers", 2)
        if first >= end:
            raise read.wrong("layers", "the first layer and the end")
        return cls(Fingerprint.from_json(read.text("fingerprint")), range(first, end), read.count("num_layers"))
