"""Clients and block servers that do not do what they should: not waited for, left out, asked again."""

import time
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict

from fedsea.errors import ServerUnavailableError
from fedsea.federation.flower.grid import lateness
from fedsea.wire.rounds import MemberStatus
from tests.support.federation_fakes import MIXED, FakeServer, Run, World, clients


def test_a_refused_client_is_asked_again_and_comes_in(tmp_path: Path) -> None:
    run = Run(tmp_path, task="cb", rounds=4)
    run.clients[2].says = {"task": "boolq"}

    def heal(_message: Message, _content: RecordDict) -> None:
        run.clients[2].says = {}
        time.sleep(0.3)  # its answer to the next question comes meanwhile

    run.clients[0].spoil = heal
    run.start()
    took_part = ["cyd" in line["clients"] for line in run.rounds()]
    assert not took_part[0]
    assert took_part[-1]


def test_what_a_client_reports_beside_is_left_out(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.clients[0].spoil = lambda _message, content: content["metrics"].update({"favourite": 3.0})
    run.check()


@pytest.mark.parametrize(("fault", "why"), [("spoiled", "not finite"), ("ignored", "knows nothing of it")])
def test_a_client_whose_middle_cannot_be_used_does_not_count(tmp_path: Path, fault: str, why: str) -> None:
    run = Run(tmp_path)
    setattr(run.server, fault, {"bob"})  # its middle is not finite; it never took its seat
    run.check("bob")
    assert why in run.rounds()[0]["dropped"]["bob"]


def test_a_block_server_that_fails_at_the_end_costs_its_own_clients_only(tmp_path: Path) -> None:
    good, bad = FakeServer("127.0.0.1:1"), FakeServer("127.0.0.1:2")
    bad.fails = ServerUnavailableError("it is gone")
    run = Run(tmp_path, World(clients((1, 1, 10), (1, 1, 20), (1, 1, 30), (1, 1, 40)), [good, bad]))
    run.check("bob", "dan")
    assert run.rounds()[0]["dropped"].keys() == {"bob", "dan"}


def test_a_block_server_that_is_down_leaves_its_clients_to_the_others(tmp_path: Path) -> None:
    up, down = FakeServer("127.0.0.1:1"), FakeServer("127.0.0.1:2")
    run = Run(tmp_path, World(clients(*MIXED), [up, down]))
    down.down = True
    run.check()
    assert any("nobody answers at 127.0.0.1:2" in notice for notice in run.notices)


def test_without_any_block_server_the_federation_ends_with_one_line_and_goes_on_later(tmp_path: Path) -> None:
    run = Run(tmp_path, rounds=3, join_seconds=1.0)
    first = run.clients[0]
    first.spoil = lambda _message, _content: setattr(run.server, "down", len(first.bodies) == 2)
    with pytest.raises(ServerUnavailableError, match=r"nobody answers at 127\.0\.0\.1:1"):
        run.start()
    again = Run(tmp_path, rounds=3)
    again.check()
    assert [line["round"] for line in again.rounds()] == [1, 2, 3]
    assert any("going on after round 2 of 3" in notice for notice in again.notices)


@pytest.mark.parametrize("mode", ["server-hierarchical", "sequential"])
def test_a_client_that_hangs_costs_one_deadline_once(tmp_path: Path, mode: str) -> None:
    run = Run(tmp_path, rounds=3, mode=mode, round_seconds=3600.0)
    run.server.silent = {"bob": 99.0}

    def hang(_message: Message, _content: RecordDict) -> None:
        run.clients[1].answers = False
        time.sleep(3600)

    run.clients[1].spoil = hang
    run.start()  # within the test's own deadline: no round is waited for to its end
    lines = run.rounds()
    assert "last heard of" in lines[0]["dropped"]["bob"]
    assert all("bob" not in line["dropped"] for line in lines[1:])
    assert [sorted(line["clients"]) for line in lines] == [["ann", "cyd"]] * 3


def test_a_client_that_does_not_say_what_it_is_is_not_waited_for_twice(tmp_path: Path) -> None:
    run = Run(tmp_path, rounds=3, join_seconds=1.0)
    run.clients[1].answers = False
    run.check("bob")
    assert sum("does not answer" in notice for notice in run.notices) == 1


def test_who_is_late() -> None:
    def states(**given: tuple[str, float, bool]) -> dict[str, MemberStatus]:
        return {
            name: MemberStatus(name, state, 0, straggled, 0, 0, since)  # type: ignore[arg-type]
            for name, (state, since, straggled) in given.items()
        }

    def late(training: bool = True, **given: tuple[str, float, bool]) -> set[str]:
        return set(lateness(states(**given), 60, 10, training=training))

    assert late(ann=("expected", 59, False), bob=("expected", 61, False)) == {"bob"}
    assert late(ann=("gone", 11, False), bob=("gone", 9, False)) == {"ann"}
    assert late(ann=("finished", 11, False)) == {"ann"}
    # Alone, a silence is its own; among others it may be waiting for them.
    assert late(ann=("joined", 11, False)) == {"ann"}
    assert late(ann=("joined", 11, False), bob=("joined", 5, False)) == set()
    assert late(ann=("joined", 71, False), bob=("joined", 5, False)) == {"ann"}
    assert late(ann=("joined", 11, True), bob=("joined", 5, False)) == {"ann"}
    assert late(ann=("joined", 11, False), bob=("finished", 5, False)) == {"ann"}
    # While it evaluates, the block server does not hear of it.
    assert late(training=False, ann=("joined", 999, False), bob=("expected", 61, False)) == {"bob"}
