"""What sessions and runs have in common: each transition of a lease and its limits, on a clock that the test moves."""

from typing import Any

import pytest
import torch

from fedsea.errors import FedSEAError, LimitExceededError, ProtocolError, RunLostError
from fedsea.server import Limits
from fedsea.server.leases import Lease, LeaseTable, State
from fedsea.server.sessions import SessionTable
from tests.support.server_runs import MIDDLE, Clock, ended, request, table_of

LAYERS = range(1, 5)


class Sessions:
    """With room for three, two of a client, each kept for 10 s without it."""

    kind = "session"

    def __init__(self, clock: Clock) -> None:
        limits = Limits(sessions=3, client_sessions=2, resume_seconds=10, cache_bytes=1 << 20)
        self.table = SessionTable(MIDDLE, limits, dtype=torch.float32, clock=clock)

    def open(self, client: str = "a", end: Any = ended) -> Any:
        return self.table.open(client, LAYERS, torch.float32, end)

    def attach(self, lease: Lease, client: str = "a", end: Any = ended) -> Any:
        return self.table.attach(lease.name, client, LAYERS, torch.float32, end)


class Runs:
    """The same of runs."""

    kind = "run"

    def __init__(self, clock: Clock) -> None:
        self.table = table_of(clock, runs=3, client_runs=2, run_seconds=10)
        self._begun = 0

    def open(self, client: str = "a", end: Any = ended) -> Any:
        self._begun += 1
        return self.table.attach(request(f"run-{self._begun}"), client, end)[0]

    def attach(self, lease: Lease, client: str = "a", end: Any = ended) -> Any:
        try:
            return self.table.attach(request(lease.name, begin=False), client, end)[0]
        except RunLostError:
            return None


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=[Sessions, Runs])
def desk(request: pytest.FixtureRequest, clock: Clock) -> Any:
    return request.param(clock)


@pytest.fixture
def table(desk: Any) -> LeaseTable[Any]:
    return desk.table  # type: ignore[no-any-return]


def test_attached_to_detached_when_the_connection_is_lost_and_back(
    desk: Any, table: LeaseTable[Any], clock: Clock
) -> None:
    lease = desk.open()
    assert lease.state is State.ATTACHED
    table.detach(lease)
    assert lease.state is State.DETACHED
    clock.now = 9
    assert desk.attach(lease) is lease
    assert lease.state is State.ATTACHED


def test_attached_to_attached_takes_it_from_its_old_connection(desk: Any) -> None:
    old: list[FedSEAError] = []
    new: list[FedSEAError] = []
    lease = desk.open(end=old.append)
    assert desk.attach(lease, end=new.append) is lease
    assert [(type(one), str(one)) for one in old] == [
        (ProtocolError, f"another connection has taken the {desk.kind} up")
    ]
    assert new == []
    lease.end(ProtocolError("later"))
    assert len(new) == 1


def test_detached_to_ended_when_its_client_was_away_for_too_long(
    desk: Any, table: LeaseTable[Any], clock: Clock
) -> None:
    left, attached = desk.open(), desk.open()
    table.detach(left)
    clock.now = 10
    assert table.expire() == []
    clock.now = 10.1
    assert table.expire() == [left]
    assert (left.state, attached.state) == (State.ENDED, State.ATTACHED)
    assert list(table) == [attached]


def test_detached_to_ended_when_its_own_client_needs_the_room(desk: Any, table: LeaseTable[Any], clock: Clock) -> None:
    first, later = desk.open(), desk.open()
    table.detach(later)
    clock.now = 1
    table.detach(first)
    assert desk.open().state is State.ATTACHED
    assert (later.state, first.state) == (State.ENDED, State.DETACHED)  # the one that was left first


def test_another_clients_does_not_give_way_where_the_server_is_full(desk: Any, table: LeaseTable[Any]) -> None:
    left, *_others = desk.open("a"), desk.open("a"), desk.open("b")
    table.detach(left)
    says = rf"the server has 3 {desk.kind}s open, its limit \(--max-{desk.kind}s\)"
    with pytest.raises(LimitExceededError, match=says):
        desk.open("c")
    assert left.state is State.DETACHED


def test_those_of_one_client_are_limited_and_the_error_says_what_to_do(desk: Any) -> None:
    for _ in range(2):
        desk.open("a")
    says = rf"client 'a' has 2 {desk.kind}s open, the limit of {desk.kind}s per client; close one first \(.*model.close"
    with pytest.raises(LimitExceededError, match=says):
        desk.open("a")
    desk.open("b")


def test_ended_leads_nowhere(desk: Any, table: LeaseTable[Any]) -> None:
    lease = desk.open()
    table.close(lease)
    table.detach(lease)
    table.close(lease)
    assert lease.state is State.ENDED
    assert desk.attach(lease) is None
    assert len(table) == 0


def test_another_client_does_not_take_it_up(desk: Any, table: LeaseTable[Any]) -> None:
    lease = desk.open("a")
    table.detach(lease)
    assert desk.attach(lease, "b") is None
    assert lease.state is State.DETACHED
