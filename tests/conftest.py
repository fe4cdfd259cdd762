"""Block servers and models that many tests share."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedsea import SplitModelForCausalLM
from fedsea.checkpoints import load_tokenizer, load_whole_model, open_checkpoint
from fedsea.client.connection import Connection
from fedsea.server import BackgroundServer, ServerOptions
from fedsea.wire.credential_files import create_credentials
from fedsea.wire.frames import Forward, Frame
from tests.support.ports import held_address

# Several test processes share the cores, a thread each; a test that is run alone has two.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
# What the children import sooner or later, of Python itself and of others.
IMPORTED_BY_CHILDREN = [
    "json",
    "asyncio",
    "tempfile",
    "subprocess",
    "typer",
    "click",
    "rich",
    "torch",
    "gguf",
    "accelerate",
    "flwr",
]


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """What a command has set for itself is not the next test's: on a busy machine threads that wait cost much."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


class RunningServer(BackgroundServer):
    """A real block server in a thread of its own, by the name of its model."""

    def __init__(self, name: str, options: ServerOptions, tap: Any = None) -> None:
        super().__init__(open_checkpoint(name), options, tap)

    stop = BackgroundServer.close


StartServer = Callable[..., RunningServer]


@pytest.fixture(scope="session")
def start_server() -> Iterator[StartServer]:
    """Start block servers; all are stopped at the end."""
    running: list[RunningServer] = []

    def start(name: str = "random:tiny", tap: Any = None, **options: object) -> RunningServer:
        options.setdefault("listen", held_address())
        server = RunningServer(name, ServerOptions(**options), tap)  # type: ignore[arg-type]
        running.append(server)
        return server

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def serve(start_server: StartServer) -> Iterator[StartServer]:
    """Start block servers for one test."""
    running: list[RunningServer] = []

    def start(*arguments: object, **options: object) -> RunningServer:
        running.append(start_server(*arguments, **options))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def tiny_server(start_server: StartServer) -> RunningServer:
    """A server of the tiny random model, all layers, without TLS."""
    return start_server("random:tiny")


@pytest.fixture(scope="session")
def whole_tiny() -> torch.nn.Module:
    """The tiny random model, whole, in transformers: the reference."""
    return load_whole_model("random:tiny", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of credentials, of two clients beside the server and the coordinator."""
    return create_credentials(tmp_path_factory.mktemp("made"), clients=["client-a", "client-b"]).directory


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of another authority."""
    return create_credentials(tmp_path_factory.mktemp("other")).directory


def numbered_secrets(patch: pytest.MonkeyPatch) -> None:
    """Draw the same noise in each run: the secret of each model is the next number, not the operating system's."""
    numbers = itertools.count()
    secrets = SimpleNamespace(token_bytes=lambda size: next(numbers).to_bytes(size, "big"))
    patch.setattr("fedsea.privacy.source.secrets", secrets)


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that compares figures under noise."""
    numbered_secrets(monkeypatch)


class Place(Protocol):
    """Where a client connects to: a server, or a link to one."""

    @property
    def address(self) -> str: ...


def connect(server: Place | str, name: str = "random:tiny", **options: object) -> SplitModelForCausalLM:
    """A split model at a test server; unless the options say otherwise, exact on the wire and without a word."""
    exact = {"wire_dtype": "float32", "insecure": "credentials" not in options, "notice": lambda _line: None}
    address = server if isinstance(server, str) else server.address
    return SplitModelForCausalLM.from_pretrained(name, server=address, **(exact | options))  # type: ignore[arg-type]


def save_small_model(folder: Path, **settings: object) -> str:
    """Write a small random model with the default model's tokenizer; returns its folder."""
    tokenizer = load_tokenizer("smollm2-135m")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model with the default model's tokenizer."""
    return save_small_model(tmp_path_factory.mktemp("small"))


OnSend = Callable[[Any, Callable[[int, Any], object]], None]


@pytest.fixture
def on_send(monkeypatch: pytest.MonkeyPatch) -> OnSend:
    """From now on calls a function after each frame of a kind that clients send, with its number, from 1."""

    def install(kind: Any, act: Callable[[int, Any], object]) -> None:
        send, numbers = Connection.send, itertools.count(1)

        def sending(self: Connection, frame: Frame) -> None:
            send(self, frame)
            if isinstance(frame, kind):
                act(next(numbers), frame)

        monkeypatch.setattr(Connection, "send", sending)

    return install


@pytest.fixture
def forwards(on_send: OnSend) -> list[Forward]:
    """All forward passes that clients in training send, as often as they do."""
    seen: list[Forward] = []
    on_send(Forward, lambda _number, frame: seen.append(frame))
    return seen


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder whose modules leave a mark when they are imported; the path of the mark."""
    folder, mark = tmp_path / "here", tmp_path / "mark"
    folder.mkdir()
    for name in IMPORTED_BY_CHILDREN:
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write('{name} ')\nraise SystemExit(7)\n")
    monkeypatch.chdir(folder)
    return mark
