"""A proxy that the environment names: never between processes of one machine, never for plaintext."""

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from fedsea.errors import CredentialsError, ServerUnavailableError
from fedsea.federation.coordinator.control import Control
from fedsea.process import child_environment
from fedsea.wire.credentials import Credentials, open_channel
from fedsea.wire.diagnose import explain_unreachable
from tests.conftest import StartServer, connect
from tests.support.ports import NOWHERE, listening

VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """A proxy in the environment, that refuses everything; what it is asked."""
    questions: list[bytes] = []

    def refuse(connection: socket.socket) -> None:
        questions.append(connection.recv(4096))
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    with listening(refuse) as address:
        for name in VARIABLES:
            monkeypatch.setenv(name, f"http://{address}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "intranet.example.org")
        yield questions


@pytest.mark.parametrize("secure", [False, True])
def test_no_proxy_stands_between_a_client_and_a_server_on_its_machine(
    start_server: StartServer, made: Path, asked: list[bytes], secure: bool
) -> None:
    server = start_server(credentials=Credentials.load(made, "server") if secure else None)
    with connect(server, **({"credentials": made / "client-a"} if secure else {}), reconnect_seconds=0.0) as model:
        model(torch.tensor([[1, 2, 3]]))
    server.stop()
    assert asked == []


def test_tls_to_another_machine_goes_through_the_proxy_and_its_failure_names_it(
    made: Path, asked: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Credentials.load(made / "client-a", "client")
    with open_channel("192.0.2.1:7070", client) as channel, pytest.raises(Exception, match=r"(?i)proxy"):
        channel.unary_unary("/test.Test/Any")(b"", timeout=30)
    assert asked[0].startswith(b"CONNECT 192.0.2.1:7070 ")

    def refused(*arguments: object) -> socket.socket:
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refused)
    assert "through the proxy that grpc_proxy names" in str(explain_unreachable("192.0.2.1:7070", client))
    assert "proxy" not in str(explain_unreachable(NOWHERE, client))


def test_no_proxy_stands_between_the_processes_of_a_federation(made: Path, asked: list[bytes]) -> None:
    with closing(Control(NOWHERE, made / "server" / "authority.pem")) as link, pytest.raises(ServerUnavailableError):
        link.nodes()
    assert asked == []
    spared = child_environment()["no_proxy"].split(",")
    assert {"localhost", "127.0.0.1", "::1", "intranet.example.org"} <= set(spared)


def test_diagnosis_leaves_no_key_on_the_disk(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    monkeypatch.setattr("fedsea.wire.diagnose._ANSWER_SECONDS", 0.1)
    with listening(lambda connection: connection.recv(1 << 20) and connection.recv(1)) as address:
        error = explain_unreachable(address, Credentials.load(made / "client-a", "client"))
    assert "takes connections but does not answer" in str(error)
    assert not isinstance(error, CredentialsError)
