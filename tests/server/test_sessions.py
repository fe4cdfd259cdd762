"""The life of a session as its state machine describes it: every transition, on a clock that the test moves."""

from dataclasses import replace

import pytest
import torch

from fedsea.checkpoints import open_checkpoint
from fedsea.errors import FedSEAError, LimitExceededError, PartitionError, ProtocolError
from fedsea.parts import MiddleBlocks, Rows
from fedsea.server import Limits
from fedsea.server.leases import State
from fedsea.server.sessions import Session, SessionTable
from fedsea.wire.codec import decode
from fedsea.wire.frames import Result, Step

LAYERS = range(1, 5)
LIMITS = Limits(
    sessions=3, client_sessions=2, session_tokens=300, idle_seconds=100, resume_seconds=10, cache_bytes=1 << 20
)


@pytest.fixture(scope="module")
def middle() -> MiddleBlocks:
    return MiddleBlocks.from_checkpoint(open_checkpoint("random:tiny"), LAYERS, dtype=torch.float32)


class Ends:
    """Stands for the connections: what each was told."""

    def __init__(self) -> None:
        self.told: list[FedSEAError] = []

    def __call__(self, reason: FedSEAError) -> None:
        self.told.append(reason)


class Desk:
    """A session table on a clock that stands still unless it is moved."""

    def __init__(self, middle: MiddleBlocks, limits: Limits) -> None:
        self.now = 0.0
        self.table = SessionTable(middle, limits, dtype=torch.float32, clock=lambda: self.now)

    def open(self, client: str = "a", end: Ends | None = None) -> Session:
        return self.table.open(client, LAYERS, torch.float32, end or Ends())

    def attach(self, session: Session, client: str = "a", end: Ends | None = None) -> Session | None:
        return self.table.attach(session.name, client, LAYERS, torch.float32, end or Ends())

    def do(self, session: Session, step: Step) -> Result:
        self.table.admit(session, step)
        result = decode(self.table.do(session, step))
        assert isinstance(result, Result)
        return result


@pytest.fixture
def desk(middle: MiddleBlocks) -> Desk:
    return Desk(middle, LIMITS)


def step(number: int, start: int = 0, count: int = 3, rows: int = 1, **more: object) -> Step:
    states = torch.randn(rows * count, 64, generator=torch.Generator().manual_seed(number))
    return replace(Step(number, Rows.uniform(rows, start, count), states), **more)


def test_open_gives_an_attached_session_with_an_unguessable_name(desk: Desk) -> None:
    one, other = desk.open(), desk.open()
    assert one.state is State.ATTACHED
    assert one.name != other.name
    assert len(one.name) >= 32
    assert len(desk.table) == 2


def test_attached_to_ended_by_close(desk: Desk) -> None:
    session = desk.open()
    desk.do(session, step(1))
    assert desk.table.cache_bytes > 0
    desk.table.close(session)
    assert session.state is State.ENDED
    assert (len(desk.table), desk.table.cache_bytes, session.cache) == (0, 0, None)


def test_attached_to_detached_when_the_connection_is_lost_keeps_the_cache(desk: Desk) -> None:
    session = desk.open()
    desk.do(session, step(1))
    taken = desk.table.cache_bytes
    desk.table.detach(session)
    assert session.state is State.DETACHED
    assert desk.table.cache_bytes == taken > 0


def test_detached_to_attached_goes_on_where_it_was(desk: Desk) -> None:
    session, twin = desk.open(), desk.open()
    for one in (session, twin):
        desk.do(one, step(1))
    desk.table.detach(session)
    desk.now = 9
    assert desk.attach(session) is session
    assert session.state is State.ATTACHED
    assert session.step == 1
    resumed, never_lost = desk.do(session, step(2, start=3)).states, desk.do(twin, step(2, start=3)).states
    assert resumed is not None
    assert never_lost is not None
    assert torch.equal(resumed, never_lost)


def test_attached_to_attached_takes_the_session_from_its_old_connection(desk: Desk) -> None:
    old, new = Ends(), Ends()
    session = desk.open(end=old)
    assert desk.attach(session, end=new) is session
    assert [type(reason) for reason in old.told] == [ProtocolError]
    assert new.told == []
    assert session.end is new


def test_detached_to_ended_when_the_resume_time_is_over(desk: Desk) -> None:
    session = desk.open()
    desk.do(session, step(1))
    desk.table.detach(session)
    desk.now = 10
    assert desk.table.expire() == []
    desk.now = 10.1
    assert desk.table.expire() == [session]
    assert session.state is State.ENDED
    assert desk.table.cache_bytes == 0
    assert desk.attach(session) is None


def test_detached_to_ended_when_its_own_client_needs_the_room(desk: Desk) -> None:
    lost_first, lost_later = desk.open(), desk.open()
    desk.table.detach(lost_first)
    desk.now = 1
    desk.table.detach(lost_later)
    new = desk.open()
    assert (lost_first.state, lost_later.state, new.state) == (State.ENDED, State.DETACHED, State.ATTACHED)


def test_another_clients_lost_session_does_not_give_way(desk: Desk) -> None:
    lost = desk.open("a")
    desk.open("a")
    desk.open("b")
    desk.table.detach(lost)
    with pytest.raises(LimitExceededError, match="the server has 3 sessions open, its limit"):
        desk.open("c")
    assert lost.state is State.DETACHED


def test_attached_to_ended_when_idle_and_its_connection_is_told_the_limit(desk: Desk) -> None:
    end = Ends()
    session = desk.open(end=end)
    desk.do(session, step(1))
    desk.now = 100
    assert desk.table.expire() == []
    desk.now = 100.1
    assert desk.table.expire() == [session]
    assert session.state is State.ENDED
    [reason] = end.told
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


def test_ended_leads_nowhere(desk: Desk) -> None:
    session = desk.open()
    desk.table.close(session)
    assert desk.attach(session) is None
    desk.table.detach(session)
    assert session.state is State.ENDED
    for do in (desk.table.admit, desk.table.do):
        with pytest.raises(ProtocolError, match="has ended"):
            do(session, step(1))
    desk.table.close(session)
    assert session.state is State.ENDED


def test_a_step_whose_session_ends_meanwhile_leaves_nothing_behind(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    session = desk.open()
    compute = desk.table.middle.forward

    def ends_meanwhile(*arguments: object) -> torch.Tensor:
        desk.table.close(session)
        return compute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(desk.table.middle, "forward", ends_meanwhile)
    desk.do(session, step(1))
    assert (session.cache, desk.table.cache_bytes, len(desk.table)) == (None, 0, 0)


def test_nobody_resumes_a_session_of_another_client(desk: Desk) -> None:
    session = desk.open("a")
    desk.table.detach(session)
    assert desk.attach(session, "b") is None
    assert session.state is State.DETACHED


def test_a_session_is_resumed_with_its_own_layers_and_dtype_only(desk: Desk) -> None:
    session = desk.open()
    desk.table.detach(session)
    for layers, dtype in ((range(2, 5), torch.float32), (LAYERS, torch.float16)):
        with pytest.raises(ProtocolError, match="its own partition and wire dtype"):
            desk.table.attach(session.name, "a", layers, dtype, Ends())
    assert session.state is State.DETACHED


def test_layers_that_the_server_does_not_hold_are_refused(desk: Desk) -> None:
    for layers in (range(0, 5), range(1, 6)):
        with pytest.raises(PartitionError, match="the server holds layers 1:5"):
            desk.table.open("a", layers, torch.float32, Ends())


def test_sessions_of_one_client_are_limited(desk: Desk) -> None:
    desk.open("a")
    desk.open("a")
    with pytest.raises(LimitExceededError, match="limit of sessions per client"):
        desk.open("a")
    desk.open("b")


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
    after, untouched = desk.do(session, step(2, start=3)).states, desk.do(twin, step(2, start=3)).states
    assert after is not None
    assert untouched is not None
    assert torch.equal(after, untouched)


def test_a_row_map_in_an_empty_session_is_refused(desk: Desk) -> None:
    with pytest.raises(ProtocolError, match="has 0 rows, the row map names row 0"):
        desk.table.admit(desk.open(), step(1, row_map=(0,)))


def test_tokens_of_a_session_and_of_a_row_are_limited(desk: Desk, middle: MiddleBlocks) -> None:
    session = desk.open()
    desk.do(session, step(1, count=300))
    with pytest.raises(LimitExceededError, match="301 tokens, more than the server's limit of 300 tokens a session"):
        desk.table.admit(session, step(2, start=300, count=1))
    roomy = Desk(middle, replace(LIMITS, session_tokens=10_000))
    with pytest.raises(LimitExceededError, match="a row of 513 tokens is longer than the model's 512 positions"):
        roomy.table.admit(roomy.open(), step(1, count=513))


def test_memory_for_caches_is_limited_over_all_sessions_and_given_back(middle: MiddleBlocks) -> None:
    # Buffers grow by 256 tokens at least: 256 tokens x 4 layers x (keys, values) x 2 heads x 16 numbers x 4 bytes.
    one_session = 256 * 4 * 2 * 2 * 16 * 4
    desk = Desk(middle, replace(LIMITS, cache_bytes=2 * one_session - 1))
    first, second = desk.open("a"), desk.open("b")
    desk.do(first, step(1))
    assert desk.table.cache_bytes == one_session
    with pytest.raises(LimitExceededError, match="memory for caches"):
        desk.table.admit(second, step(1))
    desk.table.close(first)
    desk.do(second, step(1))
    assert desk.table.cache_bytes == one_session
