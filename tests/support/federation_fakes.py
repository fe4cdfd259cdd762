"""Clients and block servers that only do arithmetic, to check what a coordinator makes of their answers."""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsea.checkpoints import Fingerprint, open_checkpoint
from fedsea.errors import FedSEAError, NonFiniteError, ProtocolError, ServerUnavailableError
from fedsea.federation.flower.server_app import run_federation
from fedsea.federation.owner.data import task_schema
from fedsea.federation.recipe import lora_config
from fedsea.federation.settings import Settings
from fedsea.partition import Partition, layer_of
from fedsea.parts.adapter_files import read_adapter
from fedsea.parts.adapters import AdapterSpec, adapter_parameters
from fedsea.tasks import get_task
from fedsea.wire.rounds import MemberStatus, RoundPlan, RoundStatus, ServerDescription, Ticket
from tests.support.flower_grid import InProcessGrid

MODEL, LAYERS = "random:tiny", 6
FINGERPRINT: Fingerprint = open_checkpoint(MODEL).fingerprint()
Weights = dict[str, np.ndarray]


def trained(name: str, before: np.ndarray, client: str) -> np.ndarray:
    """What a client's training makes of a weight: the same at whichever side it is trained."""
    seed = int.from_bytes(hashlib.blake2b(f"{name} {client}".encode(), digest_size=4).digest(), "little")
    return (before + np.random.default_rng(seed).normal(size=before.shape)).astype(np.float32)


class FakeServer:
    """A block server, as `BlockServerAdmin` shows it: members' middle layers are trained as `trained` says."""

    def __init__(self, address: str = "127.0.0.1:1", layers: range = range(LAYERS)) -> None:
        self.address, self.layers = address, layers
        self.plans: dict[str, RoundPlan] = {}
        self.weights: dict[str, Weights] = {}
        self.finished: dict[str, dict[str, Partition]] = {}
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.aggregated: list[tuple[str, dict[str, float]]] = []
        self.down = False
        self.fails: FedSEAError | None = None
        self.spoiled: set[str] = set()
        self.silent: dict[str, float] = {}
        self.ignored: set[str] = set()

    def describe(self) -> ServerDescription:
        return ServerDescription(FINGERPRINT.restrict(self.layers), self.layers, LAYERS)

    def open_round(self, plan: RoundPlan, weights: Mapping[str, Tensor]) -> None:
        if self.down:
            raise ServerUnavailableError(f"nobody answers at {self.address}")
        self.opened.append(plan.label)
        self.plans[plan.label], self.finished[plan.label] = plan, {}
        self.weights[plan.label] = {name: weight.numpy().copy() for name, weight in weights.items()}

    def finish(self, ticket: Ticket, partition: Partition) -> None:
        """A client takes its seat, trains and finishes."""
        label = ticket.run.removesuffix(f".{ticket.client}")
        seats = {seat.client: seat for seat in self.plans[label].members}
        assert seats[ticket.client].admits(ticket.token)
        if ticket.client not in self.ignored:
            self.finished[label][ticket.client] = partition

    def status(self, label: str) -> RoundStatus:
        members = []
        for name in (seat.client for seat in self.plans[label].members):
            done, silent = name in self.finished[label], self.silent.get(name, 0.0)
            state: Any = "finished" if done else "joined" if silent else "expected"
            members.append(MemberStatus(name, state, 3, False, 10, 20, silent))
        return RoundStatus(label, self.plans[label].strategy, tuple(members))

    def aggregate(self, label: str, weights: Mapping[str, float]) -> dict[str, Tensor]:
        if self.fails is not None:
            raise self.fails
        if label not in self.plans:
            raise ProtocolError(f"there is no round {label!r}")
        if named := sorted(self.spoiled & weights.keys()):
            raise NonFiniteError(f"the middle's weights are not finite: {', '.join(named)}")
        self.aggregated.append((label, dict(weights)))
        average = {}
        for name, before in self.weights[label].items():
            held = [one for one in weights if layer_of(name) in self.finished[label][one].middle(LAYERS)]
            if held:
                total = sum(weights[one] * trained(name, before, one).astype(np.float64) for one in held)
                average[name] = torch.from_numpy((total / sum(weights[one] for one in held)).astype(np.float32))
        del self.plans[label]
        return average

    def close_round(self, label: str) -> None:
        self.closed.append(label)
        self.plans.pop(label, None)


class FakeClient:
    """A client whose training is `trained`; fields say what it does wrong."""

    def __init__(self, name: str, partition: Partition, examples: int) -> None:
        self.name, self.partition, self.examples = name, partition, examples
        self.says: Any = {}  # of itself, in place of what is true; a text in place of all
        self.spoil: Callable[[Message, RecordDict], Any] = lambda _message, _content: None  # or gives another reply
        self.answers = True
        self.error: str | None = None
        self.bodies: list[dict[str, Any]] = []
        self.received: list[set[str]] = []

    def describe(self) -> Any:
        if not isinstance(self.says, dict):
            return self.says
        body = {"name": self.name, "partition": [self.partition.input_layers, self.partition.output_layers]}
        body |= {"examples": self.examples, "fingerprint": FINGERPRINT.to_json()}
        return json.dumps(body | {"task": "cb", "schema": task_schema(get_task("cb")), "lora": None} | self.says)

    def train(self, message: Message) -> RecordDict:
        weights = {name: trained(name, array.numpy(), self.name) for name, array in message.content["arrays"].items()}
        metrics = {"num-examples": self.examples, "train-loss": 1.0 + self.examples, "steps": 3, "tokens": 30}
        metrics |= {"bytes-up": 100, "bytes-down": 200, "seconds": 0.5}
        arrays = ArrayRecord({name: Array(value) for name, value in weights.items()})
        return RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})


class World:
    """Fake clients and fake block servers, and the ClientApp that joins them."""

    def __init__(self, clients: list[FakeClient], servers: list[FakeServer]) -> None:
        self.clients, self.servers = clients, {server.address: server for server in servers}
        self.lock, self.at_work, self.most_at_work = threading.Lock(), 0, 0

    def __call__(self, message: Message, context: Context) -> Message | None:
        """What all ClientApps together are."""
        client = self.clients[context.node_id - 1]
        if not client.answers:
            return None
        kind = message.metadata.message_type
        if kind == "query":
            config = ConfigRecord({"description": client.describe()})
            return Message(RecordDict({"config": config}), reply_to=message)
        config = dict(message.content["config"])
        body = json.loads(config.pop("fedsea")) | config
        with self.lock:
            client.bodies.append(body)
            client.received.append(set(message.content["arrays"]))
            self.at_work += 1
            self.most_at_work = max(self.most_at_work, self.at_work)
        try:
            return self._train(client, message, body) if kind == "train" else self._evaluate(client, message)
        finally:
            with self.lock:
                self.at_work -= 1

    def _train(self, client: FakeClient, message: Message, body: dict[str, Any]) -> Message:
        if client.error is not None:
            return Message(Error(2, client.error), reply_to=message)
        ticket = Ticket.from_body(body["ticket"])
        assert ticket.client == client.name
        content = client.train(message)
        other = client.spoil(message, content)
        with self.lock:
            self.servers[ticket.server].finish(ticket, client.partition)
        return other if hasattr(other, "metadata") else Message(content, reply_to=message)

    def _evaluate(self, client: FakeClient, message: Message) -> Message:
        metrics = {"num-examples": client.examples, "accuracy": client.examples / 100}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def clients(*given: tuple[int, int, int]) -> list[FakeClient]:
    """Clients called ann, bob, ...: input layers, output layers, examples of each."""
    names = ("ann", "bob", "cyd", "dan", "eve", "fay")
    return [FakeClient(name, Partition(p, q), n) for name, (p, q, n) in zip(names, given, strict=False)]


MIXED = ((1, 1, 10), (2, 1, 30), (1, 3, 5))


class Run:
    """A federation of fakes: ann, bob and cyd at one block server, unless a world is given."""

    def __init__(self, tmp_path: Path, world: World | None = None, **settings: Any) -> None:
        self.notices: list[str] = []
        self.world = world if world is not None else World(clients(*MIXED), [FakeServer()])
        self.clients, self.server = self.world.clients, next(iter(self.world.servers.values()))
        self.grid = InProcessGrid(self.world, len(self.clients))
        given = {"name": "fakes", "model": MODEL, "servers": ",".join(self.world.servers), "rounds": 1}
        given |= {"lora_rank": 2, "lora_targets": "q_proj,o_proj", "lr": 1.0}  # `trained` goes farther than trainings
        given |= {"clients": len(self.clients), "output": str(tmp_path / "out")}
        given |= {"join_seconds": 5.0, "straggler_seconds": 5.0}
        self.settings = Settings(**(given | settings))
        self.folder = Path(self.settings.output)

    def start(self) -> Weights:
        """The adapter after the last round."""
        servers: Any = list(self.world.servers.values())
        run_federation(self.grid, self.settings, servers, self.notices.append)
        lora, weights = read_adapter(self.folder / "adapter")
        assert lora.r == self.settings.lora_rank
        return {name: weight.numpy() for name, weight in weights.items()}

    def first(self) -> Weights:
        """The adapter before the first round, as every part of FedSEA would start it."""
        config = open_checkpoint(MODEL).config
        spec = AdapterSpec.from_config(lora_config(self.settings.lora()), config, self.settings.seed)
        whole = AutoModelForCausalLM.from_config(config)
        spec.put_on(whole, range(LAYERS))
        return {name: weight.detach().numpy() for name, weight in adapter_parameters(whole).items()}

    def expected(self, *without: str, rounds: int | None = None) -> Weights:
        """FedAvg of the clients, without some, in each round."""
        weights = self.first()
        for _ in range(self.settings.rounds if rounds is None else rounds):
            weights = averaged(weights, [client for client in self.clients if client.name not in without])
        return weights

    def check(self, *without: str) -> Weights:
        """Start it, and compare with FedAvg of the clients, without some."""
        found = self.start()
        assert_same(found, self.expected(*without))
        return found

    def rounds(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "rounds.jsonl").read_text().splitlines()]


def averaged(before: Weights, members: list[FakeClient]) -> Weights:
    """FedAvg by its definition: every layer over all members, who trained all of them, weighted by examples."""
    total = sum(client.examples for client in members)
    return {
        name: sum(client.examples * trained(name, weight, client.name).astype(np.float64) for client in members) / total
        for name, weight in before.items()
    }


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, rtol=1e-5, atol=1e-6, err_msg=name)
