"""Processes of a real federation are killed with -9, one kind in each round; the rounds go on."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedsea.errors import FedSEAError
from fedsea.federation.join import Member
from fedsea.federation.settings import Settings
from fedsea.federation.status import read_status
from fedsea.federation.up import Federation, UpOptions
from fedsea.parts.adapter_files import read_adapter
from tests.federation_commands import QUIET, own, until, write_cb

CLIENTS = ("alice", "bob", "carol")
ROUNDS = 5
pytestmark = pytest.mark.timeout(600)


def descendants(pid: int) -> dict[int, str]:
    """Processes that this one has started, and those that they have: their command lines."""
    parents: dict[int, int] = {}
    lines: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            number = int(path.name)
            parents[number] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            lines[number] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    found = {pid}
    while more := {one for one, parent in parents.items() if parent in found} - found:
        found |= more
    return {one: lines[one] for one in found - {pid}}


def kill(root: int, *words: str) -> bool:
    """Kill -9 what a process has started that has these words in its command line; whether there was such a one."""
    victims = [pid for pid, line in descendants(root).items() if all(word in line for word in words)]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(victims)


@pytest.fixture
def members() -> Iterator[Callable[[Path, Path], Member]]:
    """Data owners, each kept running by a thread as `fedsea federation join` keeps itself."""
    with contextlib.ExitStack() as stack:

        def begin(folder: Path, data: Path) -> Member:
            member = stack.enter_context(Member(folder, own(data), print))
            member.start()
            over = threading.Event()

            def watch() -> None:
                while not over.is_set():
                    member.watch(0.2)

            thread = threading.Thread(target=watch)
            thread.start()
            stack.callback(thread.join)
            stack.callback(over.set)
            return member

        yield begin


def test_each_kind_of_process_is_killed_in_a_round_of_its_own(
    tmp_path: Path, members: Callable[[Path, Path], Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    data = tmp_path / "data"
    data.mkdir()
    write_cb(data)
    settings = Settings(
        name="deaths",
        model="random:tiny",
        task="cb",
        clients=3,
        min_clients=2,
        rounds=ROUNDS,
        local_steps=16,
        join_seconds=15.0,
        straggler_seconds=3.0,
    )
    told: list[str] = []
    options = UpOptions(CLIENTS, port=0, superlink_port=0)
    with Federation(tmp_path / "fed", settings, options, told.append, ("--threads", "1")) as running:
        running.start()
        owners = {name: members(running.deployment.client(name), data) for name in CLIENTS}
        killed: dict[int, str] = {}

        def training(number: int) -> bool:
            """Whether the round is under way, with a step done by everybody who is there."""
            status = read_status(running.deployment.path)
            steps = [client.steps for client in status.clients.values() if client.steps]
            return status.round == number and status.doing == "training" and len(steps) >= 2

        def strike() -> None:
            status = read_status(running.deployment.path)
            if status.round in killed or not training(status.round):
                return
            node = owners["carol"]._node
            assert node is not None
            assert running._superlink_child is not None
            if status.round == 2 and kill(node.pid, "flwr-clientapp"):
                killed[2] = "ClientApp"
            worker = owners["bob"]._worker
            assert worker is not None
            if status.round == 3 and kill(os.getpid(), "fedsea.federation.supernode", "carol"):
                os.kill(worker.pid, signal.SIGKILL)
                killed[3] = "SuperNode and worker"
            if status.round == 4 and running._block_server is not None:
                os.kill(running._block_server.pid, signal.SIGKILL)
                killed[4] = "block server"
            if status.round == 5 and kill(running._superlink_child.pid, "flwr-serverapp"):
                killed[5] = "ServerApp"

        starts = 0
        while True:
            starts += 1
            assert starts < 4, told
            try:
                running.run(strike)
                break
            except FedSEAError as error:
                told.append(str(error))
        assert not any("\n" in line for line in told)
        assert set(killed) == {2, 3, 4, 5}
        reports = read_status(running.deployment.path).reports
        assert [report["round"] for report in reports] == list(range(1, ROUNDS + 1)), told
        by_round = {report["round"]: set(report["clients"]) for report in reports}
        assert by_round[1] == set(CLIENTS)
        assert {"alice", "bob"} <= by_round[2]
        assert "alice" in by_round[3]
        assert by_round[ROUNDS]
        # Whoever was killed is started again and comes back.
        until(lambda: set(running.online()) == set(CLIENTS), 120)
        _, weights = read_adapter(running.deployment.output / "adapter")
        assert weights
        assert all(bool(weight.isfinite().all()) for weight in weights.values())
        lines = [json.loads(line) for line in (running.deployment.output / "rounds.jsonl").read_text().splitlines()]
        assert len(lines) == ROUNDS
