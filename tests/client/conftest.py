"""Models and processes that the tests of the client share."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsea import SplitModelForCausalLM, load_tokenizer
from fedsea.checkpoints import load_whole_model
from tests.conftest import RunningServer, StartServer, connect
from tests.support.link import Link
from tests.support.split_training import Twins, twins

Worded = tuple[Any, Any, Any]
"""A small model that has a real tokenizer, split and whole, and that tokenizer."""
LOST = "the connection to the block server is lost; reconnecting"
BACK = "the connection to the block server is back; going on"
STOPPING = "the block server is stopping; reconnecting"


@pytest.fixture(scope="module")
def split(tiny_server: RunningServer) -> Iterator[SplitModelForCausalLM]:
    """The tiny model, without an adapter."""
    with connect(tiny_server) as model:
        yield model


@pytest.fixture
def both(tiny_server: RunningServer, tmp_path: Path) -> Iterator[Twins]:
    """The tiny model with an adapter, split and whole."""
    with twins(tiny_server, tmp_path / "start") as models:
        yield models


@pytest.fixture
def link(server: RunningServer) -> Iterator[Link]:
    """A link to the module's server, to be cut."""
    with Link(server.address) as link:
        yield link


@pytest.fixture(scope="module")
def worded(start_server: StartServer, small: str) -> Iterator[Worded]:
    with connect(start_server(small), small) as model:
        yield model, load_whole_model(small), load_tokenizer(small)


class Child:
    """A Python process of its own, killed at the latest when the test is over."""

    def __init__(self, *arguments: str) -> None:
        environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

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
