"""What stands before Flower's interfaces: who is asked for how much, and which processes of a machine are answered."""

import base64
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse
from flwr.supercore.constant import TaskType
from flwr.supercore.date import now
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supernode.nodestate import NodeStateFactory

from fedsea.federation.flower import gate, patches
from tests.support.federation_commands import until

LONG = 1 << 20
SETTINGS = {"log_level": "error", "ws": "none", "proxy_headers": False, "lifespan": "off"}


@contextlib.contextmanager
def served(app: Any, **how: Any) -> Iterator[int]:
    """An app behind a port of this machine, in a thread."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(app, **(SETTINGS | how)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


@pytest.fixture(scope="module")
def flower_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("flower")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(home))
        patch.setenv("FLWR_TELEMETRY_ENABLED", "0")
        yield home


def request(path: str, headers: dict[str, Any]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/protobuf"]
    return "\r\n".join((*lines, *(f"{name}: {value}" for name, value in headers.items()), "", "")).encode()


def everything(connection: socket.socket) -> bytes:
    """What comes until the connection ends."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(4096):
            answer += part
    return answer


class Link:
    """Flower's SuperLink behind the gate, and a data owner whose key it knows."""

    def __init__(self, port: int, key: ec.EllipticCurvePrivateKey) -> None:
        self.port, self._key = port, key

    def signed(self, key: ec.EllipticCurvePrivateKey | None = None) -> dict[str, str]:
        """Headers with the data owner's key, signed with it or with another."""
        stamp = now().isoformat()
        signature = sign_message(key or self._key, stamp.encode())
        return {
            "flwr-public-key": base64.b64encode(public_key_to_bytes(self._key.public_key())).decode(),
            "flwr-signature": base64.b64encode(signature).decode(),
            "flwr-timestamp": stamp,
        }

    def connect(self, connection: socket.socket | None = None) -> socket.socket:
        connection = connection or socket.socket()
        connection.settimeout(60)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def post(self, path: str, headers: dict[str, Any], body: bytes = b"", by: socket.socket | None = None) -> int:
        """The status that comes after these headers and as much of a body as is taken."""
        with self.connect(by) as connection:
            connection.sendall(request(path, headers))
            with contextlib.suppress(OSError):  # it may be closed by then
                connection.sendall(body)
            return int(connection.recv(64).split()[1])


@pytest.fixture(scope="module")
def link(flower_home: Path) -> Iterator[Link]:
    from flwr.superlink.main import create_app

    app = create_app()
    app.state.enable_supernode_auth = True
    app.add_middleware(gate.Gate)
    key = ec.generate_private_key(ec.SECP384R1())
    state = app.state.linkstate_factory.state()
    state.create_node("", "", public_key_to_bytes(key.public_key()), 10.0, name="ward-a")
    with served(app, http=gate.patient_protocol()) as port:
        yield Link(port, key)


PULL, REGISTER = "/v1/fleet/pull-messages", "/v1/fleet/register-node"


def length(size: int) -> dict[str, str]:
    return {"Content-Length": str(size)}


@pytest.mark.parametrize("size", [LONG, 10 << 40])
@pytest.mark.parametrize("path", [PULL, REGISTER, "/v1/fleet/push-object", "/v1/fleet/nothing"])
def test_who_has_not_signed_is_not_listened_to_for_long(link: Link, path: str, size: int) -> None:
    """Nothing of the body is waited for: none is sent here."""
    assert link.post(path, length(size)) == 413


STRANGER = ec.generate_private_key(ec.SECP384R1())


@pytest.mark.parametrize(
    "changed",
    [
        lambda link: link.signed(STRANGER),
        lambda link: Link(link.port, STRANGER).signed(),
        lambda link: link.signed() | {"flwr-signature": ""},
        lambda link: link.signed() | {"flwr-public-key": "%%%"},
        lambda link: link.signed() | {"flwr-public-key": link.signed()["flwr-public-key"][:30]},
    ],
    ids=["another's signature", "another's key", "no signature", "no base64", "half a header"],
)
def test_a_signature_is_looked_at_before_the_body(link: Link, changed: Callable[[Link], dict[str, str]]) -> None:
    headers = changed(link)
    assert link.post(PULL, headers | length(LONG)) == 413
    assert link.post(PULL, headers | length(3), b"abc") != 413


def test_a_registered_data_owner_sends_what_it_needs_and_no_more(link: Link) -> None:
    assert link.post(PULL, link.signed() | length(LONG), bytes(LONG)) not in (413, 408)
    assert link.post(PULL, link.signed() | length(gate.KNOWN_BYTES + 1)) == 413


def test_a_body_of_no_stated_length_is_counted(link: Link) -> None:
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    for headers, count in (({}, 2), (link.signed(), gate.KNOWN_BYTES // 0x10000 + 1)):
        assert link.post(PULL, headers | {"Transfer-Encoding": "chunked"}, chunk * count) == 413


def test_who_sends_too_much_sees_the_answer_and_is_cut_off(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "LINGER_SECONDS", 0.2)
    with link.connect() as connection:
        connection.sendall(b"POST " + PULL.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert b" 413 " in everything(connection)


def test_a_slow_sender_is_not_waited_for(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "UNKNOWN_SECONDS", 0.2)
    assert link.post(REGISTER, length(1000), b"abc") == 408
    # Nor one that sends no request, or half of one: the connection ends, whenever that is.
    monkeypatch.setattr(gate, "SILENT_SECONDS", 0.3)
    for sent in (b"", b"POST /v1/fl", b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n"):
        with link.connect() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(sent)
            assert connection.recv(64) == b""


def strange_socket(monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """A socket that is another user's: of one that root makes, or of oneself if the servers were somebody else's."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            return socket.socket()
        finally:
            os.seteuid(0)
    mine = os.geteuid()
    monkeypatch.setattr(gate.os, "geteuid", lambda: mine + 1)
    return socket.socket()


needs_tables = pytest.mark.skipif(not gate.TABLES[0].exists(), reason="this system does not list sockets")
CONTROL = "/v1/control/list-nodes"


@needs_tables
@pytest.mark.parametrize("more", [{}, {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1"}])
def test_another_user_of_the_coordinators_machine_gives_no_orders(
    link: Link, monkeypatch: pytest.MonkeyPatch, more: dict[str, str]
) -> None:
    assert link.post(CONTROL, length(0) | more) != 403
    for path in (CONTROL, "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs"):
        assert link.post(path, length(0) | more, by=strange_socket(monkeypatch)) == 403
    # It may be a data owner all the same.
    assert link.post(PULL, length(3), b"abc", by=strange_socket(monkeypatch)) not in (403, 413)


@needs_tables
def test_another_user_of_a_data_owners_machine_gets_no_task(flower_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supernode.main import create_app

    factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    assert factory.state().create_task(task_type=TaskType.CLIENT_APP, run_id=7, fab_hash="0" * 64)
    app = patches.guarded(create_app(state_factory=factory, superexec_auth_secret=None))
    body = AcquireTaskRequest(supported_task_types=["flwr-clientapp"]).SerializeToString()
    flower = {"flwr-package-name": "flwr", "flwr-package-version": "1.41.0", "flwr-component-name": "x"}
    message = request("/v1/runtime/acquire-task", flower | length(len(body)) | {"Connection": "close"}) + body

    def ask(by: socket.socket, port: int) -> tuple[int, bytes]:
        with Link(port, STRANGER).connect(by) as connection:
            connection.sendall(message)
            head, _, answer = everything(connection).partition(b"\r\n\r\n")
            return int(head.split()[1]), answer

    with served(app) as port:
        assert ask(strange_socket(monkeypatch), port)[0] == 403
        monkeypatch.undo()
        status, answer = ask(socket.socket(), port)
        assert status == 200
        assert AcquireTaskResponse.FromString(answer).token


@needs_tables
@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_socket_that_nobody_holds_any_longer_is_nobodys(family: socket.AddressFamily, host: str) -> None:
    """The kernel lists it as root's; else a stranger would send an order and close."""
    with socket.socket(family) as listener:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        listener.listen()
        client = socket.socket(family)
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            scope = {"client": accepted.getpeername()[:2], "server": accepted.getsockname()[:2]}
            assert gate.of_own_process(scope)
            mine = os.geteuid()
            if mine:
                assert not gate.of_own_process(scope, mine + 1)
            client.sendall(b"order")
            client.close()
            until(lambda: not gate.of_own_process(scope), 30)
            assert not gate.of_own_process({**scope, "client": None})
            assert not gate.of_own_process({**scope, "client": ("unix", 0)})
