"""The life of a session as its state machine describes it: every transition, on a clock that the test moves."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedsea.errors import FedSEAError, LimitExceededError, PartitionError, ProtocolError
from fedsea.parts import BLOCK, MiddleBlocks
from fedsea.server import Limits
from fedsea.server.leases import State
from fedsea.server.ledger import Pool
from fedsea.server.sessions import Session, SessionTable
from fedsea.wire.codec import decode
from fedsea.wire.frames import Result, Step
from tests.support.raw_stream import step
from tests.support.server_runs import CHECKPOINT, ended

LAYERS = range(1, 5)
LIMITS = Limits(
    sessions=3, client_sessions=2, session_tokens=300, idle_seconds=100, resume_seconds=10, cache_bytes=1 << 20
)


MIDDLE = MiddleBlocks.from_checkpoint(CHECKPOINT, LAYERS, dtype=torch.float32)


class Desk:
    """A session table on a clock that stands still unless it is moved."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.now = 0.0
        self.table = SessionTable(MIDDLE, limits, dtype=torch.float32, clock=lambda: self.now)

    def open(self, client: str = "a", end: Callable[[FedSEAError], None] = ended) -> Session:
        return self.table.open(client, LAYERS, torch.float32, end)

    def attach(self, session: Session) -> Session | None:
        return self.table.attach(session.name, "a", LAYERS, torch.float32, ended)

    def do(self, session: Session, step: Step) -> torch.Tensor:
        self.table.admit(session, step)
        result = decode(self.table.do(session, step))
        assert isinstance(result, Result)
        assert result.states is not None
        return result.states


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_a_session_has_an_unguessable_name_and_its_cache_until_it_ends(desk: Desk) -> None:
    session = desk.open()
    assert len(session.name) >= 32
    desk.do(session, step(1))
    taken = desk.table.ledger.used(Pool.CACHES)
    desk.table.detach(session)
    assert desk.table.ledger.used(Pool.CACHES) == taken > 0
    desk.table.close(session)
    assert (len(desk.table), desk.table.ledger.used(Pool.CACHES), session.cache) == (0, 0, None)


def test_detached_to_attached_goes_on_where_it_was(desk: Desk) -> None:
    session, twin = desk.open(), desk.open()
    for one in (session, twin):
        desk.do(one, step(1))
    desk.table.detach(session)
    desk.now = 9
    assert desk.attach(session) is session
    assert session.step == 1
    assert torch.equal(desk.do(session, step(2, start=3)), desk.do(twin, step(2, start=3)))


def test_attached_to_ended_when_idle_and_its_connection_is_told_the_limit(desk: Desk) -> None:
    told: list[FedSEAError] = []
    session = desk.open(end=told.append)
    desk.do(session, step(1))
    desk.now = 100
    assert desk.table.expire() == []
    desk.now = 100.1
    assert desk.table.expire() == [session]
    assert session.state is State.ENDED
    [reason] = told
    assert isinstance(reason, LimitExceededError)
    assert "idle for 100 s" in str(reason)


def test_a_step_puts_the_idle_time_back_and_a_waiting_step_is_not_idleness(desk: Desk) -> None:
    session = desk.open()
    desk.now = 90
    desk.do(session, step(1))
    desk.now = 180
    assert desk.table.expire() == []
    second = step(2, start=3)
    desk.table.admit(session, second)
    desk.now = 500
    assert desk.table.expire() == []
    desk.table.do(session, second)
    assert desk.table.expire() == []
    desk.now = 601
    assert desk.table.expire() == [session]


def test_a_session_that_has_ended_does_nothing_more(desk: Desk) -> None:
    session = desk.open()
    desk.table.close(session)
    for do in (desk.table.admit, desk.table.do):
        with pytest.raises(ProtocolError, match="has ended"):
            do(session, step(1))


def test_a_step_whose_session_ends_meanwhile_leaves_nothing_behind(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    session = desk.open()
    compute = desk.table.middle.forward

    def ends_meanwhile(*arguments: object) -> torch.Tensor:
        desk.table.close(session)
        return compute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(desk.table.middle, "forward", ends_meanwhile)
    desk.do(session, step(1))
    assert (session.cache, desk.table.ledger.used(Pool.CACHES), len(desk.table)) == (None, 0, 0)


def test_a_session_is_resumed_with_its_own_layers_and_dtype_only(desk: Desk) -> None:
    session = desk.open()
    desk.table.detach(session)
    for layers, dtype in ((range(2, 5), torch.float32), (LAYERS, torch.float16)):
        with pytest.raises(ProtocolError, match="its own partition and wire dtype"):
            desk.table.attach(session.name, "a", layers, dtype, ended)
    assert session.state is State.DETACHED


def test_layers_that_the_server_does_not_hold_are_refused(desk: Desk) -> None:
    for layers in (range(0, 5), range(1, 6)):
        with pytest.raises(PartitionError, match="the server holds layers 1:5"):
            desk.table.open("a", layers, torch.float32, ended)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (step(3, start=3), "step 3 came after step 1; 2 was expected"),
        (step(1, start=3), "step 1 came after step 1"),
        (step(2, start=4), "holds 3 tokens, the step would go on at 4"),
        (step(2, start=3, rows=2), "has 1 rows, the step has 2"),
        (step(2, start=3, row_map=(1,)), "has 1 rows, the row map names row 1"),
        (step(2, start=3, states=torch.zeros(3, 64, dtype=torch.float16)), "wire dtype is torch.float32"),
        (step(2, start=3, states=torch.zeros(3, 63)), "hidden size is 64, the states that came have 63"),
    ],
)
def test_a_step_that_does_not_follow_is_refused_and_changes_nothing(desk: Desk, wrong: Step, says: str) -> None:
    session, twin = desk.open(), desk.open()
    for one in (session, twin):
        desk.do(one, step(1))
    with pytest.raises(ProtocolError, match=says):
        desk.table.admit(session, wrong)
    assert torch.equal(desk.do(session, step(2, start=3)), desk.do(twin, step(2, start=3)))


def test_a_row_map_in_an_empty_session_is_refused(desk: Desk) -> None:
    with pytest.raises(ProtocolError, match="has 0 rows, the row map names row 0"):
        desk.table.admit(desk.open(), step(1, row_map=(0,)))


def test_tokens_of_a_session_and_of_a_row_are_limited(desk: Desk) -> None:
    session = desk.open()
    desk.do(session, step(1, count=300))
    with pytest.raises(LimitExceededError, match="301 tokens, more than the server's limit of 300 tokens a session"):
        desk.table.admit(session, step(2, start=300, count=1))
    roomy = Desk(replace(LIMITS, session_tokens=10_000))
    with pytest.raises(LimitExceededError, match="a row of 513 tokens is longer than the model's 512 positions"):
        roomy.table.admit(roomy.open(), step(1, count=513))


def test_memory_for_caches_is_limited_over_all_sessions_and_given_back() -> None:
    one_session = BLOCK * 4 * 2 * 2 * 16 * 4  # a block's tokens x layers x (keys, values) x heads x numbers x bytes
    desk = Desk(replace(LIMITS, cache_bytes=2 * one_session - 1))
    first, second = desk.open("a"), desk.open("b")
    desk.do(first, step(1))
    assert desk.table.ledger.used(Pool.CACHES) == one_session
    with pytest.raises(LimitExceededError, match="memory for caches"):
        desk.table.admit(second, step(1))
    desk.table.close(first)
    desk.do(second, step(1))
    assert desk.table.ledger.used(Pool.CACHES) == one_session
