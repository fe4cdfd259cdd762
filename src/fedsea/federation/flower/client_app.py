"""A data owner's side for Flower: the ClientApp. It passes on what comes, to a worker or a participant in this process.

Deployed, Flower starts a process for each message, and this one is thin: neither torch nor transformers is imported,
and the worker that `fedsea federation join` runs does the work (its socket is named by the environment variable
FEDSEA_WORKER, or by `worker` in the SuperNode's node configuration). In simulation the participants live in this
process, their data and models between messages.

With `dp-clip` (in the run configuration, or in the node configuration, which then decides) a client's update is clipped
to that norm and gets Gaussian noise for `dp-epsilon` and `dp-delta`, in each round anew (`owner/local_dp.py`); the
formula is that of the classical Gaussian mechanism, which holds for an epsilon below 1. docs/federation.md says what
that protects, and what it does not.
"""

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedsea.errors import FedSEAError, ProtocolError, TermsError, UsageError
from fedsea.federation.arrays import Arrays, from_record, to_record
from fedsea.federation.owner.local_dp import deviation_of, protected
from fedsea.federation.owner.worker import FINISH, Worker, WorkerClient, write_error
from fedsea.federation.settings import Settings
from fedsea.files import parse_json

if TYPE_CHECKING:  # they import torch
    from fedsea.federation.owner.participant import Participant
    from fedsea.federation.owner.prepared_models import PreparedModels

FAILED = 2  # Flower's code for a ClientApp that has failed
STATE, NEXT_BATCH = "fedsea", "next-batch"

log = logging.getLogger("flwr")
app = ClientApp()


def protect(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """A mod of Flower's: local differential privacy of what the coordinator gets, where it is set; see above."""
    chosen = context.node_config if "dp-clip" in context.node_config else context.run_config
    clip = float(chosen.get("dp-clip", 0.0))
    if not clip:
        return call_next(message, context)
    epsilon, delta = float(chosen.get("dp-epsilon", 0.0)), float(chosen.get("dp-delta", 1e-5))
    if not (clip > 0 and epsilon > 0 and 0 < delta < 1):
        return failure(message, TermsError("dp-clip needs dp-epsilon above 0 and dp-delta between 0 and 1"))
    # Any two updates of a norm up to the clip are at most twice the clip apart.
    sensitivity = float(chosen.get("dp-sensitivity", 0.0)) or 2 * clip
    reply = call_next(message, context)
    if reply.has_error() or not any(reply.content.array_records.values()):
        return reply  # nothing is sent that could be protected
    (name, trained), *_ = reply.content.array_records.items()
    before = from_record(next(iter(message.content.array_records.values())))
    sent = protected(before, from_record(trained), clip, deviation_of(sensitivity, epsilon, delta))
    reply.content[name] = to_record(sent)
    return reply


def answered(work: Callable[[Message, Context], dict[str, Any]]) -> Callable[[Message, Context], Message]:
    """A handler of Flower's that answers with the records that `work` gives, or with its error."""

    @wraps(work)
    def handle(message: Message, context: Context) -> Message:
        try:
            return Message(RecordDict(work(message, context)), reply_to=message)
        except Exception as error:
            return failure(message, error)

    return handle


@app.query()
@answered
def query(message: Message, context: Context) -> dict[str, Any]:
    """Say what this client brings."""
    return {"config": ConfigRecord({"description": json.dumps(worker_of(context).describe())})}


@app.train(mods=[protect])
@answered
def train(message: Message, context: Context) -> dict[str, Any]:
    """Take part in a round of training."""
    body, weights = _read(message)
    state = context.state.config_records.get(STATE, ConfigRecord())
    if NEXT_BATCH in state:
        body["first-batch"] = state[NEXT_BATCH]
    metrics, trained = worker_of(context).train(body, weights)
    context.state[STATE] = ConfigRecord({NEXT_BATCH: metrics.pop(NEXT_BATCH)})
    return {"arrays": to_record(trained), "metrics": MetricRecord(metrics)}


@app.evaluate()
@answered
def evaluate(message: Message, context: Context) -> dict[str, Any]:
    """Evaluate the global adapter on this client's validation split."""
    return {"metrics": MetricRecord(worker_of(context).evaluate(*_read(message)))}


@app.query(FINISH)
@answered
def finish(message: Message, context: Context) -> dict[str, Any]:
    """The federation is over: keep its adapter."""
    worker_of(context).finish(*_read(message))
    return {"config": ConfigRecord({"kept": True})}


def _read(message: Message) -> tuple[dict[str, Any], Arrays]:
    content = message.content
    if len(content.array_records) != 1 or len(content.config_records) != 1:
        raise ProtocolError("a round's message has one record of arrays and one of settings")
    config = dict(next(iter(content.config_records.values())))
    try:
        own = parse_json(str(config.pop("fedsea")))
        weights = from_record(next(iter(content.array_records.values())))
    except (KeyError, ValueError, TypeError):
        raise ProtocolError("a round's message cannot be read; is the coordinator a FedSEA ServerApp?") from None
    if not isinstance(own, dict):
        raise ProtocolError("a round's message cannot be read")
    return {**config, **own}, weights


def failure(message: Message, error: Exception) -> Message:
    """An error as one line for the coordinator: code, and as much of the message as it may read (`write_error`)."""
    trace = None if isinstance(error, FedSEAError) else error
    log.warning("fedsea: the client failed: %s", write_error(error, to_owner=True)["message"], exc_info=trace)
    written = write_error(error)
    return Message(Error(FAILED, f"{written['code']}: {written['message']}"), reply_to=message)


def worker_of(context: Context) -> Worker:
    """The worker that is named, else this simulated client's participant; TermsError if there is neither."""
    named = context.node_config.get("worker")
    worker = WorkerClient(str(named)) if named else WorkerClient.from_environment()
    if worker is not None:
        return worker
    if "partition-id" not in context.node_config:
        raise TermsError("this SuperNode has no worker: start it with `fedsea federation join`")
    return simulated.participant(Settings.from_run_config(context.run_config), context.node_config)


class SimulatedClients:
    """The participants of this process; the least used of more than `size` is read anew when it is used again."""

    def __init__(self, size: int = 64) -> None:
        self._size, self._lock = size, threading.Lock()
        self.participants: OrderedDict[str, Participant] = OrderedDict()
        self.models: PreparedModels | None = None

    def participant(self, settings: Settings, node_config: Mapping[str, Any]) -> "Participant":
        """The participant of a node."""
        from fedsea.federation.owner.participant import Participant
        from fedsea.federation.owner.participant_options import ParticipantOptions
        from fedsea.federation.owner.prepared_models import PreparedModels

        options = simulated_options(settings, node_config)
        key = json.dumps(options, sort_keys=True)
        with self._lock:
            if self.models is None:
                self.models = PreparedModels()
            if key not in self.participants:
                while len(self.participants) >= self._size:
                    self.participants.popitem(last=False)
                self.participants[key] = Participant(ParticipantOptions.from_body(options), self.models)
            self.participants.move_to_end(key)
            return self.participants[key]

    def close(self) -> None:
        """Give all up."""
        self.participants.clear()
        if self.models is not None:
            self.models.close()


simulated = SimulatedClients()


def simulated_options(settings: Settings, node_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a simulated client decides: the same for all, but for its name and its shard of the data."""
    index, count = int(node_config["partition-id"]), int(node_config["num-partitions"])
    name = f"client-{index}"
    if not settings.task or not settings.data:
        raise UsageError("a simulation needs task and data: where its clients' examples are")
    credentials = f"{settings.client_credentials}/{name}" if settings.client_credentials else None
    same = ("model", "task", "data", "noise", "dtype", "threads")
    return {key: getattr(settings, key) for key in (*same, "max_tokens")} | {
        "name": name,
        "partition": {"input_layers": settings.input_layers, "output_layers": settings.output_layers},
        "servers": settings.addresses,
        "credentials": credentials,
        "insecure": credentials is None,
        "private_ends": f"{settings.output}/own-ends/{name}.safetensors" if settings.private_ends else "",
        "shard": settings.shards if settings.shards == "folders" else f"{settings.shards}:{index}/{count}",
        "shard_seed": settings.seed,
    }
