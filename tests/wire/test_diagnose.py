"""Each cause of an unreachable server gets its own error, found against real servers."""

import contextlib
import datetime
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from fedsea.errors import CredentialsError, FedSEAError, ServerUnavailableError, UsageError
from fedsea.wire import certificates, diagnose
from fedsea.wire.credentials import Credentials, channel_credentials, server_credentials
from fedsea.wire.diagnose import explain_unreachable
from tests.support.certificates import issued
from tests.support.ports import NOWHERE, grpc_serving, listening

EXPIRED = datetime.timedelta(minutes=-1)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnose, "_ANSWER_SECONDS", 0.5)


@pytest.fixture(scope="module")
def client(made: Path) -> Credentials:
    return Credentials.load(made / "client-a", "client")


@pytest.fixture(scope="module")
def other_client(other: Path) -> Credentials:
    return Credentials.load(other / "client-a", "client")


@pytest.fixture
def serve() -> Iterator[Callable[[grpc.ServerCredentials | None], str]]:
    """Start gRPC servers; each call returns the port's address."""
    with contextlib.ExitStack() as servers:
        yield lambda credentials: servers.enter_context(grpc_serving(credentials=credentials))


@pytest.fixture
def answer() -> Iterator[Callable[[Callable[[socket.socket], object]], str]]:
    """Start plain TCP servers that hand each connection to a function."""
    with contextlib.ExitStack() as servers:
        yield lambda handle: servers.enter_context(listening(handle))


def issue(made: Path, **changes: object) -> Credentials:
    """Server credentials of the same authority that `Credentials.load` would refuse."""
    usual = {"role": "server", "lifetime": datetime.timedelta(days=1), "hosts": ("127.0.0.1", "localhost")}
    return issued(made, name="server", **usual | changes)


def check(error: FedSEAError, kind: type[FedSEAError], *words: str) -> None:
    assert type(error) is kind, error
    for word in words:
        assert word in str(error)
    assert "\n" not in str(error)


def test_nothing_listens(client: Credentials) -> None:
    for credentials in (None, client):
        error = explain_unreachable(NOWHERE, credentials)
        check(error, ServerUnavailableError, f"no block server at {NOWHERE}", "`fedsea serve")


def test_the_name_is_unknown() -> None:
    check(explain_unreachable("no-such-host.invalid:7070", None), ServerUnavailableError, "'no-such-host.invalid'")
    check(explain_unreachable("x" * 70 + ".invalid:7070", None), ServerUnavailableError, "no machine is known")


def test_the_address_is_none(client: Credentials) -> None:
    check(explain_unreachable("localhost", client), UsageError, "HOST:PORT")


def test_the_connection_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*arguments: object) -> socket.socket:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    check(
        explain_unreachable("10.0.0.1:7070", None), ServerUnavailableError, "10.0.0.1:7070 does not answer", "firewall"
    )


# What the server shows (of the folder, plaintext, or issued for the case), who comes, and what is said.
SHOWN: dict[str, tuple[Callable[[Path], Credentials | None], str, tuple[str, ...]]] = {
    "nothing": (lambda _made: None, "client", ("runs without TLS", "--credentials DIR")),
    "to no credentials": (lambda made: Credentials.load(made, "server"), "", ("asks for TLS", "--credentials DIR")),
    "another authority": (lambda made: Credentials.load(made, "server"), "other", ("is of another authority", "copy")),
    "an expired one": (lambda made: issue(made, lifetime=EXPIRED), "client", ("certificate of the server", "expired")),
    "an early one": (lambda made: early(made), "client", ("not valid yet", "clock")),
    "another host": (lambda made: issue(made, hosts=("x.org",)), "client", ("'127.0.0.1'", "--host 127.0.0.1")),
    "a client's": (lambda made: issue(made, role="client"), "client", ("not for a server",)),
}


def early(made: Path) -> Credentials:
    """Good from an hour on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates, "CLOCK_SKEW", datetime.timedelta(hours=-1))
        return issue(made)


@pytest.mark.parametrize("case", SHOWN)
def test_a_server_shows_what_its_client_does_not_take(
    serve: Callable[..., str], made: Path, client: Credentials, other_client: Credentials, case: str
) -> None:
    shows, who, words = SHOWN[case]
    shown = shows(made)
    address = serve(server_credentials(shown) if shown is not None else None)
    credentials = {"client": client, "other": other_client, "": None}[who]
    check(explain_unreachable(address, credentials), CredentialsError, *words)
    if case == "another host":
        port = address.rpartition(":")[2]
        check(explain_unreachable(f"localhost:{port}", client), CredentialsError, "'localhost'", "--host localhost")


def test_our_certificate_has_expired(serve: Callable[..., str], made: Path) -> None:
    address = serve(server_credentials(Credentials.load(made, "server")))
    expired = issue(made, role="client", lifetime=EXPIRED, hosts=())
    check(explain_unreachable(address, expired), CredentialsError, "this client's certificate expired")


def test_grpc_server_refuses_our_certificate(
    serve: Callable[..., str], made: Path, client: Credentials, other_client: Credentials
) -> None:
    # The client trusts the server, the server not the client.
    mixed = replace(other_client, authority=client.authority)
    address = serve(server_credentials(Credentials.load(made, "server")))
    with grpc.secure_channel(address, channel_credentials(mixed)) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/test.Test/Any")(b"", timeout=5)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    error = explain_unreachable(address, mixed, caught.value.details())
    check(error, CredentialsError, "on seeing this client's certificate", "another authority")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("case", ["other authority", "expired"])
def test_server_refuses_our_certificate_with_an_alert(
    answer: Callable[..., str],
    made: Path,
    client: Credentials,
    other_client: Credentials,
    version: ssl.TLSVersion,
    case: str,
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(made / "server" / "certificate.pem", made / "server" / "key.pem")
    context.load_verify_locations(made / "server" / "authority.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    shown = other_client if case == "other authority" else issue(made, role="client", lifetime=EXPIRED, hosts=())
    # Expired by the server's clock alone.
    mixed = replace(shown, authority=client.authority, expires=client.expires)
    error = explain_unreachable(answer(lambda one: context.wrap_socket(one, server_side=True).close()), mixed)
    reason = "it is of another authority" if case == "other authority" else "it has expired"
    check(error, CredentialsError, "refuses this client's certificate", reason)


@pytest.mark.parametrize("with_tls", [False, True])
@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "a web server"),
        (b"220 mail.example.org ESMTP\r\n", "another program"),
        (b"", "closes them"),
    ],
)
def test_another_program_listens(
    answer: Callable[..., str], client: Credentials, with_tls: bool, reply: bytes, words: str
) -> None:
    def handle(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(reply)

    check(explain_unreachable(answer(handle), client if with_tls else None), ServerUnavailableError, words)


@pytest.mark.parametrize("with_tls", [False, True])
def test_something_listens_and_stays_silent(answer: Callable[..., str], client: Credentials, with_tls: bool) -> None:
    address = answer(lambda connection: connection.recv(1 << 20) and connection.recv(1))
    error = explain_unreachable(address, client if with_tls else None)
    check(error, ServerUnavailableError, "takes connections but does not answer")


@pytest.mark.parametrize("with_tls", [False, True])
def test_a_server_that_answers_leaves_grpcs_own_words(
    serve: Callable[..., str], made: Path, client: Credentials, with_tls: bool
) -> None:
    address = serve(server_credentials(Credentials.load(made, "server")) if with_tls else None)
    error = explain_unreachable(address, client if with_tls else None, "Socket\nclosed")
    check(error, ServerUnavailableError, f"the block server at {address} answers", "failed: Socket closed")
