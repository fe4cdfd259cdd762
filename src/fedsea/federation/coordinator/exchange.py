"""One exchange with the clients of a federation: seats at block servers, messages, replies, averages."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedsea.errors import ProtocolError
from fedsea.federation.arrays import Arrays, cut_to_reach, to_record
from fedsea.federation.coordinator import replies as checked
from fedsea.federation.coordinator.block_servers import BlockServers, Seats
from fedsea.federation.coordinator.folder import FederationFolder
from fedsea.federation.coordinator.members import Directory, Member
from fedsea.federation.coordinator.replies import Reply
from fedsea.federation.flower.grid import lateness, send_and_receive
from fedsea.federation.settings import Settings
from fedsea.parts.averaging import WeightedMean

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
REJECTED = 100  # code of the error that stands for a reply that was rejected; Flower's own are below


@dataclass
class FederationContext:
    """What the parts of a federation's coordinator share."""

    grid: Grid
    settings: Settings
    servers: BlockServers
    directory: Directory
    folder: FederationFolder
    notice: Callable[[str], None]

    def show(self, doing: str, number: int, **more: Any) -> None:
        """Write what is going on in which round."""
        refused = dict(self.directory.refused.values())
        whole = {"rounds": self.settings.rounds, "mode": self.settings.mode, "name": self.settings.name}
        self.folder.show(doing=doing, round=number, **whole, refused=refused, **more)

    def message(self, node: int, kind: str, weights: Arrays, config: Mapping[str, Any], **own: Any) -> Message:
        """What a client is sent: weights, the strategy's configuration, and what FedSEA says beside it."""
        own = {"lora": self.settings.lora(), "private-ends": self.settings.private_name, **own}
        record = ConfigRecord({**config, "fedsea": json.dumps(own)})
        return Message(
            RecordDict({ARRAYS: to_record(weights), CONFIG: record}), node, kind, group_id=str(own.get("round", ""))
        )


class Exchange:
    """A round's training, or its evaluation.

    `weights` is the global adapter; in sequential training, as the last turn left it. `clients` has the metrics of
    those that count, by name, `dropped` why others do not, and `stragglers` those that others did not wait for.
    """

    def __init__(self, federation: FederationContext, number: int, weights: Arrays, *, training: bool) -> None:
        self.number, self.weights, self.training = number, dict(weights), training
        self.config = ConfigRecord()  # the strategy's
        self.clients: dict[str, dict[str, float]] = {}
        self.dropped: dict[str, str] = {}
        self.stragglers: set[str] = set()
        self.began = time.monotonic()
        self._federation, self._settings, self._servers = federation, federation.settings, federation.servers
        self._mean = WeightedMean()  # of the middle's weights
        self._members: dict[int, Member] = {}
        self._asked: dict[str, Message] = {}  # the strategy's messages, by client

    def conduct(self, sampled: Iterable[Message]) -> list[Message]:
        """Send to the sampled clients, as many at a time as may be; their replies as the strategy takes them."""
        members = self._admit(sampled)
        settings = self._settings
        turns = settings.mode == "sequential" and self.training
        size = 1 if turns else settings.clients_at_once or max(1, len(members))
        groups = [members[first : first + size] for first in range(0, len(members), size)]
        results: list[tuple[Member, Reply]] = []
        errors: list[Message] = []
        end = self.began + settings.round_seconds
        for number, group in enumerate(groups):
            label = f"{settings.name}.{self.number}" + ("" if self.training else ".e")
            label += f".t{number}" if len(groups) > 1 or turns else ""
            good, bad = self._ask(label, group, end - time.monotonic())
            errors += bad
            if turns and good:
                # The next one goes on from what this one has left; the round's result is the last one's.
                self.weights |= self._whole(*good[0])
                self._mean = WeightedMean()
            results += good
        results.sort(key=lambda result: result[0].name)
        self.clients |= {member.name: reply.metrics for member, reply in results}
        metrics = checked.common_metrics([reply.metrics for _, reply in results])
        if turns and results:
            return [self._reply(results[-1][0], checked.mean_metrics(metrics), self.weights), *errors]
        return [
            self._reply(member, its, self._whole(member, reply) if self.training else None)
            for (member, reply), its in zip(results, metrics, strict=True)
        ] + errors

    def _admit(self, sampled: Iterable[Message]) -> list[Member]:
        """The sampled clients that may take part, by name."""
        directory = self._federation.directory
        messages = {message.metadata.dst_node_id: message for message in sampled}
        members = directory.admit(messages, self._settings.join_seconds)
        self._members = {member.node: member for member in members}
        self._asked = {member.name: messages[member.node] for member in members}
        for node in messages.keys() - self._members.keys():
            name, reason = directory.refused.get(node, (f"node {node}", "it does not answer"))
            self.dropped[name] = reason
        self.began = time.monotonic()
        return members

    def _ask(
        self, label: str, members: Sequence[Member], seconds: float
    ) -> tuple[list[tuple[Member, Reply]], list[Message]]:
        """Take seats, send, wait, check, average, close. The replies that count, and errors for the others."""
        federation, servers = self._federation, self._servers
        seats = servers.open(label, self._settings.mode if self.training else "client-batch", members, self.weights)
        try:
            sent = [self._message(seats, member) for member in members if member.name in seats.tickets]
            late = partial(self._late, seats)
            replies, missing = send_and_receive(federation.grid, sent, max(0.0, seconds), late)
            for node, why in missing.items():
                federation.directory.missed(node)
                seats.failed[self._members[node].name] = why
            good = self._check(seats, replies)
            if self.training:
                examples = {member.name: reply.metrics[checked.EXAMPLES] for member, reply in good}
                servers.average(seats, members, examples, self._mean)
        finally:
            servers.close(seats)
        for name, why in seats.failed.items():
            federation.notice(f"round {self.number}: client {name} does not count: {why}")
        self.dropped |= seats.failed
        errors = [Message(Error(REJECTED, why), reply_to=self._asked[name]) for name, why in seats.failed.items()]
        return [(member, reply) for member, reply in good if member.name not in seats.failed], errors

    def _message(self, seats: Seats, member: Member) -> Message:
        """What one client is sent: the weights that it trains itself, its ticket, and how to train."""
        kind = MessageType.TRAIN if self.training else MessageType.EVALUATE
        return self._federation.message(
            member.node,
            kind,
            {name: self.weights[name] for name in self._servers.local_of(member)},
            self.config,
            ticket=seats.tickets[member.name].to_body(),
            recipe=self._settings.recipe(),
            evaluation=self._settings.evaluation(),
            round=self.number,
        )

    def _late(self, seats: Seats, waiting: set[int]) -> dict[int, str]:
        """Which nodes among those that have not replied are late at their block server, and why."""
        settings, states = self._settings, self._servers.status(seats)
        self.stragglers |= {name for name, member in states.items() if member.straggled}
        members = {name: dict(vars(member)) for name, member in sorted(states.items())}
        doing = "training" if self.training else "evaluating"
        self._federation.show(doing, self.number, stage=seats.label, members=members)
        late: dict[str, str] = {}
        for names in seats.by_server().values():
            here = {name: states[name] for name in names if name in states}
            late |= lateness(here, settings.join_seconds, settings.straggler_seconds, training=self.training)
        return {node: late[name] for node in waiting if (name := self._members[node].name) in late}

    def _check(self, seats: Seats, replies: Sequence[tuple[int, Message | None]]) -> list[tuple[Member, Reply]]:
        good = []
        for node, message in replies:
            member = self._members[node]
            reply = self._read(member, message)
            if isinstance(reply, Reply):
                good.append((member, reply))
                continue
            seats.failed[member.name] = reply
            if reply.startswith(checked.CHANGED):
                self._federation.directory.forget(node)
        return sorted(good, key=lambda one: one[0].name)

    def _read(self, member: Member, message: Message | None) -> Reply | str:
        """A reply as far as it counts: a training's by the examples the client was admitted with, and by the recipe."""
        settings = self._settings
        wanted = {} if settings.private_ends else self._servers.local_of(member)
        reply = checked.read_reply(message, wanted if self.training else None)
        if isinstance(reply, str):
            return reply
        claimed = reply.metrics[checked.EXAMPLES]
        reply.metrics[checked.EXAMPLES] = examples = min(claimed, settings.max_examples)
        if not self.training:
            return reply
        if examples != member.examples:
            claim = f"{claimed:g} examples, and was admitted with {member.examples}"
            return f"{ProtocolError.code}: it has trained on {claim}"
        most = settings.most_moved()
        arrays, outside = cut_to_reach(reply.arrays, self.weights, most) if most else (reply.arrays, False)
        if outside:
            self._federation.notice(
                f"round {self.number}: client {member.name} has moved weights farther than the recipe can; they "
                "count as far as it can (if the client adds noise, see the setting reach)"
            )
        return Reply(reply.metrics, arrays)

    def _whole(self, member: Member, reply: Reply) -> Arrays:
        """A client's reply as a whole adapter: what it has trained, and the average of its middle.

        Where clients keep their ends, these are as they were at the start, and every layer that was in one's middle is
        the average over those in whose it was.
        """
        private = self._settings.private_ends
        means = self._mean.of(self._mean.names if private else self._servers.middle_of(member))
        return (self.weights if private else reply.arrays) | {name: mean.numpy() for name, mean in means.items()}

    def _reply(self, member: Member, metrics: Mapping[str, float], arrays: Arrays | None) -> Message:
        content = RecordDict({METRICS: MetricRecord(dict(metrics))})
        if arrays is not None:
            content[ARRAYS] = to_record(arrays)
        return Message(content, reply_to=self._asked[member.name])
