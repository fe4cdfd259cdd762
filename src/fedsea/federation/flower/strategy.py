"""Flower's strategies for adapters of which each client trains the ends and block servers train the middle.

`FedSEAMixin` stands before any stock strategy that averages (FedAvg and its relatives). The stock one samples clients
and combines their replies; the mixin sees to it that there is a seat at a block server for each of them, that each is
sent what it trains and its ticket, and that a reply is a whole adapter by the time the stock one sees it: what the
client has trained, and for the layers of its middle the average over all clients whose middle has the layer, over all
block servers. With FedAvg a layer is so averaged over whoever trained it, weighted by examples, at whichever side it
was trained. What compares single clients (FedMedian, Krum, ...) compares the ends that they have trained; of the middle
it sees the average only.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import flwr.serverapp.strategy as stock
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedsea.errors import ProtocolError, UsageError
from fedsea.federation.arrays import Arrays, Shapes, cut_to_reach, from_record, to_record
from fedsea.federation.coordinator import replies as checked
from fedsea.federation.coordinator.block_servers import Seats
from fedsea.federation.coordinator.members import Directory, Member
from fedsea.federation.coordinator.round_context import FederationContext, LatenessCheck, RoundContext
from fedsea.federation.flower.grid import FederationGrid, exchange
from fedsea.federation.flower.strategy_state import strategy_state
from fedsea.parts.averaging import WeightedMean
from fedsea.wire.rounds import Strategy

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
REJECTED = 100  # code of the error that stands for a reply that was rejected; Flower's own are below


class FedSEAMixin(stock.FedAvg):
    """To be put before a stock strategy: `class Mine(FedSEAMixin, FedAdam)`; see `make_strategy`.

    Attributes
    ----------
    federation
        What it works with.
    done
        Rounds that are over.
    weights
        The whole adapter after them.
    """

    federation: FederationContext
    done: int
    _round: RoundContext | None
    weights: Arrays
    _succeeded: int

    def work_with(self, federation: FederationContext, weights: Arrays, done: int = 0) -> None:
        """Set what the strategy works with, before `start`.

        Parameters
        ----------
        weights
            The whole adapter, after `done` rounds.
        """
        self.federation, self.done, self.weights, self._round, self._succeeded = federation, done, weights, None, 0

    def run(self, grid: Grid) -> Arrays:
        """Do the rounds that are left; returns the adapter.

        Raises
        ------
        FedSEAError
            If no block server answers, or no client has trained in any round.
        """
        settings = self.federation.settings
        left = settings.rounds - self.done
        if left > 0:
            self._wait_for_clients(grid)
            self.start(grid, to_record(self.weights), num_rounds=left, timeout=settings.round_seconds)
            if not self._succeeded:
                raise UsageError("no round has had a result; what went wrong is said above, and in rounds.jsonl")
        return self.weights

    def start(self, grid: Grid, *args: Any, **kwargs: Any) -> Any:
        """As Flower's, with a grid that this strategy conducts."""
        return super().start(FederationGrid(grid, self._conduct, self.federation.directory), *args, **kwargs)

    # Flower's four hooks

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message for each sampled client that is admitted; what only it is told is put in when it is sent."""
        self._grid, number = grid, self.done + 1
        self.federation.show("asking clients", number)
        messages = super().configure_train(number, arrays, config, grid)
        return self._begin(number, messages, config, grid, training=True)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As for training, every `eval-every` rounds."""
        every = self.federation.settings.eval_every
        self._round = None
        if not every or self.done % every:
            return []
        messages = super().configure_evaluate(self.done, arrays, config, grid)
        return self._begin(self.done, messages, config, grid, training=False)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The stock strategy's result of the whole adapters, saved."""
        this = self._round
        if this is None:
            return None, None
        arrays, metrics = super().aggregate_train(this.number, replies)
        if arrays is not None:
            result = {name: array.astype(np.float32) for name, array in from_record(arrays).items()}
            if all(bool(np.isfinite(array).all()) for array in result.values()):
                self.weights, self._succeeded = result, self._succeeded + 1
            else:
                self.federation.notice(f"round {this.number}: {type(self).__name__}'s result is not finite; left out")
                this.dropped |= dict.fromkeys(this.clients, "the strategy's result is not finite")
                this.clients.clear()
        self.done = this.number
        self._report(this)
        return to_record(self.weights), metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The stock strategy's average of the metrics that all clients gave."""
        metrics = super().aggregate_evaluate(self.done, replies)
        this = self._round
        if this is not None:
            values = {name: value for name, value in metrics.items() if name != "num-examples"} if metrics else {}
            evaluation = {"metrics": values, "clients": this.clients, "dropped": this.dropped}
            self.federation.folder.add_evaluation(this.number, evaluation)
            self.federation.show("evaluated", this.number, evaluation=values)
        return metrics

    # One exchange

    def _begin(
        self, number: int, messages: Iterable[Message], config: ConfigRecord, grid: Grid, *, training: bool
    ) -> list[Message]:
        sampled = {message.metadata.dst_node_id: message for message in messages}
        seconds = self.federation.settings.join_seconds
        members = self.federation.directory.admit(_inner(grid), sampled, seconds)
        self._round = RoundContext(
            number, dict(self.weights), config, {member.node: member for member in members}, training
        )
        for node in sampled.keys() - self._round.members.keys():
            name, reason = self.federation.directory.refused.get(node, (f"node {node}", "it does not answer"))
            self._round.dropped[name] = reason
        return [sampled[member.node] for member in members]

    def _conduct(self, messages: Sequence[Message], timeout: float | None) -> list[Message]:
        """What Flower's `send_and_receive` is here: stage after stage, each with its seats at the block servers."""
        this = self._round
        if this is None or not messages:
            return []
        settings = self.federation.settings
        turns = settings.mode == "sequential" and this.training
        size = 1 if turns else settings.clients_at_once or len(messages)
        groups = [messages[first : first + size] for first in range(0, len(messages), size)]
        results: list[tuple[Member, checked.Reply]] = []
        errors: list[Message] = []
        end = time.monotonic() + (timeout or settings.round_seconds)
        for number, group in enumerate(groups):
            label = f"{settings.name}.{this.number}" + ("" if this.training else ".e")
            label += f".t{number}" if len(groups) > 1 or turns else ""
            good, bad = self._stage(this, label, group, end - time.monotonic())
            errors += bad
            if turns and good:
                # The next one goes on from what this one has left; the round's result is the last one's.
                this.weights |= self._whole(this, *good[0])
                this.mean = WeightedMean()
            results += good
        results.sort(key=lambda result: result[0].name)
        for member, reply in results:
            this.clients[member.name] = reply.metrics
        if turns and results:
            last = next(message for message in reversed(messages) if _node(message) in {m.node for m, _ in results})
            means = checked.common_metrics([reply.metrics for _, reply in results])
            return [_reply(last, checked.mean_metrics(means), this.weights), *errors]
        by_node = {_node(message): message for message in messages}
        metrics = checked.common_metrics([reply.metrics for _, reply in results])
        return [
            _reply(by_node[member.node], its, self._whole(this, member, reply) if this.training else None)
            for (member, reply), its in zip(results, metrics, strict=True)
        ] + errors

    def _stage(
        self, this: RoundContext, label: str, messages: Sequence[Message], seconds: float
    ) -> tuple[list[tuple[Member, checked.Reply]], list[Message]]:
        """Open, send, wait, check, average, close. Gives the replies that count, and errors for the others."""
        federation, directory = self.federation, self.federation.directory
        members = [this.members[_node(message)] for message in messages]
        mode = cast(Strategy, federation.settings.mode if this.training else "client-batch")
        stage = federation.servers.open(label, mode, members, this.weights, directory.requirements.servers_for)
        settled = False
        try:
            seated = [member for member in members if member.name in stage.tickets]
            sent = [self._message(this, stage, member) for member in seated]
            watch = LatenessCheck(federation, this, stage)
            grid = _inner(self._grid)
            raw, missing = exchange(grid, sent, max(0.0, seconds), watch)
            for node in missing:
                directory.missed(grid, node)
                stage.failed[this.members[node].name] = missing[node]
            good = self._check(this, stage, raw)
            if this.training:
                examples = {member.name: reply.metrics[checked.EXAMPLES] for member, reply in good}
                by_name = {member.name: member for member in members}
                federation.servers.average(stage, by_name, examples, this.mean)
                settled = True
        finally:
            if not settled:
                federation.servers.close(stage)
        this.stragglers += sorted(watch.straggled)
        for name, why in stage.failed.items():
            federation.notice(f"round {this.number}: client {name} does not count: {why}")
            this.dropped[name] = why
        errors = [
            Message(Error(REJECTED, stage.failed[this.members[_node(message)].name]), reply_to=message)
            for message in messages
            if this.members[_node(message)].name in stage.failed
        ]
        return [(member, reply) for member, reply in good if member.name not in stage.failed], errors

    def _message(self, this: RoundContext, stage: Seats, member: Member) -> Message:
        """What one client is sent: the weights that it trains itself, its ticket, and how to train."""
        federation = self.federation
        local = federation.servers.terms.local_of(member)
        own = {
            "ticket": stage.tickets[member.name].to_body(),
            "lora": dict(federation.lora),
            "recipe": federation.settings.recipe(),
            "evaluation": federation.settings.evaluation(),
            "round": this.number,
            "private-ends": federation.settings.name if federation.settings.private_ends else "",
        }
        config = ConfigRecord({**this.config, "fedsea": json.dumps(own)})
        content = RecordDict({ARRAYS: to_record({name: this.weights[name] for name in local}), CONFIG: config})
        kind = MessageType.TRAIN if this.training else MessageType.EVALUATE
        return Message(content, member.node, kind, group_id=str(this.number))

    def _check(
        self, this: RoundContext, stage: Seats, replies: Sequence[tuple[int, Message | None]]
    ) -> list[tuple[Member, checked.Reply]]:
        good = []
        for node, message in replies:
            member = this.members[node]
            shapes = self._wanted(member) if this.training else None
            reply = checked.read_reply(message, shapes)
            if not isinstance(reply, str):
                reply = self._counted(this, member, reply)
            if isinstance(reply, str):
                stage.failed[member.name] = reply
                if reply.startswith(checked.CHANGED):
                    self.federation.directory.forget(member.node)
            else:
                good.append((member, reply))
        return sorted(good, key=lambda one: one[0].name)

    def _counted(self, this: RoundContext, member: Member, reply: checked.Reply) -> checked.Reply | str:
        """A reply as far as it counts: a training's by the examples the client was admitted with, and by the recipe."""
        settings = self.federation.settings
        examples = min(reply.metrics[checked.EXAMPLES], settings.max_examples)
        metrics = reply.metrics | {checked.EXAMPLES: examples}
        if not this.training:
            return checked.Reply(metrics, reply.arrays)
        if examples != member.examples:
            told = f"{reply.metrics[checked.EXAMPLES]:g} examples, and was admitted with {member.examples}"
            return f"{ProtocolError.code}: it has trained on {told}"
        most = settings.most_moved()
        arrays, outside = cut_to_reach(reply.arrays, this.weights, most) if most else (reply.arrays, False)
        if outside:
            self.federation.notice(
                f"round {this.number}: client {member.name} has moved weights farther than the recipe can; they "
                "count as far as it can (if the client adds noise, see the setting reach)"
            )
        return checked.Reply(metrics, arrays)

    def _wanted(self, member: Member) -> Shapes:
        """What a client's reply must have."""
        return {} if self.federation.settings.private_ends else self.federation.servers.terms.local_of(member)

    def _whole(self, this: RoundContext, member: Member, reply: checked.Reply) -> Arrays:
        """A client's reply as a whole adapter: what it has trained, and the average of its middle.

        Where clients keep their ends, these are as they were at the start, and every layer that was in anybody's middle
        is the average over those in whose it was.
        """
        private, terms = self.federation.settings.private_ends, self.federation.servers.terms
        means = this.mean.of(this.mean.names if private else terms.middle_of(member))
        return (this.weights if private else reply.arrays) | {name: mean.numpy() for name, mean in means.items()}

    # What is told

    def _report(self, this: RoundContext) -> None:
        examples = sum(its[checked.EXAMPLES] for its in this.clients.values())
        losses = sum(its["train-loss"] * its[checked.EXAMPLES] for its in this.clients.values())
        report = {
            "round": this.number,
            "mode": self.federation.settings.mode,
            "loss": losses / examples if examples else None,
            "seconds": round(time.monotonic() - this.began, 2),
            "bytes_up": sum(int(its["bytes-up"]) for its in this.clients.values()),
            "bytes_down": sum(int(its["bytes-down"]) for its in this.clients.values()),
            "clients": this.clients,
            "stragglers": sorted(set(this.stragglers)),
            "dropped": this.dropped,
            "refused": dict(self.federation.directory.refused.values()),
        }
        self.federation.folder.save(this.number, self.weights, strategy_state(self), report)
        self.federation.show("round done", this.number, loss=report["loss"])

    def _wait_for_clients(self, grid: Grid) -> None:
        """Until enough clients are there, have said what they are, and may take part.

        Raises
        ------
        UsageError
            If nothing has changed for `wait-seconds`, with who is missing or refused.
        """
        settings, directory = self.federation.settings, self.federation.directory
        wanted, told, since = settings.min_clients if self.done else settings.clients, (-1, -1), time.monotonic()
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
            if (answered, there) != told:
                told, since = (answered, there), time.monotonic()  # they are coming
                self.federation.notice(f"waiting for clients: {there} of {wanted} are connected, {answered} ready")
                self.federation.show("waiting for clients", self.done + 1, connected=there, ready=answered)
            if settings.wait_seconds and time.monotonic() - since > settings.wait_seconds:
                raise UsageError(_why_waiting(there, wanted, directory))
            time.sleep(0.1)


def _why_waiting(there: int, wanted: int, directory: Directory) -> str:
    refused = "; ".join(f"{name} is refused: {reason}" for name, reason in directory.refused.values())
    if there < wanted:
        missing = f"only {there} of {wanted} clients are connected"
        simulated = 'with flwr run, --federation-config "num-supernodes=N" says how many there are'
        return f"{missing}; {refused or simulated}"
    return refused or "no client has said what it is"


def _inner(grid: Grid) -> Grid:
    return grid.inner if isinstance(grid, FederationGrid) else grid


def _node(message: Message) -> int:
    node: int = message.metadata.dst_node_id
    return node


def _reply(message: Message, metrics: Mapping[str, float], arrays: Arrays | None) -> Message:
    content = RecordDict({METRICS: MetricRecord(dict(metrics))})
    if arrays is not None:
        content[ARRAYS] = to_record(arrays)
    return Message(content, reply_to=message)
