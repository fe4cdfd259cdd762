"""How a federation ends: clients leave in the middle, never come, are refused, or get what they have trained."""

import json
import re
import shlex
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict

from fedsea.errors import FedSEAError, ModelMismatchError, NonFiniteError, TermsError, UsageError
from fedsea.federation.coordinator.block_server_admin import BlockServerAdmin
from fedsea.federation.coordinator.up import Federation
from fedsea.federation.coordinator.up_options import UpOptions
from fedsea.federation.owner.local_dp import GRID_BITS, deviation_of, normals, protected
from fedsea.federation.owner.participant import Participant
from fedsea.federation.owner.worker import FINISH
from fedsea.federation.settings import Settings
from fedsea.parts.adapter_files import read_adapter
from tests.conftest import RunningServer
from tests.support.federation_commands import write_cb
from tests.support.federation_fakes import FakeServer, Run, World, assert_same, clients
from tests.support.participants import options

ROOT = Path(__file__).parents[2]


class Leaves(World):
    """Keeps what clients are handed at the end; bob leaves in his first training, as Ctrl-C does: Flower answers."""

    def __init__(self, *given: tuple[int, int, int]) -> None:
        super().__init__(clients(*given), [FakeServer()])
        self.handed: dict[str, dict[str, Any]] = {}

    def __call__(self, message: Message, context: Context) -> Message | None:
        client, kind = self.clients[context.node_id - 1], message.metadata.message_type
        if kind == "train" and client.name == "bob":
            reply = Message(Error(5, "Error: Node Unavailable"), reply_to=message)  # as the SuperLink says it
            reply.metadata.__dict__["_src_node_id"] = 1  # the SuperLink's, not the node's
            return reply
        if kind != f"query.{FINISH}":
            return super().__call__(message, context)
        if client.name == "bob":
            return Message(Error(2, "out of disk"), reply_to=message)
        body = json.loads(message.content["config"]["fedsea"])
        self.handed[client.name] = {name: array.numpy() for name, array in message.content["arrays"].items()} | {
            "lora": body["lora"]
        }
        return Message(RecordDict({}), reply_to=message)


def test_a_client_that_leaves_in_a_round_is_left_out_and_the_others_get_the_adapter(tmp_path: Path) -> None:
    world = Leaves((1, 1, 10), (1, 1, 30), (1, 1, 5))
    run = Run(tmp_path, world, members="ann=1, bob=2, cyd=3")
    adapter = run.start()
    (line,) = run.rounds()
    assert sorted(line["clients"]) == ["ann", "cyd"]
    assert "it has left, or its machine is not reached" in line["dropped"]["bob"]
    assert sorted(world.handed) == ["ann", "cyd"]
    for handed in world.handed.values():
        assert handed.pop("lora")["r"] == 2
        assert_same(handed, adapter)
    (told,) = (notice for notice in run.notices if "has not got the adapter" in notice)
    assert "bob" in told
    assert str(run.folder / "adapter") in told


def test_simulated_clients_are_handed_nothing(tmp_path: Path) -> None:
    world = Leaves((1, 1, 10))
    Run(tmp_path, world).start()
    assert not world.handed


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"clients": 3}, 'only 2 of 3 clients are connected; with flwr run, --federation-config "num-supernodes=N"'),
        ({"clients": 2, "task": "boolq"}, "ann is refused: the federation learns the task boolq"),
    ],
)
def test_clients_that_never_come_or_are_all_refused_end_it_with_one_line(
    tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    world = World(clients((1, 1, 10), (1, 1, 20)), [FakeServer()])
    run = Run(tmp_path, world, wait_seconds=0.3, **settings)
    with pytest.raises(UsageError, match=re.escape(says)):
        run.start()


def test_a_coordinator_reaches_its_block_server_otherwise_than_clients_do(tiny_server: RunningServer) -> None:
    """The public name of a machine may not lead to it from itself: behind NAT, in a container, with split DNS."""
    with BlockServerAdmin("hub.invalid:7070", insecure=True, dial=tiny_server.address) as admin:
        assert admin.address == "hub.invalid:7070"
        assert admin.describe().layers == range(6)


@pytest.mark.parametrize(("listen", "local"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("127.0.0.1", "127.0.0.1")])
def test_up_tells_its_coordinator_to_dial_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listen: str, local: str
) -> None:
    options = UpOptions(("ann",), listen=listen, hosts=("hub.invalid",), port=0, superlink_port=0)
    try:
        federation = Federation(tmp_path / "fed", Settings(name="fed"), options, lambda _line: None)
    except UsageError:
        pytest.skip("there is no IPv6 here")
    federation.deployment.prepare(options.certified, options.clients)
    control = Mock(nodes=list, start=Mock(side_effect=FedSEAError("the run is not to start here")))
    monkeypatch.setattr(federation, "control", control, raising=False)
    with pytest.raises(FedSEAError, match="not to start here"):
        federation.run()
    settings = Settings.from_run_config(control.start.call_args.args[0])
    assert settings.addresses == (f"hub.invalid:{federation.options.port}",)
    assert settings.dialled == (f"{local}:{federation.options.port}",)
    assert settings.wait_seconds == 0  # data owners come when they come


def participant(tmp_path: Path, **more: Any) -> Participant:
    given = {"output": str(tmp_path / "mine" / "adapter")} | more
    return Participant(options(write_cb(tmp_path / "cb"), **given))


def test_a_data_owner_keeps_the_adapter_of_its_model_and_no_other(tmp_path: Path) -> None:
    run = Run(tmp_path, World(clients((1, 1, 10)), [FakeServer()]))
    whole = run.start()
    body = {"lora": run.settings.lora()}
    owner = participant(tmp_path)
    (tmp_path / "mine").mkdir()
    for _ in range(2):  # the second in place of the first
        owner.finish(body, whole)
    lora, weights = read_adapter(tmp_path / "mine" / "adapter")
    assert lora.r == 2
    assert weights.keys() == whole.keys()
    assert all(np.array_equal(weights[name], whole[name]) for name in whole)

    name = min(whole)
    with pytest.raises(ModelMismatchError, match="is missing"):
        owner.finish(body, {key: value for key, value in whole.items() if key != name})
    with pytest.raises(ModelMismatchError, match="has shape"):
        owner.finish(body, whole | {name: whole[name][:1]})
    with pytest.raises(NonFiniteError, match="not finite"):
        owner.finish(body, whole | {name: whole[name] * np.nan})
    assert read_adapter(tmp_path / "mine" / "adapter")[1].keys() == whole.keys()
    with pytest.raises(TermsError, match="no place"):
        participant(tmp_path, output="").finish(body, whole)
    with pytest.raises(TermsError, match="takes part with r=4 only"):
        participant(tmp_path, lora={"r": 4}).finish(body, whole)


def test_noise_for_the_coordinator_is_the_operating_system_s_and_its_last_bits_tell_nothing() -> None:
    before = {"a": np.zeros(50_000, np.float32), "b": np.zeros(3, np.float32)}
    after = {"a": np.full(50_000, 0.01, np.float32), "b": np.ones(3, np.float32)}
    deviation = deviation_of(2.0, 0.5, 1e-5)
    assert deviation == pytest.approx(2 * np.sqrt(2 * np.log(125_000)) / 0.5)
    sent = []
    for _ in range(2):
        np.random.seed(1)
        sent.append(protected(before, after, 1.0, deviation)["a"])
    assert not np.array_equal(*sent)
    assert np.std(sent[0]) == pytest.approx(deviation, rel=0.03)  # of 50,000: nine standard deviations
    step = 2.0 ** (np.floor(np.log2(deviation)) - GRID_BITS)
    assert np.array_equal(sent[0] / step, np.round(sent[0] / step))
    tiny = protected(before, after, 1.0, 1e-9)
    norm = np.sqrt(sum(float(np.square(value.astype(float)).sum()) for value in tiny.values()))
    assert norm == pytest.approx(1.0, rel=1e-4)  # clipped, over all arrays together
    drawn = normals(100_001)
    assert drawn.shape == (100_001,)
    assert abs(drawn.mean()) < 0.03
    assert abs(np.mean(drawn**4) - 3) < 0.5


@pytest.mark.parametrize("page", ["docs/federation.md", "examples/federation/README.md"])
def test_flwr_run_as_it_is_documented_says_how_many_clients_there_are(page: str) -> None:
    """Flower starts no client otherwise, and the run would wait for them."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("flwr run ")]
    assert lines
    for line in lines:
        words = shlex.split(line)
        given = dict(one.split("=", 1) for one in shlex.split(words[words.index("--federation-config") + 1]))
        settings = dict(one.split("=", 1) for one in shlex.split(words[words.index("-c") + 1]))
        assert given["num-supernodes"] == settings["clients"]
        kinds = {"true": True, "false": False}
        typed = {key: int(one) if one.isdecimal() else kinds.get(one, one) for key, one in settings.items()}
        Settings.from_run_config(typed)
