"""A whole federation in one process: Flower's ServerApp and ClientApps, real participants, a real block server."""

import itertools
import json
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsea import SplitModelForCausalLM
from fedsea.errors import CredentialsError, UsageError
from fedsea.federation import ParticipantOptions
from fedsea.federation.arrays import from_record
from fedsea.federation.coordinator import replies
from fedsea.federation.flower import client_app, server_app
from fedsea.federation.flower.app import project_file
from fedsea.federation.owner.data import Texts
from fedsea.federation.owner.participant import Participant
from fedsea.federation.owner.private_adapter import PrivateAdapter, read_private_adapter
from fedsea.federation.owner.shards import Sharding
from fedsea.federation.recipe import lora_config
from fedsea.federation.settings import Settings
from fedsea.partition import layer_of
from fedsea.parts.adapter_files import read_adapter
from fedsea.tasks import get_task
from fedsea.training.batches import Batches
from fedsea.training.export import export_adapter
from fedsea.wire.credential_files import create_credentials
from fedsea.wire.credentials import Credentials
from tests.conftest import RunningServer, connect
from tests.support.federation_commands import write_cb
from tests.support.federation_fakes import Weights
from tests.support.flower_grid import InProcessGrid
from tests.support.participants import train_alone

EXAMPLE = Path(__file__).parents[2] / "examples" / "federation"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_cb(tmp_path_factory.mktemp("cb"), train=13, validation=6))


@pytest.fixture(scope="module")
def server(start_server: Callable[..., RunningServer]) -> RunningServer:
    return start_server("random:tiny")


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    """Participants of one test are not another's."""
    yield
    client_app.simulated.close()


class AllApart:
    """The ClientApp as processes of their own would run it: each node has models of its own."""

    def __init__(self) -> None:
        self._workers: dict[int, Participant] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        return client_app.app(message, context)

    def worker_of(self, context: Context) -> Any:
        if context.node_id not in self._workers:
            settings = Settings.from_run_config(context.run_config)
            options = client_app.simulated_options(settings, context.node_config) | {"wire_dtype": "float32"}
            self._workers[context.node_id] = Participant(ParticipantOptions.from_body(options))
        return self._workers[context.node_id]

    def close(self) -> None:
        while self._workers:
            self._workers.popitem()[1].close()


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[AllApart]:
    made = AllApart()
    monkeypatch.setattr(client_app, "worker_of", made.worker_of)
    yield made
    made.close()


def config(server: str, data: str, output: Path, **more: Any) -> dict[str, Any]:
    """A run configuration."""
    given = {"name": f"f{abs(hash(str(output))) % 10**8}", "model": "random:tiny", "task": "cb", "data": data}
    given |= {"servers": server, "insecure": True, "rounds": 2, "clients": 3, "lora-rank": 2, "lr": 1e-2}
    given |= {"lora-targets": "q_proj,v_proj", "local-steps": 2, "batch-size": 2, "output": str(output)}
    given |= {"join-seconds": 20.0, "straggler-seconds": 20.0}
    return given | {key.replace("_", "-"): value for key, value in more.items()}


def run(handle: Any, given: dict[str, Any], **how: Any) -> Weights:
    """Run the ServerApp; gives the adapter."""
    grid = InProcessGrid(handle, given["clients"], given, **how)
    server_app.app(grid, Context(1, 0, {}, RecordDict(), given))
    _lora, weights = read_adapter(Path(given["output"]) / "adapter")
    return {name: weight.numpy() for name, weight in weights.items()}


def rounds(given: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(given["output"]) / "rounds.jsonl").read_text().splitlines()]


class Reference:
    """The same federation without any: each client's training is an ordinary run of its own at the block server."""

    def __init__(self, server: RunningServer, given: dict[str, Any]) -> None:
        self.server, self.settings, count = server, Settings.from_run_config(given), given["clients"]
        self.texts = [
            Texts(get_task("cb"), given["data"], Sharding.parse(f"iid:{n}/{count}"), f"client-{n}", "random:tiny", 512)
            for n in range(count)
        ]
        with self._model() as model:
            self.first = model.adapter_state()

    def _model(self) -> SplitModelForCausalLM:
        model = connect(self.server)
        model.add_adapter(lora_config(self.settings.lora()), seed=0)
        return model

    def train(self, whole: dict[str, Tensor], client: int, number: int) -> dict[str, Tensor]:
        """One client's training in round `number`, from 0."""
        model, settings, steps = self._model(), self.settings, self.settings.local_steps
        model.set_adapter_state(whole)
        batches = Batches(self.texts[client].train, settings.batch_size, settings.seed)
        return train_alone(model, settings, [batches[step] for step in range(number * steps, (number + 1) * steps)])[0]

    def mean(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Clients' adapters, weighted by examples."""
        sizes = [len(texts.train) for texts in self.texts]
        return {
            name: sum(size * part[name] for size, part in zip(sizes, parts, strict=True)) / sum(sizes)  # type: ignore[misc]
            for name in parts[0]
        }

    def hierarchical(self) -> dict[str, Tensor]:
        """Separate trainings, then their average weighted by examples, every round."""
        whole = self.first
        for number in range(self.settings.rounds):
            whole = self.mean([self.train(whole, client, number) for client in range(len(self.texts))])
        return whole

    def sequential(self) -> dict[str, Tensor]:
        """One after the other, each from where the last one stopped."""
        whole = self.first
        for number, client in itertools.product(range(self.settings.rounds), range(len(self.texts))):
            whole = self.train(whole, client, number)
        return whole


def assert_same(found: Weights, expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight.numpy(), rtol=1e-4, atol=2e-5, err_msg=name)


def assert_near(found: Weights, expected: dict[str, Tensor], first: dict[str, Tensor]) -> None:
    """The same up to what Adam makes of the rounding of a gradient that is all but 0."""
    assert found.keys() == expected.keys()
    apart = sum(np.square(found[name] - expected[name].numpy()).sum() for name in expected) ** 0.5
    moved = sum(float((expected[name] - first[name]).square().sum()) for name in expected) ** 0.5
    assert apart < 1e-2 * moved


def check_rounds(given: dict[str, Any]) -> None:
    """All clients have been in all rounds, and the federation is done."""
    lines = rounds(given)
    assert [sorted(line["clients"]) for line in lines] == [["client-0", "client-1", "client-2"]] * given["rounds"]
    assert all(not line["dropped"] and not line["stragglers"] and not line["refused"] for line in lines)
    assert all(line["bytes_up"] > 0 < line["bytes_down"] for line in lines)
    assert json.loads((Path(given["output"]) / "now.json").read_text())["doing"] == "done"


def test_clients_in_turn_are_one_training_after_the_other(
    server: RunningServer, data: str, tmp_path: Path, apart: AllApart
) -> None:
    given = config(server.address, data, tmp_path / "out", mode="sequential")
    reference = Reference(server, given)
    assert_near(run(apart, given), reference.sequential(), reference.first)
    check_rounds(given)


def test_client_batch_learns_one_middle_together(
    server: RunningServer, data: str, tmp_path: Path, apart: AllApart
) -> None:
    given = config(server.address, data, tmp_path / "out", mode="client-batch", rounds=4, local_steps=3, eval_every=4)
    found = run(apart, given)
    first = Reference(server, given).first
    assert all(not np.array_equal(found[name], weight.numpy()) for name, weight in first.items())
    losses = [line["loss"] for line in rounds(given)]
    assert losses[-1] < losses[0]
    metrics = rounds(given)[-1]["evaluation"]["metrics"]
    assert metrics.keys() == {"accuracy", "macro_f1", "answer_loss", "perplexity"}


def test_separate_trainings_are_averaged_though_partitions_differ_and_two_block_servers_share_the_middle(
    start_server: Callable[..., RunningServer],
    server: RunningServer,
    data: str,
    tmp_path: Path,
    apart: AllApart,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other, usual = start_server("random:tiny"), client_app.simulated_options
    monkeypatch.setattr(
        client_app,
        "simulated_options",
        lambda given, place: usual(given, place) | {"partition": {"output_layers": 1 + int(place["partition-id"])}},
    )
    given = config(f"{server.address},{other.address}", data, tmp_path / "out")
    # Where a layer is trained makes no difference, so neither does it to the federation.
    assert_same(run(apart, given), Reference(server, given).hierarchical())
    check_rounds(given)


def test_simulated_clients_share_a_process_and_its_model_and_go_on_with_their_data(
    server: RunningServer, data: str, tmp_path: Path
) -> None:
    given = config(server.address, data, tmp_path / "out", clients=6, mode="sequential")
    grid = InProcessGrid(client_app.app, 6, given, at_once=1)
    server_app.app(grid, Context(1, 0, {}, RecordDict(), given))
    assert len(client_app.simulated.participants) == 6
    assert client_app.simulated.models is not None
    assert len(client_app.simulated.models) == 1
    assert len(rounds(given)[0]["clients"]) == 6
    # Whichever process a client is in.
    assert [grid.contexts[node].state["fedsea"]["next-batch"] for node in range(1, 7)] == [4] * 6


def test_errors_reach_the_coordinator_as_one_line(
    server: RunningServer, data: str, tmp_path: Path, apart: AllApart, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Participant._steps

    def steps(self: Any, *args: Any) -> Any:
        if self.options.name == "client-1":
            raise RuntimeError("the private text of a patient")
        return usual(self, *args)

    monkeypatch.setattr(Participant, "_steps", steps)
    given = config(server.address, data, tmp_path / "out", rounds=1)
    run(apart, given)
    assert rounds(given)[0]["dropped"] == {"client-1": "error: the client failed with RuntimeError; its log says why"}
    assert sorted(rounds(given)[0]["clients"]) == ["client-0", "client-2"]


def test_local_differential_privacy_is_of_the_ends_only(
    server: RunningServer, data: str, tmp_path: Path, apart: AllApart
) -> None:
    how: dict[str, Any] = {"rounds": 1, "clients": 1}
    given = config(server.address, data, tmp_path / "plain", **how)
    plain, first = run(apart, given), Reference(server, given).first
    apart.close()  # the next one begins with its data as this one has
    dp = {"dp_clip": 1e-3, "dp_epsilon": 0.5, "dp_delta": 1e-5}
    noised = run(apart, config(server.address, data, tmp_path / "dp", **how, **dp))
    ends = [name for name in plain if layer_of(name) not in range(1, 5)]
    middle = [name for name in plain if name not in ends]
    sigma = 2e-3 * np.sqrt(2 * np.log(1.25 / 1e-5)) / 0.5
    moved = np.concatenate([(noised[name] - first[name].numpy()).ravel() for name in ends])
    assert np.std(moved) == pytest.approx(sigma, rel=0.25)  # of 896 numbers: ten of its own standard deviations
    for name in middle:  # the same as without: nothing of it is protected
        np.testing.assert_allclose(noised[name], plain[name], atol=1e-4)


def test_private_ends_stay_with_their_owners(
    server: RunningServer, data: str, tmp_path: Path, apart: AllApart, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(server.address, data, tmp_path / "out", private_ends=True, eval_every=1)
    reference = Reference(server, given)
    came: list[str] = []
    honest = replies.read_reply

    def seen(message: Message, shapes: Any) -> Any:
        came.extend(name for record in message.content.array_records.values() for name in record)
        return honest(message, shapes)

    monkeypatch.setattr(replies, "read_reply", seen)
    found = run(apart, given)
    assert not came  # no weight of anybody has come
    assert [len(one["clients"]) for one in rounds(given)] == [3, 3]

    wholes = [reference.first] * 3
    for number in range(2):
        parts = [reference.train(whole, client, number) for client, whole in enumerate(wholes)]
        middle = {name: mean for name, mean in reference.mean(parts).items() if layer_of(name) in range(1, 5)}
        wholes = [part | middle for part in parts]
    ends = {name: weight for name, weight in reference.first.items() if name not in middle}
    assert_same({name: found[name] for name in ends}, ends)  # as at the start
    assert_near(found, reference.first | middle, reference.first)
    for client, whole in enumerate(wholes):
        file = tmp_path / "out" / "own-ends" / f"client-{client}.safetensors"
        export_adapter(tmp_path / "out" / "adapter", tmp_path / f"own-{client}", read_private_adapter(file)[0])
        own = read_adapter(tmp_path / f"own-{client}")[1]
        assert_near({name: weight.numpy() for name, weight in own.items()}, whole, reference.first)


def test_ends_of_another_federation_are_not_taken(tmp_path: Path) -> None:
    kept = tmp_path / "ends" / "client-0.safetensors"
    PrivateAdapter(kept, "first").save({"a": torch.ones(2)})
    assert read_private_adapter(kept)[1] == "first"
    with pytest.raises(UsageError, match="has the ends of the federation 'first', this one is 'second'"):
        PrivateAdapter(kept, "second").load()
    kept.write_bytes(b"no tensors")
    with pytest.raises(UsageError, match="cannot be read"):
        PrivateAdapter(kept, "first").load()


def test_a_data_owner_s_own_privacy_settings_count(tmp_path: Path) -> None:
    """The coordinator cannot switch off what the SuperNode's owner has switched on."""
    grid = InProcessGrid(client_app.app, 1, {"dp-clip": 0.0})
    context = grid.contexts[1]
    context.node_config |= {"dp-clip": 1e-6, "dp-epsilon": 1e6}
    sent = ArrayRecord({"a": Array(np.zeros(4, np.float32))})
    message = Message(RecordDict({"arrays": sent}), 1, "train")
    message.metadata.__dict__["_message_id"] = "1"

    def train(message: Message, _context: Context) -> Message:
        trained = ArrayRecord({"a": Array(np.ones(4, np.float32))})
        return Message(RecordDict({"arrays": trained, "metrics": MetricRecord({"n": 1})}), reply_to=message)

    reply = client_app.protect(message, context, train)
    assert np.abs(from_record(reply.content["arrays"])["a"]).max() < 1e-5
    context.node_config["dp-epsilon"] = 0.0
    assert "dp-epsilon" in client_app.protect(message, context, train).error.reason


def test_a_supernode_without_a_worker_says_so() -> None:
    grid = InProcessGrid(client_app.app, 1)
    grid.contexts[1].node_config = {}
    (reply,) = grid.send_and_receive([Message(RecordDict(), 1, "query")])
    assert "fedsea federation join" in reply.error.reason


def test_with_certificates_clients_and_coordinator_are_who_they_are(
    start_server: Callable[..., RunningServer], data: str, tmp_path: Path
) -> None:
    create_credentials(tmp_path / "creds", clients=("client-0", "client-1"))
    secure = start_server("random:tiny", credentials=Credentials.load(tmp_path / "creds" / "server", role="server"))
    given = config(secure.address, data, tmp_path / "out", clients=2, rounds=1, insecure=False)
    given |= {"credentials": str(tmp_path / "creds" / "coordinator"), "client-credentials": str(tmp_path / "creds")}
    run(client_app.app, given)
    assert sorted(rounds(given)[0]["clients"]) == ["client-0", "client-1"]
    given |= {"credentials": str(tmp_path / "creds" / "client-0"), "output": str(tmp_path / "other")}
    with pytest.raises(CredentialsError, match="not for a coordinator"):
        run(client_app.app, given)


def test_the_client_app_imports_neither_torch_nor_transformers() -> None:
    code = "import fedsea.federation.flower.client_app, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "peft"} & set(loaded)


def test_the_example_has_all_settings_with_their_defaults() -> None:
    assert tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"] == tomllib.loads(project_file())["tool"]


@pytest.mark.parametrize("mode", ["server-hierarchical", "client-batch", "sequential"])
def test_a_client_that_hangs_costs_the_others_one_deadline_and_may_come_back(
    server: RunningServer, data: str, tmp_path: Path, apart: AllApart, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    hanging, healed = threading.Event(), threading.Event()

    def hang(step: int, _loss: float) -> None:
        if not hanging.is_set():
            hanging.set()
            healed.wait(60)

    usual = apart.worker_of

    def worker_of(context: Context) -> Any:
        worker = usual(context)
        if context.node_id == 2:
            worker.on_step = hang
        return worker

    monkeypatch.setattr(client_app, "worker_of", worker_of)
    given = config(server.address, data, tmp_path / "out", mode=mode, rounds=3, straggler_seconds=4.0)

    def handle(message: Message, context: Context) -> Message:
        # It comes back to itself once the others are in the second round.
        if message.metadata.message_type == "train" and message.metadata.group_id == "2":
            healed.set()
            time.sleep(1.0)
        return apart(message, context)

    run(handle, given)  # within the test's own deadline: no round is waited for to its end
    lines = rounds(given)
    assert "client-1" in lines[0]["dropped"]
    assert sorted(lines[0]["clients"]) == ["client-0", "client-2"]
    assert "client-1" in lines[2]["clients"]
    if mode != "sequential":
        assert lines[0]["stragglers"] == ["client-1"]
