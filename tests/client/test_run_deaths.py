"""Training through links that are cut and processes that die: every operation is done once, or one error says why."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea import GaussianNoise, SplitModelForCausalLM
from fedsea.client.channel import RunChannel
from fedsea.client.connection import Connection
from fedsea.errors import ProtocolError, RunLostError, ServerUnavailableError, UsageError
from fedsea.server import Limits
from fedsea.server.leases import State
from fedsea.server.ledger import Pool
from fedsea.server.trainer import Trainer
from fedsea.wire.frames import Forward, Frame, Operation
from fedsea.wire.tensors import tensor_bytes
from tests.client.test_deaths import Child, spawn  # noqa: F401 - a fixture
from tests.conftest import RunningServer, connect
from tests.support.link import Link
from tests.support.ports import held_address
from tests.support.raw_stream import eventually, prompt
from tests.support.split_training import adamw, adapted, batch, batches, lora, snapshot, train, trained

LOST = "the connection to the block server is lost; reconnecting"
BACK = "the connection to the block server is back; going on"
DROPPING = lora(lora_dropout=0.2)


@pytest.fixture(scope="module")
def server(start_server: Callable[..., RunningServer]) -> RunningServer:
    return start_server()


@pytest.fixture
def link(server: RunningServer) -> Iterator[Link]:
    with Link(server.address) as link:
        yield link


def through(link: Link, **how: Any) -> SplitModelForCausalLM:
    """A model in training whose connections go over the link."""
    how.setdefault("notice", lambda _line: None)
    model = SplitModelForCausalLM.from_pretrained(
        "random:tiny", server=link.address, insecure=True, wire_dtype="float32", **how
    )
    model.add_adapter(DROPPING, seed=1)
    model.train()
    model.micro_batches = 2
    return model


def learn(model: SplitModelForCausalLM) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Two optimizer steps of two batches each, whose numbers depend on everything that was done, and how often."""
    torch.manual_seed(3)
    seen = train(model, batches(4, lengths=(6, 3)), accumulate=2, clip=0.5)
    return seen, snapshot(model)


@pytest.fixture(scope="module")
def undisturbed(server: RunningServer) -> tuple[list[float], dict[str, torch.Tensor]]:
    with adapted(server, DROPPING) as model:
        return learn(model)


def assert_same(one: tuple[list[float], dict[str, torch.Tensor]], other: tuple[Any, dict[str, torch.Tensor]]) -> None:
    assert one[0] == other[0]
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


# Two steps of two batches in two micro-batches are 8 FORWARDs, 8 BACKWARDs and 2 updates; then comes an export.
@pytest.mark.parametrize("at", [[1], [2], [4], [5], [8], [9], [10], [13], [18], [19], [2, 3, 4, 9, 9, 17]])
def test_a_link_cut_after_any_operation_leaves_the_numbers_as_they_are(
    server: RunningServer,
    link: Link,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: tuple[Any, dict[str, torch.Tensor]],
    at: list[int],
) -> None:
    put, sent, left = RunChannel._put, [0], list(at)

    def cutting(self: RunChannel, operation: Operation) -> None:
        put(self, operation)
        sent[0] += 1
        while left and sent[0] >= left[0]:
            left.pop(0)
            link.cut()

    with through(link) as model:
        monkeypatch.setattr(RunChannel, "_put", cutting)
        found = learn(model)
        assert model.traffic.reconnections >= 1
    assert left == []
    assert_same(found, undisturbed)


@pytest.mark.parametrize("at", [1, 2, 3, 6, 9, 11, 14, 18])
def test_a_link_cut_before_any_answer_is_read_leaves_the_numbers_as_they_are(
    server: RunningServer,
    link: Link,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: tuple[Any, dict[str, torch.Tensor]],
    at: int,
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

    with through(link) as model:
        monkeypatch.setattr(Connection, "receive", cutting)
        found = learn(model)
    assert_same(found, undisturbed)


def test_a_link_that_is_cut_again_and_again_by_the_clock(
    server: RunningServer, undisturbed: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    over = threading.Event()
    with Link(server.address, delay_ms=2) as link:

        def cut_on() -> None:
            while not over.wait(0.15):
                link.cut()

        cutting = threading.Thread(target=cut_on)
        with through(link) as model:
            cutting.start()
            try:
                found = learn(model)
            finally:
                over.set()
                cutting.join()
    assert_same(found, undisturbed)


def test_a_cut_says_one_line_and_another_when_it_is_over(server: RunningServer, link: Link) -> None:
    notices: list[str] = []
    with through(link, notice=notices.append) as model:
        loss = model(**batch()).loss
        link.cut()
        loss.backward()
        assert notices == [LOST, BACK]
        assert model.traffic.reconnections == 1


def test_what_is_sent_again_is_sent_bit_for_bit_with_its_noise(
    server: RunningServer, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = RunChannel._put
    sent: list[tuple[int, bytes]] = []

    def cutting(self: RunChannel, operation: Operation) -> None:
        put(self, operation)
        if isinstance(operation, Forward):
            sent.append((operation.number, tensor_bytes(operation.states)))
            if len(sent) == 1:
                link.cut()

    with through(link, noise=GaussianNoise(0.5)) as model:
        monkeypatch.setattr(RunChannel, "_put", cutting)
        model(**batch()).loss.backward()
    assert len(sent) > len(dict(sent))
    assert len(set(sent)) == len(dict(sent))


def test_an_evaluation_waits_for_an_optimizer_step_that_got_lost(server: RunningServer, link: Link) -> None:
    with through(link) as model:
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


def test_a_server_that_is_frozen_for_a_while_is_waited_for(
    server: RunningServer, link: Link, undisturbed: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    with through(link) as model:
        link.pause()
        timer = threading.Timer(1.0, link.resume)
        timer.start()
        assert_same(learn(model), undisturbed)
        timer.join()


def test_a_server_that_never_comes_back_is_one_clear_error_after_the_bound(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server()
    notices: list[str] = []
    with connect(server, reconnect_seconds=0.5, notice=notices.append) as model:
        model.add_adapter(lora())
        model.train()
        loss = model(**batch()).loss
        server.stop()
        with pytest.raises(ServerUnavailableError, match=r"no block server at .*tried again for 0.5 s\)") as raised:
            loss.backward()
        assert "\n" not in str(raised.value)
        assert notices == ["the block server is stopping; reconnecting"]


def test_a_server_restarted_without_the_run_says_what_to_do(start_server: Callable[..., RunningServer]) -> None:
    server = start_server()
    model = adapted(server)
    optimizer = adamw(trained(model))
    train(model, batches(1), optimizer=optimizer)
    adapter = snapshot(model)
    server.stop()
    again = start_server(listen=server.address)
    for _ in range(2):
        with pytest.raises(RunLostError, match="resume the training from its last checkpoint"):
            train(model, batches(1), optimizer=optimizer)
    with torch.no_grad(), pytest.raises(RunLostError, match="does not have the run"):
        model(prompt())
    model.adapter.begin_run_again()
    model.set_adapter_state(adapter)
    optimizer = adamw(trained(model))
    train(model, batches(1), optimizer=optimizer)
    model.close()
    assert eventually(lambda: len(again.server.runs) == 0)
    again.stop()


def test_a_server_that_is_killed_loses_the_run_and_says_so_and_a_stopped_one_is_waited_for(
    start_server: Callable[..., RunningServer],
    spawn: Callable[..., Child],  # noqa: F811
) -> None:
    child = spawn("-m", "fedsea", "serve", "random:tiny", "--listen", held_address(), "--insecure", "--json")
    address = json.loads(child.line())["address"]
    model = SplitModelForCausalLM.from_pretrained(
        "random:tiny", server=address, insecure=True, notice=lambda _line: None
    )
    model.add_adapter(lora())
    model.train()
    os.kill(child.process.pid, signal.SIGSTOP)
    timer = threading.Timer(0.5, os.kill, (child.process.pid, signal.SIGCONT))
    timer.start()
    train(model, batches(1))
    timer.join()
    child.kill()
    start_server(listen=address)
    with pytest.raises(RunLostError, match="resume the training from its last checkpoint") as raised:
        train(model, batches(1))
    assert "\n" not in str(raised.value)
    model.close()


CLIENT = """
import sys, time, torch
from peft import LoraConfig
from fedsea import SplitModelForCausalLM
model = SplitModelForCausalLM.from_pretrained("random:tiny", server=sys.argv[1], insecure=True, wire_dtype="float32")
model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), seed=1, run=sys.argv[2] or None)
model.train()
optimizer = model.create_optimizer(lr=1e-2)
ids = torch.tensor([[5, 6, 7, 8]])
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
model.middle.run.channel.settle()
print("ready", flush=True)
if sys.argv[3] == "stay":
    model(input_ids=ids, labels=ids).loss
    time.sleep(600)
"""


@pytest.fixture
def forgetful(start_server: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    monkeypatch.setattr("fedsea.server.service.SWEEP_SECONDS", 0.1)
    running = start_server(limits=Limits(run_seconds=3))
    yield running
    running.stop()


def test_a_killed_clients_run_is_taken_up_by_its_name_and_one_that_just_ends_says_goodbye(
    forgetful: RunningServer,
    spawn: Callable[..., Child],  # noqa: F811
    tmp_path: Path,
) -> None:
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    runs = forgetful.server.runs
    killed, leaving = (spawn(str(script), forgetful.address, *how) for how in (("named", "stay"), ("", "end")))
    assert leaving.line() == "ready\n"
    assert leaving.process.wait(60) == 0
    assert eventually(lambda: len(runs) <= 1)
    assert killed.line() == "ready\n"
    killed.kill()
    run = runs.find("named", "anonymous")
    assert eventually(lambda: run.state is State.DETACHED)
    trainer: Trainer = run.trainer
    left = {name: weight.detach().clone() for name, weight in trainer.parameters.items()}
    with adapted(forgetful, run="named", take_up=True) as model:
        assert model.middle.run.version == 1
        found = snapshot(model)
        assert all(torch.equal(found[name], weight) for name, weight in left.items())
        assert any(bool(weight.any()) for name, weight in left.items() if ".lora_B." in name)
        train(model, batches(2))
    assert eventually(lambda: len(runs) == 0)  # its client is away for too long
    assert forgetful.server.ledger.used(Pool.ACTIVATIONS) == 0


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
