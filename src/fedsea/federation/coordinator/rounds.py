"""The rounds of a federation: seats at block servers, messages to clients, their replies, the strategy, the report.

One of Flower's stock strategies (FedAvg and its relatives) samples clients and combines their replies. Here each of
them gets a seat at a block server, what it trains and its ticket, and its reply is made a whole adapter before the
strategy sees it: what the client has trained, and for the layers of its middle the average over all clients whose
middle has the layer, over all block servers. With FedAvg a layer is so averaged over all that trained it, weighted by
examples, at whichever side it was trained. What compares single clients (FedMedian, Krum, ...) compares the ends that
they have trained; of the middle it sees the average only.
"""

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedsea.errors import ProtocolError, UsageError
from fedsea.federation.arrays import Arrays, Shapes, cut_to_reach, from_record, to_record
from fedsea.federation.coordinator import replies as checked
from fedsea.federation.coordinator.block_servers import Seats
from fedsea.federation.coordinator.members import Directory, Member
from fedsea.federation.coordinator.replies import Reply
from fedsea.federation.coordinator.round_context import FederationContext, LatenessCheck, RoundContext
from fedsea.federation.flower.grid import exchange
from fedsea.federation.flower.strategy import strategy_state
from fedsea.parts.averaging import WeightedMean

log = logging.getLogger("flwr")
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
REJECTED = 100  # code of the error that stands for a reply that was rejected; Flower's own are below


class FederatedTraining:
    """Does a federation's rounds; `weights` is the whole adapter after the `done` rounds."""

    def __init__(
        self, grid: Grid, federation: FederationContext, strategy: FlowerStrategy, weights: Arrays, done: int
    ) -> None:
        self.federation, self.weights, self.done = federation, weights, done
        self._grid, self._strategy, self._settings = grid, strategy, federation.settings

    def run(self) -> Arrays:
        """Do the rounds that are left; returns the adapter.

        Raises
        ------
        FedSEAError
            If no block server answers, or no client has trained in any round.
        """
        settings, succeeded = self._settings, 0
        if self.done < settings.rounds:
            self._wait_for_clients()
            self._strategy.summary()
            while self.done < settings.rounds:
                log.info("[ROUND %d/%d]", self.done + 1, settings.rounds)
                succeeded += self._train()
                if settings.eval_every and self.done % settings.eval_every == 0:
                    self._evaluate()
            if not succeeded:
                raise UsageError("no round has had a result; what went wrong is said above, and in rounds.jsonl")
        return self.weights

    def _train(self) -> bool:
        """One round, saved; whether it has a result."""
        federation, number, config = self.federation, self.done + 1, ConfigRecord()
        federation.show("asking clients", number)
        nodes = federation.directory.available(self._grid)
        sampled = self._strategy.configure_train(number, to_record(self.weights), config, nodes)
        this, messages = self._begin(number, sampled, config, training=True)
        arrays, metrics = self._strategy.aggregate_train(number, self._conduct(this, messages))
        result = from_record(arrays) if arrays is not None else {}
        result = {name: array.astype(np.float32) for name, array in result.items()}
        finite = all(bool(np.isfinite(array).all()) for array in result.values())
        if result and finite:
            self.weights = result
            log.info("\t└──> Aggregated MetricRecord: %s", metrics)
        elif result:
            kind = type(self._strategy).__name__
            federation.notice(f"round {number}: {kind}'s result is not finite; left out")
            this.dropped |= dict.fromkeys(this.clients, "the strategy's result is not finite")
            this.clients.clear()
        self.done = number
        self._report(this)
        return bool(result) and finite

    def _evaluate(self) -> None:
        """Add the strategy's average of the metrics that all clients gave to the round's line."""
        config, nodes = ConfigRecord(), self.federation.directory.available(self._grid)
        sampled = self._strategy.configure_evaluate(self.done, to_record(self.weights), config, nodes)
        this, messages = self._begin(self.done, sampled, config, training=False)
        metrics = self._strategy.aggregate_evaluate(self.done, self._conduct(this, messages))
        log.info("\t└──> Aggregated MetricRecord: %s", metrics)
        values = {name: value for name, value in (metrics or {}).items() if name != checked.EXAMPLES}
        evaluation = {"metrics": values, "clients": this.clients, "dropped": this.dropped}
        self.federation.folder.add_evaluation(this.number, evaluation)
        self.federation.show("evaluated", this.number, evaluation=values)

    # One exchange with clients

    def _begin(
        self, number: int, sampled: Iterable[Message], config: ConfigRecord, *, training: bool
    ) -> tuple[RoundContext, list[Message]]:
        """The sampled clients that are admitted, and the strategy's messages to them."""
        messages = {_node(message): message for message in sampled}
        directory = self.federation.directory
        members = directory.admit(self._grid, messages, self._settings.join_seconds)
        this = RoundContext(number, dict(self.weights), config, {member.node: member for member in members}, training)
        for node in messages.keys() - this.members.keys():
            name, reason = directory.refused.get(node, (f"node {node}", "it does not answer"))
            this.dropped[name] = reason
        return this, [messages[member.node] for member in members]

    def _conduct(self, this: RoundContext, messages: Sequence[Message]) -> list[Message]:
        """Send to all clients, as many at a time as may be; returns their replies as the strategy takes them."""
        if not messages:
            return []
        settings = self._settings
        turns = settings.mode == "sequential" and this.training
        size = 1 if turns else settings.clients_at_once or len(messages)
        groups = [messages[first : first + size] for first in range(0, len(messages), size)]
        results: list[tuple[Member, Reply]] = []
        errors: list[Message] = []
        end = time.monotonic() + settings.round_seconds
        for number, group in enumerate(groups):
            label = f"{settings.name}.{this.number}" + ("" if this.training else ".e")
            label += f".t{number}" if len(groups) > 1 or turns else ""
            good, bad = self._exchange(this, label, group, end - time.monotonic())
            errors += bad
            if turns and good:
                # The next one goes on from what this one has left; the round's result is the last one's.
                this.weights |= self._whole(this, *good[0])
                this.mean = WeightedMean()
            results += good
        results.sort(key=lambda result: result[0].name)
        this.clients |= {member.name: reply.metrics for member, reply in results}
        metrics = checked.common_metrics([reply.metrics for _, reply in results])
        by_node = {_node(message): message for message in messages}
        if turns and results:
            nodes = {member.node for member, _ in results}
            last = next(message for node, message in reversed(by_node.items()) if node in nodes)
            return [_reply(last, checked.mean_metrics(metrics), this.weights), *errors]
        return [
            _reply(by_node[member.node], its, self._whole(this, member, reply) if this.training else None)
            for (member, reply), its in zip(results, metrics, strict=True)
        ] + errors

    def _exchange(
        self, this: RoundContext, label: str, messages: Sequence[Message], seconds: float
    ) -> tuple[list[tuple[Member, Reply]], list[Message]]:
        """Take seats, send, wait, check, average, close. The replies that count, and errors for the others."""
        federation, directory = self.federation, self.federation.directory
        members = [this.members[_node(message)] for message in messages]
        mode = self._settings.mode if this.training else "client-batch"
        seats = federation.servers.open(label, mode, members, this.weights, directory.requirements.servers_for)
        settled = False
        try:
            sent = [self._message(this, seats, member) for member in members if member.name in seats.tickets]
            late = LatenessCheck(federation, this, seats)
            raw, missing = exchange(self._grid, sent, max(0.0, seconds), late)
            for node in missing:
                directory.missed(self._grid, node)
                seats.failed[this.members[node].name] = missing[node]
            good = self._check(this, seats, raw)
            if this.training:
                examples = {member.name: reply.metrics[checked.EXAMPLES] for member, reply in good}
                federation.servers.average(seats, {member.name: member for member in members}, examples, this.mean)
                settled = True
        finally:
            if not settled:
                federation.servers.close(seats)
        this.stragglers |= late.straggled
        for name, why in seats.failed.items():
            federation.notice(f"round {this.number}: client {name} does not count: {why}")
            this.dropped[name] = why
        errors = [
            Message(Error(REJECTED, seats.failed[member.name]), reply_to=message)
            for member, message in zip(members, messages, strict=True)
            if member.name in seats.failed
        ]
        return [(member, reply) for member, reply in good if member.name not in seats.failed], errors

    def _message(self, this: RoundContext, seats: Seats, member: Member) -> Message:
        """What one client is sent: the weights that it trains itself, its ticket, and how to train."""
        own = {
            "ticket": seats.tickets[member.name].to_body(),
            "lora": dict(self.federation.lora),
            "recipe": self._settings.recipe(),
            "evaluation": self._settings.evaluation(),
            "round": this.number,
            "private-ends": self._settings.private_name,
        }
        local = self.federation.servers.terms.local_of(member)
        config = ConfigRecord({**this.config, "fedsea": json.dumps(own)})
        content = RecordDict({ARRAYS: to_record({name: this.weights[name] for name in local}), CONFIG: config})
        kind = MessageType.TRAIN if this.training else MessageType.EVALUATE
        return Message(content, member.node, kind, group_id=str(this.number))

    def _check(
        self, this: RoundContext, seats: Seats, replies: Sequence[tuple[int, Message | None]]
    ) -> list[tuple[Member, Reply]]:
        good = []
        for node, message in replies:
            member = this.members[node]
            reply = checked.read_reply(message, self._wanted(member) if this.training else None)
            if not isinstance(reply, str):
                reply = self._counted(this, member, reply)
            if isinstance(reply, str):
                seats.failed[member.name] = reply
                if reply.startswith(checked.CHANGED):
                    self.federation.directory.forget(member.node)
            else:
                good.append((member, reply))
        return sorted(good, key=lambda one: one[0].name)

    def _counted(self, this: RoundContext, member: Member, reply: Reply) -> Reply | str:
        """A reply as far as it counts: a training's by the examples the client was admitted with, and by the recipe."""
        examples = min(reply.metrics[checked.EXAMPLES], self._settings.max_examples)
        metrics = reply.metrics | {checked.EXAMPLES: examples}
        if not this.training:
            return Reply(metrics, reply.arrays)
        if examples != member.examples:
            claim = f"{reply.metrics[checked.EXAMPLES]:g} examples, and was admitted with {member.examples}"
            return f"{ProtocolError.code}: it has trained on {claim}"
        most = self._settings.most_moved()
        arrays, outside = cut_to_reach(reply.arrays, this.weights, most) if most else (reply.arrays, False)
        if outside:
            self.federation.notice(
                f"round {this.number}: client {member.name} has moved weights farther than the recipe can; they "
                "count as far as it can (if the client adds noise, see the setting reach)"
            )
        return Reply(metrics, arrays)

    def _wanted(self, member: Member) -> Shapes:
        """What a client's reply must have."""
        return {} if self._settings.private_ends else self.federation.servers.terms.local_of(member)

    def _whole(self, this: RoundContext, member: Member, reply: Reply) -> Arrays:
        """A client's reply as a whole adapter: what it has trained, and the average of its middle.

        Where clients keep their ends, these are as they were at the start, and every layer that was in one's middle is
        the average over those in whose it was.
        """
        private, terms = self._settings.private_ends, self.federation.servers.terms
        means = this.mean.of(this.mean.names if private else terms.middle_of(member))
        return (this.weights if private else reply.arrays) | {name: mean.numpy() for name, mean in means.items()}

    def _report(self, this: RoundContext) -> None:
        clients = this.clients.values()
        examples = sum(its[checked.EXAMPLES] for its in clients)
        losses = sum(its["train-loss"] * its[checked.EXAMPLES] for its in clients)
        report = {
            "round": this.number,
            "mode": self._settings.mode,
            "loss": losses / examples if examples else None,
            "seconds": round(time.monotonic() - this.began, 2),
            "bytes_up": sum(int(its["bytes-up"]) for its in clients),
            "bytes_down": sum(int(its["bytes-down"]) for its in clients),
            "clients": this.clients,
            "stragglers": sorted(this.stragglers),
            "dropped": this.dropped,
            "refused": dict(self.federation.directory.refused.values()),
        }
        self.federation.folder.save(this.number, self.weights, strategy_state(self._strategy, self.weights), report)
        self.federation.show("round done", this.number, loss=report["loss"])

    def _wait_for_clients(self) -> None:
        """Until enough clients are there, have said what they are, and may take part.

        Raises
        ------
        UsageError
            If nothing has changed for `wait-seconds`, with who is missing or refused.
        """
        settings, directory, grid = self._settings, self.federation.directory, self._grid
        wanted, seen, since = settings.min_clients if self.done else settings.clients, (-1, -1), time.monotonic()
        while True:
            directory.update(grid)
            unknown, there = directory.ask_all(grid), len(list(grid.get_node_ids()))
            answered, ready = there - unknown, len(directory.members)
            if there >= wanted and ready >= settings.min_clients:
                if not unknown:
                    return
                if time.monotonic() - since > settings.join_seconds:
                    directory.give_up_asking()
                    return
            if (answered, there) != seen:
                seen, since = (answered, there), time.monotonic()  # they are coming
                self.federation.notice(f"waiting for clients: {there} of {wanted} are connected, {answered} ready")
                self.federation.show("waiting for clients", self.done + 1, connected=there, ready=answered)
            if settings.wait_seconds and time.monotonic() - since > settings.wait_seconds:
                raise UsageError(_why_waiting(there, wanted, directory))
            time.sleep(0.1)


def _why_waiting(there: int, wanted: int, directory: Directory) -> str:
    refused = "; ".join(f"{name} is refused: {reason}" for name, reason in directory.refused.values())
    if there < wanted:
        simulated = 'with flwr run, --federation-config "num-supernodes=N" says how many there are'
        return f"only {there} of {wanted} clients are connected; {refused or simulated}"
    return refused or "no client has said what it is"


def _node(message: Message) -> int:
    node: int = message.metadata.dst_node_id
    return node


def _reply(message: Message, metrics: Mapping[str, float], arrays: Arrays | None) -> Message:
    content = RecordDict({METRICS: MetricRecord(dict(metrics))})
    if arrays is not None:
        content[ARRAYS] = to_record(arrays)
    return Message(content, reply_to=message)
