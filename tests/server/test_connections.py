"""Connections to a block server before anything is asked over them, and what its log says of those that it refuses."""

import datetime
import logging
import resource
import socket
from pathlib import Path

import pytest
from cryptography import x509

from fedsea.errors import CredentialsError
from fedsea.wire import certificates
from fedsea.wire.address import parse_address
from fedsea.wire.credential_files import create_credentials
from fedsea.wire.credentials import Credentials
from tests.conftest import RunningServer, StartServer, connect
from tests.support.certificates import issued
from tests.support.raw_stream import RawStream


@pytest.fixture(scope="module")
def server(start_server: StartServer, made: Path) -> RunningServer:
    return start_server(credentials=Credentials.load(made, "server"))


def test_a_connection_that_says_nothing_is_closed(
    start_server: StartServer, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsea.server.service.HANDSHAKE_MS", 300)
    server = start_server(credentials=Credentials.load(made, "server"))
    with socket.create_connection(parse_address(server.address), timeout=60) as silent:
        assert silent.recv(1) == b""
    server.stop()


def test_a_server_takes_as_many_connections_as_the_system_lets_it(start_server: StartServer) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096 if hard == resource.RLIM_INFINITY else hard - 1, hard))
    try:
        start_server().stop()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_both_sides_are_warned_of_a_certificate_that_ends_soon(
    start_server: StartServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = create_credentials(tmp_path, lifetime=datetime.timedelta(days=5)).directory
    with caplog.at_level(logging.WARNING, "fedsea"):
        server = start_server(credentials=Credentials.load(made, "server"))
    assert "the certificate of server ends on" in caplog.text
    told: list[str] = []
    connect(server, credentials=made / "client-a", notice=told.append).close()
    told = [line for line in told if "certificate" in line]
    assert len(told) == 1
    assert told[0].startswith("the certificate of client-a ends on ")
    assert "in 4 days: run `fedsea credentials init DIR`" in told[0]
    server.stop()


def test_a_certificate_without_a_name_is_refused_and_the_log_says_where_it_came_from(
    server: RunningServer, made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ward = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "ward")])
    monkeypatch.setattr(certificates, "_name", lambda _name: ward)
    nameless = issued(made, name="", role="client", lifetime=datetime.timedelta(days=1))
    caplog.set_level(logging.WARNING, "fedsea")
    with RawStream(server.address, nameless) as stream, pytest.raises(CredentialsError, match="has no name"):
        stream.open()
    assert "peer=127.0.0.1:" in caplog.text
    assert "error=credentials" in caplog.text
