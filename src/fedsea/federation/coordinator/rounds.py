"""The rounds of a federation: clients are waited for, a strategy samples them and combines their replies, a report.

One of Flower's stock strategies (FedAvg and its relatives) samples clients and combines their replies. Here each of
them gets a seat at a block server, what it trains and its ticket, and its reply is made a whole adapter before the
strategy sees it: what the client has trained, and for the layers of its middle the average over all clients whose
middle has the layer, over all block servers. With FedAvg a layer is so averaged over all that trained it, weighted by
examples, at whichever side it was trained. What compares single clients (FedMedian, Krum, ...) compares the ends that
they have trained; of the middle it sees the average only.
"""

import logging
import time
from pathlib import Path
from typing import cast

import numpy as np
from flwr.app import MessageType
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedsea.errors import UsageError
from fedsea.federation.arrays import Arrays, from_record, to_record
from fedsea.federation.coordinator.exchange import Exchange, FederationContext
from fedsea.federation.coordinator.members import Directory
from fedsea.federation.coordinator.replies import EXAMPLES, failure
from fedsea.federation.flower.grid import send_and_receive
from fedsea.federation.flower.strategy import strategy_state
from fedsea.federation.owner.worker import FINISH

log = logging.getLogger("flwr")


class FederatedTraining:
    """Does a federation's rounds; `weights` is the whole adapter after the `done` rounds."""

    def __init__(self, federation: FederationContext, strategy: FlowerStrategy, weights: Arrays, done: int) -> None:
        self._federation, self._strategy, self._settings = federation, strategy, federation.settings
        self.weights, self.done = weights, done
        self._clients = cast(Grid, federation.directory)  # as much of a grid as strategies sample from

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
        federation, number = self._federation, self.done + 1
        federation.show("asking clients", number)
        this, whole = Exchange(federation, number, self.weights, training=True), to_record(self.weights)
        sampled = self._strategy.configure_train(number, whole, this.config, self._clients)
        arrays, metrics = self._strategy.aggregate_train(number, this.conduct(sampled))
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
        federation, number = self._federation, self.done
        this, whole = Exchange(federation, number, self.weights, training=False), to_record(self.weights)
        sampled = self._strategy.configure_evaluate(number, whole, this.config, self._clients)
        metrics = self._strategy.aggregate_evaluate(number, this.conduct(sampled))
        log.info("\t└──> Aggregated MetricRecord: %s", metrics)
        values = {name: value for name, value in (metrics or {}).items() if name != EXAMPLES}
        evaluation = {"metrics": values, "clients": this.clients, "dropped": this.dropped}
        federation.folder.add_evaluation(number, evaluation)
        federation.show("evaluated", number, evaluation=values)

    def _report(self, this: Exchange) -> None:
        federation, clients = self._federation, this.clients.values()
        examples = sum(its[EXAMPLES] for its in clients)
        losses = sum(its["train-loss"] * its[EXAMPLES] for its in clients)
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
            "refused": dict(federation.directory.refused.values()),
        }
        federation.folder.save(this.number, self.weights, strategy_state(self._strategy, self.weights), report)
        federation.show("round done", this.number, loss=report["loss"])

    def _wait_for_clients(self) -> None:
        """Until enough clients are there, have said what they are, and may take part.

        Raises
        ------
        UsageError
            If nothing has changed for `wait-seconds`, with who is missing or refused.
        """
        settings, federation, directory = self._settings, self._federation, self._federation.directory
        wanted, seen, since = settings.min_clients if self.done else settings.clients, (-1, -1), time.monotonic()
        while True:
            directory.update()
            unknown, there = directory.ask_all(), len(list(federation.grid.get_node_ids()))
            answered, ready = there - unknown, len(directory.members)
            if there >= wanted and ready >= settings.min_clients:
                if not unknown:
                    return
                if time.monotonic() - since > settings.join_seconds:
                    directory.give_up_asking()
                    return
            if (answered, there) != seen:
                seen, since = (answered, there), time.monotonic()  # they are coming
                federation.notice(f"waiting for clients: {there} of {wanted} are connected, {answered} ready")
                federation.show("waiting for clients", self.done + 1, connected=there, ready=answered)
            if settings.wait_seconds and time.monotonic() - since > settings.wait_seconds:
                raise UsageError(_why_waiting(there, wanted, directory))
            time.sleep(0.1)

    def hand_over(self, adapter: Path) -> None:
        """Send the whole adapter, which is in the folder `adapter`, to all registered clients that are there.

        Says which of them have not got it. Simulated clients are not registered: they have no place to keep it.
        """
        settings, federation = self._settings, self._federation
        there = set(federation.grid.get_node_ids()) & settings.registered.keys()
        members = federation.directory.admit(sorted(there), settings.join_seconds)
        if not members:
            return
        federation.show("handing over the adapter", settings.rounds)
        kind = f"{MessageType.QUERY}.{FINISH}"
        messages = [federation.message(member.node, kind, self.weights, {}) for member in members]
        replies, failed = send_and_receive(federation.grid, messages, settings.join_seconds, lambda _waiting: {})
        failed |= {node: why for node, reply in replies if (why := failure(reply))}
        for member in members:
            if member.node in failed:
                why = failed[member.node]
                federation.notice(f"client {member.name} has not got the adapter ({why}): give it the folder {adapter}")


def _why_waiting(there: int, wanted: int, directory: Directory) -> str:
    refused = "; ".join(f"{name} is refused: {reason}" for name, reason in directory.refused.values())
    if there < wanted:
        simulated = 'with flwr run, --federation-config "num-supernodes=N" says how many there are'
        return f"only {there} of {wanted} clients are connected; {refused or simulated}"
    return refused or "no client has said what it is"
