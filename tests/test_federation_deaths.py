"""Processes of a real federation are killed with -9, one kind in each round; the rounds go on."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedsea.errors import FedSEAError
from fedsea.federation.join import Member, kept_running
from fedsea.federation.settings import Settings
from fedsea.federation.status import read_status
from fedsea.federation.up import Federation, UpOptions
from fedsea.parts.adapter_files import read_adapter
from tests.federation_commands import QUIET, own, until, write_cb

CLIENTS = ("alice", "bob")
ROUNDS = 5  # one more than are needed
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
            stack.enter_context(kept_running([member]))
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
        clients=2,
        min_clients=1,
        rounds=ROUNDS,
        local_steps=40,
        join_seconds=15.0,
        straggler_seconds=5.0,
    )
    told: list[str] = []
    options = UpOptions(CLIENTS, port=0, superlink_port=0)
    with Federation(tmp_path / "fed", settings, options, told.append, ("--threads", "1")) as running:
        running.start()
        owners = {name: members(running.deployment.client(name), data) for name in CLIENTS}
        killed: dict[str, int] = {}

        def client_app() -> bool:
            node = owners["bob"]._node
            return node is not None and kill(node.pid, "flwr-clientapp")

        def supernode_and_worker() -> bool:
            worker = owners["bob"]._worker
            found = kill(os.getpid(), "fedsea.federation.supernode", "bob")
            if found and worker is not None:
                os.kill(worker.pid, signal.SIGKILL)
            return found

        def block_server() -> bool:
            server = running._block_server
            return server is not None and kill(os.getpid(), "fedsea.federation.leash fedsea serve")

        def server_app() -> bool:
            link = running._superlink_child
            return link is not None and kill(link.pid, "flwr-serverapp")

        victims = [client_app, supernode_and_worker, block_server, server_app]

        def strike() -> None:
            """Kill the next, in the middle of a round in which nobody has been killed; a round may pass too quickly."""
            if len(killed) == len(victims):
                return
            status = read_status(running.deployment.path)
            busy = [client for client in status.clients.values() if client.steps]
            if status.round in killed.values() or status.doing != "training" or not busy:
                return
            victim = victims[len(killed)]
            if victim():
                killed[victim.__name__] = status.round

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
        assert list(killed) == [victim.__name__ for victim in victims]
        reports = read_status(running.deployment.path).reports
        assert [report["round"] for report in reports] == list(range(1, ROUNDS + 1)), told
        # Whoever trained in a round counts in it, or it is said why not.
        for report in reports:
            assert set(report["clients"]).isdisjoint(report["dropped"]), report
            assert report["clients"] or report["dropped"], report
        by_round = {report["round"]: set(report["clients"]) for report in reports}
        assert by_round[killed["client_app"]]
        assert by_round[killed["supernode_and_worker"]]
        assert by_round[ROUNDS]
        # Whoever was killed is started again and comes back.
        until(lambda: set(running.online()) == set(CLIENTS), 120)
        _, weights = read_adapter(running.deployment.output / "adapter")
        assert weights
        assert all(bool(weight.isfinite().all()) for weight in weights.values())
        lines = [json.loads(line) for line in (running.deployment.output / "rounds.jsonl").read_text().splitlines()]
        assert len(lines) == ROUNDS
