"""Processes that die without a word, on either side: the others go on, and nothing of the dead stays behind."""

import gc
import json
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea.errors import LimitExceededError, ProtocolError, RunLostError, UsageError
from fedsea.server import Limits
from fedsea.server.leases import State
from fedsea.server.ledger import Pool
from fedsea.wire.codec import encode
from fedsea.wire.frames import Kind, Message
from tests.client.conftest import BACK, LOST, Child
from tests.conftest import RunningServer, StartServer, connect
from tests.support.comparing import snapshot
from tests.support.link import Link
from tests.support.ports import held_address
from tests.support.raw_stream import RawStream, assert_same_tokens, eventually, prompt, step
from tests.support.refused import refused
from tests.support.split_training import adapted, batches, train


@pytest.fixture
def server(serve: StartServer, monkeypatch: pytest.MonkeyPatch) -> RunningServer:
    monkeypatch.setattr("fedsea.server.service.SWEEP_SECONDS", 0.1)
    return serve(limits=Limits(resume_seconds=0.5, run_seconds=1000))


def is_empty(server: RunningServer) -> bool:
    state = server.server
    held = len(state.sessions) + len(state.runs) + len(state.streams)
    return held == 0 == state.ledger.used(Pool.CACHES) == state.ledger.used(Pool.ACTIVATIONS)


def test_a_killed_server_costs_a_training_its_run_and_a_generation_nothing(
    start_server: StartServer, spawn: Callable[..., Child], whole_tiny: Any
) -> None:
    child = spawn("-m", "fedsea", "serve", "random:tiny", "--listen", held_address(), "--insecure", "--json")
    address = json.loads(child.line())["address"]
    notices: list[str] = []

    def kill_and_start_again() -> None:
        child.kill()
        start_server(listen=address)

    with connect(address, notice=notices.append) as model, adapted(address) as learning:
        train(learning, batches(1))
        assert_same_tokens(model, whole_tiny, kill_and_start_again)
        assert notices == [LOST, BACK]
        with refused(RunLostError, "resume the training from its last checkpoint"):
            train(learning, batches(1))


CLIENT = """
import sys, time, torch
from fedsea.client import connection
connection.CLOSING_SECONDS = 60.0  # the machine may be busy
from peft import LoraConfig
from fedsea import SplitModelForCausalLM
ids = torch.tensor([[5, 6, 7, 8]])
where = {"server": sys.argv[1], "insecure": True, "wire_dtype": "float32"}
model, learning = (SplitModelForCausalLM.from_pretrained("random:tiny", **where) for _ in range(2))
cache = model.new_cache()
model(ids, past_key_values=cache)
adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
learning.add_adapter(adapter, seed=1, run="named" if sys.argv[2] == "stay" else None)
optimizer = learning.train().create_optimizer(lr=1e-2)
learning(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
learning.middle.run.channel.settle()
print("ready", flush=True)
if sys.argv[2] == "stay":
    learning(input_ids=ids, labels=ids).loss
    time.sleep(600)
"""


def test_a_script_that_ends_without_closing_its_models_still_says_goodbye(
    serve: StartServer, spawn: Callable[..., Child]
) -> None:
    server = serve(limits=Limits(resume_seconds=1e9, run_seconds=1e9))
    client = spawn("-c", CLIENT, server.address, "end")
    assert client.line() == "ready"
    assert client.process.wait(60) == 0
    assert eventually(lambda: is_empty(server))


def test_a_killed_clients_cache_is_freed_and_its_run_is_taken_up_by_its_name(
    server: RunningServer, spawn: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = server.server.runs
    client = spawn("-c", CLIENT, server.address, "stay")
    assert client.line() == "ready"
    assert server.server.ledger.used(Pool.CACHES) > 0
    client.kill()
    run = runs.find("named", "anonymous")
    assert eventually(lambda: run.state is State.DETACHED)
    left = {name: weight.detach().clone() for name, weight in run.trainer.parameters.items()}
    with adapted(server, run="named", take_up=True) as model:
        assert model.middle.run.version == 1
        found = snapshot(model)
        assert all(torch.equal(found[name], weight) for name, weight in left.items())
        assert any(bool(weight.any()) for name, weight in left.items() if ".lora_B." in name)
        train(model, batches(2))
    assert eventually(lambda: run.state is State.DETACHED)
    monkeypatch.setattr(runs, "clock", lambda: time.monotonic() + 2000)  # its client is away for too long
    assert eventually(lambda: is_empty(server))


def live_and_die(address: str, how: int, source: random.Random) -> None:
    """One client's life: a few steps, and one of the ways to go."""
    with Link(address) as link:
        stream = RawStream(link.address)
        stream.open()
        for number in range(source.randint(1, 4)):
            stream.send(step(number + 1, 0, count=source.randint(1, 60)))
            if source.random() < 0.7:
                stream.receive()
        if how == 0:
            link.cut()
        elif how == 1:
            stream.send(source.randbytes(30))
        elif how == 2:
            stream.send(encode(Message(Kind.CLOSE, {})))
        elif how == 3:
            stream.call.cancel()
        stream.abandon()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_twenty_clients_that_come_and_die_at_random_leave_nothing_and_disturb_no_other(
    server: RunningServer, whole_tiny: Any
) -> None:
    source = random.Random(3)

    def twenty() -> None:
        lives = [
            threading.Thread(target=live_and_die, args=(server.address, number % 5, random.Random(source.random())))
            for number in range(20)
        ]
        for life in lives:
            life.start()
        for life in lives:
            life.join(60)

    with connect(server) as model:
        resident = []
        for _ in range(3):
            assert_same_tokens(model, whole_tiny, twenty, prompt(tokens=20))
            assert eventually(lambda: len(server.server.sessions) <= 1)
            gc.collect()
            resident.append(resident_bytes())
        # The first round warms allocators up; after it, sixty sessions of a megabyte must not show.
        assert resident[2] - resident[1] < 20 << 20
    assert eventually(lambda: is_empty(server))
    with connect(server) as model:
        assert_same_tokens(model, whole_tiny, lambda: None)


def threads_of_grpc() -> int:
    return sum(
        "consume_request_iterator" in thread.name or "channel_spin" in thread.name for thread in threading.enumerate()
    )


def test_models_that_come_and_go_leave_no_threads_and_no_connections(server: RunningServer, link: Link) -> None:
    for _ in range(3):
        model = connect(link)
        model.generate(prompt(), max_new_tokens=2)  # its cache is left to the garbage collector
        model.close()
        forgotten = connect(link)
        forgotten.generate(prompt(), max_new_tokens=2)
        del forgotten
    gc.collect()
    assert eventually(lambda: threads_of_grpc() == 0)
    assert eventually(lambda: link.connections == 0)
    assert eventually(lambda: is_empty(server))


def test_a_refused_model_that_the_servers_own_thread_collects_stops_no_other(server: RunningServer) -> None:
    """In one process, the garbage collector may close a model in the thread that would have to answer it."""
    model = adapted(server)
    assert model.middle.run is not None
    with pytest.raises(ProtocolError, match="has no weight 'nothing'"):
        model.middle.run.load({"nothing": torch.zeros(1)})
    model.cycle = model
    del model
    server._loop.call_soon_threadsafe(gc.collect)
    with connect(server, reconnect_seconds=5.0) as another:
        another.generate(prompt(), max_new_tokens=2)


def test_a_forked_process_hears_that_it_cannot_use_the_model(server: RunningServer) -> None:
    with connect(server) as model:
        model.generate(prompt(), max_new_tokens=2)
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                model.generate(prompt(), max_new_tokens=2)
            except UsageError as error:
                os.write(tell, str(error).encode())
            finally:
                os._exit(0)
        os.close(tell)
        with os.fdopen(told) as words:
            assert "cannot be used in a forked process" in words.read()
        os.waitpid(child, 0)
        model.generate(prompt(), max_new_tokens=2)


def test_a_client_that_never_reads_is_ended_when_idle_and_its_cache_freed(
    serve: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsea.server.service.SWEEP_SECONDS", 0.1)
    server = serve(limits=Limits(idle_seconds=0.5))
    stream = RawStream(server.address)
    stream.open()
    for number in range(400):
        stream.send(step(number + 1, 0, count=500))
    assert eventually(lambda: len(server.server.sessions) == 0)
    assert server.server.ledger.used(Pool.CACHES) == 0
    assert len(server.server.streams) == 1  # it waits for its reader, and counts
    stream.abandon()
    assert eventually(lambda: is_empty(server))


def test_a_step_that_fails_frees_what_it_held_without_waiting_for_the_garbage_collector(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def fail(hidden: torch.Tensor, *_arguments: object) -> torch.Tensor:
        held.append(weakref.ref(hidden))
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(server.server.middle, "forward", fail)
    gc.disable()
    try:
        with RawStream(server.address) as stream:
            stream.open()
            stream.send(step(1))
            error = stream.refusal()
        assert isinstance(error, LimitExceededError)
        assert "out of memory" in str(error)
        assert eventually(lambda: held[0]() is None, seconds=5)
    finally:
        gc.enable()
    assert eventually(lambda: is_empty(server))
