"""A federation as its users run it: SuperLink, block server, two data owners, all in processes of their own."""

import contextlib
from pathlib import Path

import pytest

from fedsea.cli import run
from fedsea.federation.status import read_status
from tests.federation_commands import Command, gone, until, write_cb


def descendants(pids: set[int]) -> set[int]:
    """Processes that these have started, and those that they have, and so on."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - pids


def test_two_data_owners_train_an_adapter_and_leave_nothing_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = tmp_path / "fed", write_cb(tmp_path)
    options = ["--model", "random:tiny", "--rounds", 1, "--local-steps", 2, "--task", "cb", "--eval-every", 1]
    places = ["--clients", "alice,bob", "--port", 0, "--superlink-port", 0, "--threads", 1, "--json"]
    commands = [Command("up", folder, *options, *places)]
    try:
        invited = commands[0].line()
        assert list(invited["clients"]) == ["alice", "bob"]
        for index, name in enumerate(("alice", "bob")):
            assert f"join {folder / 'clients' / name} --task cb" in invited["clients"][name]["command"]
            given = ["--data", data, "--shard", f"iid:{index}/2", "--threads", 1]
            commands.append(Command("join", invited["clients"][name]["folder"], *given))
        until(lambda: (folder / "output" / "now.json").exists(), 120)
        started = descendants({command.process.pid for command in commands})
        assert len(started) >= 8  # block server, SuperLink, two workers, two SuperNodes, and what Flower starts
        done = commands[0].line()
        assert commands[0].process.wait(60) == 0
        assert (Path(done["adapter"]) / "adapter_model.safetensors").is_file()
        status = read_status(folder)
        assert status.doing == "done"
        assert set(status.reports[0]["clients"]) == {"alice", "bob"}
        assert status.reports[0]["clients"]["alice"]["num-examples"] == 12
        assert "answer_loss" in status.reports[0]["evaluation"]["metrics"]
    finally:
        ends = [command.stop() for command in commands]
    assert [code for code, _ in ends] == [0, 0, 0], ends
    assert "train, round 1: loss" in ends[1][1]
    assert str(data) not in (folder / "logs" / "superlink.log").read_text()
    until(lambda: all(map(gone, started)), 20)
    assert run(["federation", "status", str(folder)]) == 0
    assert "round 1 of 1  done" in capsys.readouterr().out
