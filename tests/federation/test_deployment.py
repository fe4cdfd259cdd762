"""A federation as its users run it, all in processes of their own; one kind of them is killed with -9 in each round."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from fedsea.cli import run
from fedsea.errors import UsageError
from fedsea.federation.coordinator.status import FederationStatus, read_status
from fedsea.parts.adapter_files import read_adapter
from tests.support.federation_commands import Command, gone, until, write_cb

CLIENTS = ("alice", "bob")
VICTIMS = {  # which of bob's or the coordinator's processes die, by words of their command lines
    "client app": ("bob", "flwr-clientapp"),
    "supernode and worker": ("bob", "fedsea.federation.flower.supernode", "fedsea.federation.owner.worker_process"),
    "block server": ("up", "fedsea.process fedsea serve"),
    "server app": ("up", "flwr-serverapp"),
}
pytestmark = pytest.mark.timeout(2400)


def descendants(pids: set[int]) -> dict[int, str]:
    """Processes that these have started, and those that they have, and so on: their command lines."""
    parents: dict[int, int] = {}
    lines: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            number = int(path.name)
            parents[number] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            lines[number] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    found = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: lines[pid] for pid in found - pids}


def kill(command: Command, words: str) -> bool:
    """Kill -9 what a command has started that has these words in its command line; whether there was such a one."""
    victims = [pid for pid, line in descendants({command.process.pid}).items() if words in line]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(victims)


def status_of(folder: Path) -> FederationStatus | None:
    try:
        return read_status(folder)
    except UsageError:
        return None  # not made yet


def test_a_federation_outlives_every_death_and_leaves_nothing_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = tmp_path / "fed", write_cb(tmp_path)
    options: list[object] = ["--model", "random:tiny", "--rounds", 50, "--local-steps", 40, "--task", "cb"]
    options += ["--min-clients", 1, "--set", "join-seconds=30", "--set", "straggler-seconds=10"]
    options += ["--clients", ",".join(CLIENTS), "--port", 0, "--superlink-port", 0, "--threads", 1, "--json"]
    ups, joins = [Command("up", folder, *options)], []
    killed: dict[str, int] = {}
    started: set[int] = set()
    try:
        invited = ups[0].line()
        assert list(invited["clients"]) == list(CLIENTS)
        for index, name in enumerate(CLIENTS):
            assert f"join {folder / 'clients' / name} --task cb" in invited["clients"][name]["command"]
            given = ["--data", data, "--shard", f"iid:{index}/2", "--threads", 1]
            joins.append(Command("join", invited["clients"][name]["folder"], *given))

        def over() -> bool:
            """Look, kill the next in a round in which nobody has been killed, and see how the coordinator does."""
            status = status_of(folder)
            if status is not None and status.doing == "training" and len(killed) < len(VICTIMS):
                started.update(descendants({command.process.pid for command in (*ups, *joins)}))
                busy = any(client.steps for client in status.clients.values())
                victim = list(VICTIMS)[len(killed)]
                whose, *words = VICTIMS[victim]
                command = ups[-1] if whose == "up" else joins[1]
                if busy and status.round not in killed.values() and all(kill(command, one) for one in words):
                    killed[victim] = status.round
            return ups[-1].process.poll() is not None

        until(over, 1000)
        code, errors = ups[0].stop()
        assert code != 0, "the server app was killed"
        assert errors.strip().splitlines()[-1].endswith("died; the same command goes on after the last round"), errors
        last = killed["server app"] + 1
        # Both come back, and none is late; the rest is as before.
        patient = ["--set", "join-seconds=900", "--set", "straggler-seconds=900"]
        ups.append(Command("up", folder, "--min-clients", 2, "--rounds", last, "--eval-every", last, *patient))
        until(over, 1000)
        assert list(killed) == list(VICTIMS)
        assert len(started) >= 8  # block server, SuperLink, two workers, two SuperNodes, and what Flower starts
        status = read_status(folder)
        assert status.doing == "done"
        assert [report["round"] for report in status.reports] == list(range(1, last + 1))
        # Whoever trained in a round counts in it, or it is said why not.
        for report in status.reports:
            assert set(report["clients"]).isdisjoint(report["dropped"]), report
            assert report["clients"] or report["dropped"], report
        by_round = {report["round"]: report["clients"] for report in status.reports}
        assert all(by_round[killed[victim]] for victim in ("client app", "supernode and worker"))
        assert set(by_round[last]) == set(CLIENTS)  # whoever was killed has been started again and has come back
        assert by_round[last]["alice"]["num-examples"] == 12
        assert "answer_loss" in status.reports[-1]["evaluation"]["metrics"]
        _, weights = read_adapter(folder / "output" / "adapter")
        assert weights
        assert all(bool(weight.isfinite().all()) for weight in weights.values())
        until(lambda: all(command.process.poll() is not None for command in joins), 300)  # it is over for them too
        for name in CLIENTS:
            assert read_adapter(folder / "clients" / name / "adapter")[1].keys() == weights.keys()
    finally:
        ends = [command.stop() for command in (ups[-1], *joins)]
    assert [code for code, _ in ends] == [0, 0, 0], ends
    assert "train, round 1: loss" in ends[1][1]
    assert "starting it again" in ends[2][1]
    assert str(data) not in (folder / "logs" / "superlink.log").read_text()
    until(lambda: all(map(gone, started)), 120)
    assert run(["federation", "status", str(folder)]) == 0
    assert f"round {last} of {last}  done" in capsys.readouterr().out
