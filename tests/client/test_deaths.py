"""Processes that die without a word, on either side: the others go on, and nothing of the dead stays behind."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea import SplitModelForCausalLM
from fedsea.errors import LimitExceededError, ProtocolError, UsageError
from fedsea.server import Limits
from fedsea.server.ledger import Pool
from fedsea.wire.codec import encode
from fedsea.wire.frames import Kind, Message
from tests.conftest import RunningServer, connect
from tests.support.link import Link
from tests.support.ports import held_address
from tests.support.raw_stream import RawStream, assert_same_tokens, eventually, prompt, step
from tests.support.split_training import adapted


class Child:
    """A Python process of its own, killed at the latest when the test is over."""

    def __init__(self, *arguments: str) -> None:
        environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def spawn() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(*arguments: str) -> Child:
        children.append(Child(*arguments))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        assert child.process.stdout is not None
        child.process.stdout.close()


@pytest.fixture
def server(start_server: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    monkeypatch.setattr("fedsea.server.service.SWEEP_SECONDS", 0.1)
    running = start_server(limits=Limits(resume_seconds=0.5))
    yield running
    running.stop()


def is_empty(server: RunningServer) -> bool:
    table = server.server.sessions
    return len(table) == 0 and server.server.ledger.used(Pool.CACHES) == 0 and not server.server.streams


def test_a_generation_outlives_a_server_that_is_killed_and_started_again(
    spawn: Callable[..., Child], whole_tiny: Any
) -> None:
    def serve(listen: str) -> tuple[Child, str]:
        child = spawn("-m", "fedsea", "serve", "random:tiny", "--listen", listen, "--insecure", "--json")
        return child, json.loads(child.line())["address"]

    first, address = serve(held_address())
    notices: list[str] = []

    def kill_and_start_again() -> None:
        first.kill()
        serve(address)

    with SplitModelForCausalLM.from_pretrained(
        "random:tiny", server=address, insecure=True, wire_dtype="float32", notice=notices.append
    ) as model:
        assert_same_tokens(model, whole_tiny, kill_and_start_again)
    assert notices == [
        "the connection to the block server is lost; reconnecting",
        "the connection to the block server is back; going on",
    ]


CLIENT = """
import sys, time, torch
from fedsea import SplitModelForCausalLM
model = SplitModelForCausalLM.from_pretrained("random:tiny", server=sys.argv[1], insecure=True)
cache = model.new_cache()
model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
print("ready", flush=True)
if sys.argv[2] == "stay":
    time.sleep(600)
"""


def test_a_killed_clients_cache_is_freed_when_its_time_is_over(
    server: RunningServer, spawn: Callable[..., Child], tmp_path: Path
) -> None:
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    client = spawn(str(script), server.address, "stay")
    assert client.line() == "ready\n"
    assert server.server.ledger.used(Pool.CACHES) > 0
    client.kill()
    assert eventually(lambda: is_empty(server))


def test_a_script_that_ends_without_closing_its_model_still_says_goodbye(
    start_server: Callable[..., RunningServer], spawn: Callable[..., Child], tmp_path: Path
) -> None:
    server = start_server(limits=Limits(resume_seconds=1e9))
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    client = spawn(str(script), server.address, "end")
    assert client.line() == "ready\n"
    assert client.process.wait(60) == 0
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


def test_twenty_clients_that_come_and_die_at_random_leave_nothing_and_disturb_nobody(
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


def test_models_that_come_and_go_leave_no_threads_and_no_connections(server: RunningServer) -> None:
    with Link(server.address) as link:
        for _ in range(3):
            model = SplitModelForCausalLM.from_pretrained("random:tiny", server=link.address, insecure=True)
            model.generate(prompt(), max_new_tokens=2)  # its cache is left to the garbage collector
            model.close()
            forgotten = SplitModelForCausalLM.from_pretrained("random:tiny", server=link.address, insecure=True)
            forgotten.generate(prompt(), max_new_tokens=2)
            del forgotten
        gc.collect()
        assert eventually(lambda: threads_of_grpc() == 0)
        assert eventually(lambda: link.connections == 0)
    assert eventually(lambda: is_empty(server))


def test_a_refused_model_that_the_servers_own_thread_collects_stops_nobody(server: RunningServer) -> None:
    """In one process, the garbage collector may close a model in the thread that would have to answer it."""
    model = adapted(server)
    assert model.middle.run is not None
    with pytest.raises(ProtocolError, match="has no weight 'nothing'"):
        model.middle.run.load({"adapter/nothing": torch.zeros(1)})
    model.cycle = model
    del model
    server._loop.call_soon_threadsafe(gc.collect)
    with connect(server, reconnect_seconds=5.0) as another:
        another.generate(prompt(), max_new_tokens=2)


def test_a_forked_process_is_told_that_it_cannot_use_the_model(server: RunningServer) -> None:
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
    start_server: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsea.server.service.SWEEP_SECONDS", 0.1)
    server = start_server(limits=Limits(idle_seconds=0.5))
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
