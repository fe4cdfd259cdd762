"""A connection that is lost, at any moment and in any way of generating, costs time and nothing else."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedsea import GaussianNoise
from fedsea.client.connection import Connection
from fedsea.errors import FedSEAError, ServerUnavailableError
from fedsea.server import Limits
from fedsea.server.leases import State
from fedsea.server.ledger import Pool
from fedsea.wire.frames import Frame, Result, Step
from fedsea.wire.tensors import tensor_bytes
from tests.client.conftest import BACK, LOST, STOPPING
from tests.conftest import OnSend, RunningServer, StartServer, connect
from tests.support.link import Link
from tests.support.raw_stream import RawStream, assert_same_tokens, eventually, prompt, step
from tests.support.refused import refused


@pytest.fixture
def server(serve: StartServer) -> RunningServer:
    return serve()


@pytest.fixture
def sent(on_send: OnSend) -> list[Step]:
    """All steps that clients send."""
    steps: list[Step] = []
    on_send(Step, lambda _number, step: steps.append(step))
    return steps


@pytest.fixture
def restart(server: RunningServer, serve: StartServer) -> Callable[[], None]:
    """Has another server take the server's place, which knows of nothing."""

    def stop_and_start() -> None:
        server.stop()
        serve(listen=server.address)

    return stop_and_start


def replays(steps: list[Step]) -> list[Step]:
    return [step for step in steps if not step.want_result]


RAGGED = {"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])}
WAYS: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
    "greedy": (prompt(), {}),
    "a ragged batch": (prompt(rows=3), RAGGED),
    "beams": (prompt(rows=2), {"num_beams": 3}),
    "assisted": (prompt(tokens=4).repeat(1, 3), {"prompt_lookup_num_tokens": 3, "max_new_tokens": 14}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_cut_link_costs_one_notice_and_no_replay(
    server: RunningServer, link: Link, sent: list[Step], whole_tiny: Any, way: str
) -> None:
    ids, how = WAYS[way]
    notices: list[str] = []
    with connect(link, notice=notices.append) as model:
        assert_same_tokens(model, whole_tiny, link.cut, ids, **how)
        assert model.traffic.reconnections == 1
    assert notices == [LOST, BACK]
    assert replays(sent) == []


@pytest.mark.parametrize("way", WAYS)
def test_a_restarted_server_is_sent_the_session_again_bit_for_bit_with_its_noise(
    server: RunningServer, restart: Callable[[], None], sent: list[Step], way: str
) -> None:
    ids, how = WAYS[way]
    notices: list[str] = []
    with connect(server, noise=GaussianNoise(0.5), notice=notices.append) as model:
        assert_same_tokens(model, model, restart, ids, **how)
    assert notices == [STOPPING, BACK]
    first = {tensor_bytes(state) for step in sent if step.want_result for state in step.states}
    replayed = [tensor_bytes(state) for step in replays(sent) for state in step.states]
    assert replayed
    assert set(replayed) <= first


@pytest.mark.parametrize("at", [[1], [2], [5], [7], [2, 9, 11]])
def test_a_cut_in_the_middle_of_a_long_prompt_is_made_good(
    link: Link, whole_tiny: Any, on_send: OnSend, monkeypatch: pytest.MonkeyPatch, at: list[int]
) -> None:
    monkeypatch.setattr("fedsea.client.session.CHUNK_TOKENS", 16)
    ids = prompt(rows=2, tokens=60)
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    with connect(link) as model:
        on_send(Step, lambda number, _step: number in at and link.cut())
        assert_same_tokens(model, whole_tiny, lambda: None, ids, attention_mask=mask)
        assert model.traffic.reconnections >= 1


def test_a_session_cut_in_a_later_turns_long_prompt_is_taken_up_again(
    server: RunningServer,
    link: Link,
    sent: list[Step],
    on_send: OnSend,
    whole_tiny: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedsea.client.session.CHUNK_TOKENS", 16)
    ids = prompt(tokens=100)
    with connect(link) as model:
        cache = model.new_cache()
        model(ids[:, :9], past_key_values=cache)
        [session] = server.server.sessions
        on_send(Step, lambda number, _step: number == 3 and link.cut())
        logits = model(ids[:, 9:], past_key_values=cache).logits
        assert list(server.server.sessions) == [session]
        assert replays(sent) == []
    torch.testing.assert_close(logits, whole_tiny(ids).logits[:, 9:], atol=1e-4, rtol=0)


def test_a_cut_during_the_replay_starts_the_replay_again(
    link: Link, restart: Callable[[], None], whole_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsea.client.session.CHUNK_TOKENS", 16)
    receive, cuts = Connection.receive, [2]

    def cutting(self: Connection) -> Frame:
        frame = receive(self)
        if isinstance(frame, Result) and frame.states is None and cuts[0]:  # only a replayed step has no result
            cuts[0] -= 1
            link.cut()
        return frame

    monkeypatch.setattr(Connection, "receive", cutting)
    with connect(link) as model:
        assert_same_tokens(model, whole_tiny, restart, prompt(tokens=70))
    assert cuts == [0]


def test_a_server_that_never_comes_back_is_one_clear_error_after_the_bound(server: RunningServer) -> None:
    notices: list[str] = []
    with connect(server, notice=notices.append, reconnect_seconds=0.5) as model:
        with refused(ServerUnavailableError, r"no block server at .*tried again for 0.5 s\)"):
            assert_same_tokens(model, model, server.stop)
        assert notices == [STOPPING]
        with pytest.raises(ServerUnavailableError, match="no block server at"):
            connect(server)


def test_two_sessions_of_one_model_find_back_without_disturbing_each_other(
    server: RunningServer, link: Link, whole_tiny: Any
) -> None:
    notices: list[str] = []
    ids = prompt(tokens=30)
    reference = whole_tiny(ids).logits
    with connect(link, notice=notices.append) as model:
        caches = [model.new_cache(), model.new_cache()]
        for start in range(0, 30, 5):
            if start == 10:
                link.cut()
            for cache in caches:
                logits = model(ids[:, start : start + 5], past_key_values=cache).logits
                torch.testing.assert_close(logits, reference[:, start : start + 5], atol=1e-4, rtol=0)
        assert notices == [LOST, BACK] * 2
        assert eventually(lambda: link.connections == 1)
    assert eventually(lambda: link.connections == 0)


class SlowStep:
    """Makes the server's next step wait, in the middle of its computation, until it is let go."""

    def __init__(self, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        middle = server.server.middle
        compute = middle.forward

        def slow(*arguments: Any) -> torch.Tensor:
            self.begun.set()
            assert self.go_on.wait(60)
            return compute(*arguments)

        monkeypatch.setattr(middle, "forward", slow)


def test_a_session_resumed_while_its_lost_step_computes_knows_that_step(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = RawStream(server.address)
    name = lost.open().session
    slow = SlowStep(server, monkeypatch)
    lost.send(step(1))
    assert slow.begun.wait(60)
    lost.abandon()
    back = RawStream(server.address)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(back.open(resume=name)))
    asking.start()
    [session] = server.server.sessions
    assert eventually(lambda: session.state is State.ATTACHED and len(server.server.streams) == 1)
    slow.go_on.set()
    asking.join(60)
    assert (answers[0].session, answers[0].step) == (name, 1)
    back.send(step(2, 3))
    assert isinstance(back.receive(), Result)
    back.abandon()


def test_a_server_that_is_stopped_in_a_step_tells_all_sessions_and_stops(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, idle, silent = (RawStream(server.address) for _ in range(3))
    busy.open()
    idle.open()
    slow = SlowStep(server, monkeypatch)
    busy.send(step(1))
    assert slow.begun.wait(60)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    for stream in (busy, idle, silent):
        error: FedSEAError = stream.refusal()
        assert isinstance(error, ServerUnavailableError)
        assert "stopping" in str(error)
        stream.abandon()
    slow.go_on.set()
    stopping.join(60)
    assert not stopping.is_alive()


def test_a_lost_session_is_its_own_clients_only_until_its_time_is_over(
    serve: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsea.server.service.SWEEP_SECONDS", 0.1)
    server = serve(limits=Limits(resume_seconds=0.3))
    with RawStream(server.address) as lost:
        name = lost.open().session
        lost.send(step(1))
        lost.receive()
    assert eventually(lambda: len(server.server.sessions) == 0)
    assert server.server.ledger.used(Pool.CACHES) == 0
    with RawStream(server.address) as back:
        opened = back.open(resume=name)
        assert opened.session != name
        assert opened.step == 0
