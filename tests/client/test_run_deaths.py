"""Training through links that are cut and processes that die: every operation is done once, or one error says why."""

import threading
from typing import Any

import pytest
import torch

from fedsea import GaussianNoise, SplitModelForCausalLM
from fedsea.client.connection import Connection
from fedsea.errors import ProtocolError, RunLostError, ServerUnavailableError, UsageError
from fedsea.wire.frames import Forward, Frame, Operation
from fedsea.wire.tensors import tensor_bytes
from tests.client.conftest import BACK, LOST, STOPPING
from tests.conftest import OnSend, RunningServer, StartServer
from tests.support.comparing import assert_same_state, snapshot
from tests.support.link import Link
from tests.support.raw_stream import eventually, prompt
from tests.support.refused import refused
from tests.support.split_training import adamw, adapted, batch, batches, lora, train, trained

DROPPING = lora(lora_dropout=0.2)


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> RunningServer:
    return start_server()


Learnt = tuple[list[float], dict[str, torch.Tensor]]


def learn(model: SplitModelForCausalLM) -> Learnt:
    """Two optimizer steps of two batches each, whose numbers depend on everything that was done, and how often."""
    torch.manual_seed(3)
    seen = train(model, batches(4, lengths=(6, 3)), accumulate=2, clip=0.5)
    return seen, snapshot(model)


@pytest.fixture(scope="module")
def undisturbed(server: RunningServer) -> Learnt:
    with adapted(server, DROPPING) as model:
        return learn(model)


def assert_same(one: Learnt, other: Learnt) -> None:
    assert one[0] == other[0]
    assert_same_state(one[1], other[1])


# Two steps of two batches in two micro-batches are 8 FORWARDs, 8 BACKWARDs and 2 updates; then comes an export.
@pytest.mark.parametrize("at", [[1], [2], [4], [5], [8], [9], [10], [13], [18], [19], [2, 3, 4, 9, 9, 17]])
def test_a_link_cut_after_any_operation_leaves_the_numbers_as_they_are(
    link: Link, on_send: OnSend, undisturbed: Learnt, at: list[int]
) -> None:
    left = list(at)

    def cut(number: int, _operation: Operation) -> None:
        while left and number >= left[0]:
            left.pop(0)
            link.cut()

    with adapted(link, DROPPING) as model:
        on_send(Operation, cut)
        found = learn(model)
        assert model.traffic.reconnections >= 1
    assert left == []
    assert_same(found, undisturbed)


@pytest.mark.parametrize("at", [1, 2, 3, 6, 9, 11, 14, 18])
def test_a_link_cut_before_any_answer_is_read_leaves_the_numbers_as_they_are(
    server: RunningServer, link: Link, monkeypatch: pytest.MonkeyPatch, undisturbed: Learnt, at: int
) -> None:
    receive, asked = Connection.receive, [0]

    def cutting(self: Connection, **limits: Any) -> Frame:
        asked[0] += 1
        if asked[0] == at:
            # What was done is done by now, and its answers are lost on their way.
            run = next(iter(server.server.runs))
            done = run.number
            eventually(lambda: run.number > done, seconds=0.05)
            link.cut()
        return receive(self, **limits)

    with adapted(link, DROPPING) as model:
        monkeypatch.setattr(Connection, "receive", cutting)
        found = learn(model)
    assert_same(found, undisturbed)


def test_a_link_that_is_cut_again_and_again_by_the_clock(server: RunningServer, undisturbed: Learnt) -> None:
    over = threading.Event()
    with Link(server.address, delay_ms=2) as link:

        def cut_on() -> None:
            while not over.wait(0.15):
                link.cut()

        cutting = threading.Thread(target=cut_on)
        with adapted(link, DROPPING) as model:
            cutting.start()
            try:
                found = learn(model)
            finally:
                over.set()
                cutting.join()
    assert_same(found, undisturbed)


def test_a_cut_says_one_line_and_another_when_it_is_over(link: Link) -> None:
    notices: list[str] = []
    with adapted(link, DROPPING, notice=notices.append) as model:
        loss = model(**batch()).loss
        link.cut()
        loss.backward()
        assert notices == [LOST, BACK]
        assert model.traffic.reconnections == 1


def test_what_is_sent_again_is_sent_bit_for_bit_with_its_noise(link: Link, on_send: OnSend) -> None:
    sent: list[tuple[int, bytes]] = []

    def cut(number: int, operation: Forward) -> None:
        sent.append((operation.number, tensor_bytes(operation.states)))
        if number == 1:
            link.cut()

    with adapted(link, DROPPING, noise=GaussianNoise(0.5)) as model:
        on_send(Forward, cut)
        model(**batch()).loss.backward()
    assert len(sent) > len(dict(sent))
    assert len(set(sent)) == len(dict(sent))


def test_an_evaluation_waits_for_an_optimizer_step_that_got_lost(link: Link) -> None:
    with adapted(link, DROPPING) as model:
        optimizer = model.create_optimizer(lr=0.1)
        model(**batch()).loss.backward()
        link.pause()
        optimizer.step()
        link.cut()
        link.resume()
        model.eval()
        with torch.no_grad():
            logits = model(prompt()).logits
            model.middle.run.channel.settle()
            assert torch.equal(model(prompt()).logits, logits)


def test_a_server_that_is_frozen_for_a_while_is_waited_for(link: Link, undisturbed: Learnt) -> None:
    with adapted(link, DROPPING) as model:
        link.pause()
        timer = threading.Timer(1.0, link.resume)
        timer.start()
        assert_same(learn(model), undisturbed)
        timer.join()


def test_a_server_that_never_comes_back_is_one_clear_error_after_the_bound(serve: StartServer) -> None:
    server, notices = serve(), list[str]()
    with adapted(server, reconnect_seconds=0.5, notice=notices.append) as model:
        loss = model(**batch()).loss
        server.stop()
        with refused(ServerUnavailableError, r"no block server at .*tried again for 0.5 s\)"):
            loss.backward()
        assert notices == [STOPPING]


def test_a_server_restarted_without_the_run_says_what_to_do(serve: StartServer) -> None:
    server = serve()
    with adapted(server) as model:
        optimizer = adamw(trained(model))
        train(model, batches(1), optimizer=optimizer)
        adapter = snapshot(model)
        server.stop()
        again = serve(listen=server.address)
        for _ in range(2):
            with pytest.raises(RunLostError, match="resume the training from its last checkpoint"):
                train(model, batches(1), optimizer=optimizer)
        with torch.no_grad(), pytest.raises(RunLostError, match="does not have the run"):
            model(prompt())
        model.adapter.begin_run_again()
        model.set_adapter_state(adapter)
        train(model, batches(1), optimizer=adamw(trained(model)))
    assert eventually(lambda: len(again.server.runs) == 0)


def test_the_same_run_in_two_processes_is_the_later_ones(server: RunningServer) -> None:
    with adapted(server, run="twice") as first:
        with pytest.raises(UsageError, match="is at the server already, after 0 optimizer steps"):
            adapted(server, run="twice")
        first(**batch()).loss.backward()  # has not noticed
        second = adapted(server, run="twice", take_up=True)
        with pytest.raises(ProtocolError, match="another connection has taken the run up"):
            first(**batch())
        second(**batch()).loss.backward()
        second.adapter.end_run()
        second.close()
