"""Flower's SuperLink and SuperNodes as FedSEA runs them: who is let in, and what is not run."""

import contextlib
import hashlib
import http.client
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from fedsea.federation.coordinator import control as control_module
from fedsea.federation.coordinator.deployment import new_key
from fedsea.federation.coordinator.up import Federation
from fedsea.federation.coordinator.up_options import UpOptions
from fedsea.federation.flower.app import COMPONENTS, bundle, project_file
from fedsea.federation.invitation import SUPERNODE_KEY
from fedsea.federation.owner import join as join_module
from fedsea.federation.owner.join import OwnerProcess
from fedsea.federation.settings import Settings
from tests.support.federation_commands import QUIET, own, until, write_cb


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cb(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator without a block server of its own: Flower's SuperLink, and the folders of alice and bob."""
    options = UpOptions(("alice", "bob"), superlink_port=0, servers=("127.0.0.1:1",))
    settings = Settings(name="fed", model="random:tiny", task="cb", clients=1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        with Federation(tmp_path_factory.mktemp("up") / "fed", settings, options, print) as running:
            running.start()
            yield running


Begin = Callable[[Path], tuple[list[str], Future[None]]]


@pytest.fixture
def begin(data: Path) -> Iterator[Begin]:
    """Starts a data owner with this folder, and watches it in a thread: what it tells, and what ends it."""
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
        over = threading.Event()

        def watch(running: OwnerProcess) -> None:
            while not over.is_set():
                running.watch(0.2)

        def start(folder: Path) -> tuple[list[str], Future[None]]:
            told: list[str] = []
            running = stack.enter_context(OwnerProcess(folder, own(data), told.append))
            assert running.start()["examples"] == 24
            watching = pool.submit(watch, running)
            stack.callback(watching.exception)
            stack.callback(over.set)
            return told, watching

        yield start


def request(address: str, path: str, authority: Path, source: str) -> int:
    """The status that a POST from an address of this machine gets."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=str(authority))
    connection = http.client.HTTPSConnection(host, int(port), context=context, source_address=(source, 0), timeout=20)
    try:
        connection.request("POST", path, headers=dict.fromkeys(("content-type", "accept"), "application/protobuf"))
        return connection.getresponse().status
    finally:
        connection.close()


def other_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return str(probe.getsockname()[0])


def test_the_superlink_takes_orders_from_its_own_machine_only(superlink: Federation) -> None:
    authority, outside = superlink.deployment.authority, other_address()
    for path in ("/v1/control/list-nodes", "/v1/runtime/acquire-task", "/docs"):
        assert request(superlink.superlink, path, authority, outside) == 403
        assert request(superlink.superlink, path, authority, "127.0.0.1") != 403
    assert request(superlink.superlink, "/v1/fleet/pull-messages", authority, outside) == 401  # it is not signed


def test_an_unregistered_supernode_is_not_let_in(
    superlink: Federation, begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = tmp_path / "bob"
    shutil.copytree(superlink.deployment.client("bob"), stranger)
    (stranger / SUPERNODE_KEY).write_bytes(new_key())
    monkeypatch.setattr(join_module, "LET_IN_SECONDS", 0.0)
    monkeypatch.setattr(join_module, "TRY_AGAIN_SECONDS", 0.1)
    _told, watching = begin(stranger)
    assert "does not let bob in" in str(watching.exception(60))
    assert superlink.online() == []


SERVER_CODE = """
import json, os, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    reply, = grid.send_and_receive([Message(RecordDict({"c": ConfigRecord({})}), nodes[0], "query")], timeout=60)
    with open(context.run_config["answer"], "w") as file:
        file.write(reply.error.reason if reply.has_error() else "it ran")
"""
CLIENT_CODE = """
import pathlib
pathlib.Path({trace!r}).touch()
from flwr.clientapp import ClientApp
app = ClientApp()
"""


def test_a_data_owner_runs_nothing_that_the_coordinator_sends(
    superlink: Federation, begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.cli.build import build_fab_from_files

    trace, answer = tmp_path / "trace", tmp_path / "answer"
    project = project_file().split("[tool.flwr.app.config]")[0] + f"[tool.flwr.app.config]\nanswer = {str(answer)!r}\n"
    for kind, name in COMPONENTS.items():
        project = project.replace(name, f"evil.{kind}:app")
    files = {"serverapp": SERVER_CODE, "clientapp": CLIENT_CODE.format(trace=str(trace))}
    content = {f"evil/{name}.py": code.encode() for name, code in files.items()}
    evil = build_fab_from_files({"pyproject.toml": project.encode(), "evil/__init__.py": b"", **content})[0]
    told, _watching = begin(superlink.deployment.client("alice"))
    until(lambda: "alice" in superlink.online())
    monkeypatch.setattr(control_module, "bundle", lambda: evil)
    superlink.control.start({})
    assert "could not be verified" in until(lambda: answer.exists() and answer.read_text())
    assert any("holds files of its own" in line for line in told)
    assert not trace.exists()
    assert hashlib.sha256(evil).hexdigest() != hashlib.sha256(bundle()).hexdigest()
