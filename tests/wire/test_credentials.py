"""Making and loading the credentials of mutual TLS."""

import datetime
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from typer.testing import CliRunner

from fedsea.cli.credentials import app
from fedsea.errors import CredentialsError, UsageError
from fedsea.wire import certificates
from fedsea.wire.address import format_address, is_loopback, parse_address
from fedsea.wire.credential_files import create_credentials
from fedsea.wire.credentials import Credentials, channel_credentials, server_credentials
from fedsea.wire.roles import COORDINATOR_URI, Role, is_coordinator
from tests.support.certificates import authority_of
from tests.support.ports import grpc_serving

DAY = datetime.timedelta(days=1)
EXPIRED = datetime.timedelta(minutes=-1)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    create_credentials(tmp_path / "made", clients=["alice", "bob"])
    return tmp_path / "made"


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "certificate.pem").read_bytes())


def test_certificates_allow_one_role_each_and_expire(made: Path) -> None:
    authority, server, alice = (certificate(made / name) for name in ("authority", "server", "alice"))
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value.ca
    assert authority.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    for leaf, usage in ((server, ExtendedKeyUsageOID.SERVER_AUTH), (alice, ExtendedKeyUsageOID.CLIENT_AUTH)):
        assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
        assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        now = datetime.datetime.now(datetime.UTC)
        assert leaf.not_valid_before_utc < now - datetime.timedelta(minutes=1)
        assert 364 * DAY < leaf.not_valid_after_utc - now <= 365 * DAY
        leaf.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]


def test_nothing_is_readable_by_others_even_under_an_open_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    real_open = os.open

    def recording_open(path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = real_open(path, flags, mode)
        if flags & os.O_CREAT:
            modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", recording_open)
    old = os.umask(0)
    try:
        create_credentials(tmp_path / "made")
    finally:
        os.umask(old)
    assert set(modes) == {0o600}
    assert len(modes) == 11
    for path in (tmp_path / "made").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_second_run_keeps_everything_and_adds_new_clients(made: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*.pem")}
    summary = create_credentials(made, clients=["alice", "carol"])
    assert summary.names("kept") == ("authority", "server", "coordinator", "alice")
    assert summary.names("created") == ("carol",)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert create_credentials(made).names("kept") == ("authority", "server", "coordinator", "alice", "bob", "carol")


def test_server_is_reissued_for_a_new_host_and_keeps_its_old_ones(made: Path) -> None:
    assert create_credentials(made, hosts=["GPU.example.org"]).names("re-issued") == ("server",)
    summary = create_credentials(made, hosts=["10.0.0.7"])
    assert summary.names("re-issued") == ("server",)
    assert set(summary.hosts) == {"localhost", "127.0.0.1", "::1", "gpu.example.org", "10.0.0.7"}
    assert create_credentials(made, hosts=["gpu.example.org"]).names("re-issued") == ()


@pytest.mark.parametrize("lifetime", [EXPIRED, 29 * DAY])
def test_certificates_near_their_end_are_reissued(tmp_path: Path, lifetime: datetime.timedelta) -> None:
    create_credentials(tmp_path, hosts=["gpu.example.org"], lifetime=lifetime)
    summary = create_credentials(tmp_path)
    assert summary.names("re-issued") == ("server", "coordinator", "client-a")
    assert "gpu.example.org" in summary.hosts
    Credentials.load(tmp_path / "client-a", "client")


def test_damaged_or_foreign_certificates_are_reissued(made: Path, tmp_path: Path) -> None:
    create_credentials(tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "client-a", made / "alice", dirs_exist_ok=True)
    (made / "bob" / "key.pem").unlink()
    assert create_credentials(made).names("re-issued") == ("alice", "bob")
    assert Credentials.load(made / "alice", "client").name == "alice"


def test_an_authority_that_lost_its_key_is_not_replaced(made: Path) -> None:
    (made / "authority" / "key.pem").unlink()
    with pytest.raises(CredentialsError, match=r"authority/key.pem is missing: restore it"):
        create_credentials(made, clients=["carol"])


def test_an_expired_authority_issues_nothing(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match=r"authority expired on .*new folder"):
        create_credentials(tmp_path, authority_lifetime=EXPIRED)


@pytest.mark.parametrize(
    "name", ["authority", "server", "coordinator", "", "Alice", "../x", ".hidden", "a b", "x" * 64]
)
def test_client_names_that_are_no_safe_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="client"):
        create_credentials(tmp_path, clients=[name])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "host:7070", "http://x", "", "a..b", "1.2.3", "fe80::1%eth0"])
def test_hosts_that_nobody_can_connect_to_are_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(UsageError, match="clients"):
        create_credentials(tmp_path, hosts=[host])


def test_load_tells_name_and_expiry_and_hides_the_key(made: Path) -> None:
    alice = Credentials.load(made / "alice", "client")
    assert alice.name == "alice"
    assert alice.expires == certificate(made / "alice").not_valid_after_utc
    assert "PRIVATE" not in repr(alice)
    assert Credentials.load(made, "server") == Credentials.load(made / "server", "server")
    assert Credentials.load(made, "server").name == "server"


def copied(name: str, source: str, target: str = "alice") -> Callable[[Path], object]:
    return lambda made: shutil.copy(made / source / name, made / target / name)


def mode(name: str, bits: int) -> Callable[[Path], object]:
    return lambda made: (made / "alice" / name).chmod(bits)


def damaged(name: str) -> Callable[[Path], object]:
    return lambda made: (made / "alice" / name).write_bytes(b"-----BEGIN NOTHING-----")


# What is done to the folder, whose credentials are loaded, as which role, and what is said.
REFUSED: dict[str, tuple[Callable[[Path], object], str, Role, str]] = {
    "no folder": (str, "nowhere", "server", "there is no folder .*credentials init"),
    "all folders": (str, ".", "client", "give the folder of one client, such as .*/alice"),
    "a client as server": (str, "alice", "server", "not for a server: it is a client's"),
    "a server as client": (str, "server", "client", "not for a client: it is a server's"),
    "a coordinator as client": (str, "coordinator", "client", "not for a client: it is a coordinator's"),
    "a client as coordinator": (str, "alice", "coordinator", "not for a coordinator: it is a client's"),
    "no authority": (
        lambda made: (made / "alice" / "authority.pem").unlink(),
        "alice",
        "client",
        "authority.pem is missing: run `fedsea credentials init",
    ),
    "another's key": (copied("key.pem", "bob"), "alice", "client", "key.pem does not belong to certificate.pem"),
    "another authority": (
        lambda made: create_credentials(made / "other") and copied("authority.pem", "other/server")(made),
        "alice",
        "client",
        "was not issued by authority",
    ),
    "an open key": (mode("key.pem", 0o640), "alice", "client", "run `chmod 600 .*/alice/key.pem`"),
    **{
        f"a changeable {name}": (mode(name, 0o646), "alice", "client", f"run `chmod go-w .*/alice/{name}`")
        for name in ("authority.pem", "certificate.pem")
    },
    **{
        f"a damaged {name}": (damaged(name), "alice", "client", f"{name} is not a readable")
        for name in ("authority.pem", "certificate.pem", "key.pem")
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_load_refuses_what_cannot_be_used_and_says_what_to_do(made: Path, case: str) -> None:
    change, folder, role, says = REFUSED[case]
    change(made)
    with pytest.raises(CredentialsError, match=says):
        Credentials.load(made / folder, role)


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"\xef\xbb\xbf", b""), (b"Bag Attributes\n  friendlyName: \xe9\n", b"\n# end\n"), (b"", b"\r\n\r\n")],
)
def test_what_stands_around_the_pem_changes_nothing(made: Path, before: bytes, after: bytes) -> None:
    plain = Credentials.load(made / "alice", "client")
    for path in (made / "alice").iterdir():
        path.write_bytes(before + path.read_bytes() + after)
    assert Credentials.load(made / "alice", "client") == plain
    authority = made / "authority" / "certificate.pem"
    authority.write_bytes(before + authority.read_bytes() + after)
    assert create_credentials(made, clients=["dora"]).names("created") == ("dora",)
    assert Credentials.load(made / "dora", "client").authority == plain.authority


def test_a_command_in_an_error_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "it's mine"
    create_credentials(folder)
    (folder / "client-a" / "key.pem").chmod(0o644)
    with pytest.raises(CredentialsError, match="chmod") as raised:
        Credentials.load(folder / "client-a", "client")
    command = str(raised.value).partition("`")[2].rpartition("`")[0]
    subprocess.run(command, shell=True, check=True)
    assert Credentials.load(folder / "client-a", "client").name == "client-a"


def test_load_refuses_expired_and_not_yet_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_credentials(tmp_path / "old", lifetime=EXPIRED)
    with pytest.raises(CredentialsError, match=r"expired on .*credentials init"):
        Credentials.load(tmp_path / "old" / "client-a", "client")
    monkeypatch.setattr("fedsea.wire.certificates.CLOCK_SKEW", -DAY)
    create_credentials(tmp_path / "new")
    with pytest.raises(CredentialsError, match=r"not valid before .*clock"):
        Credentials.load(tmp_path / "new" / "client-a", "client")


@pytest.fixture
def echo(made: Path) -> Iterator[str]:
    """Address of a server that answers with its caller's name, and `!` if that is the coordinator."""

    def name(request: bytes, context: grpc.ServicerContext) -> bytes:
        peer = context.auth_context()
        return peer["x509_common_name"][0] + (b"!" if is_coordinator(peer) else b"")

    handlers = {"Name": grpc.unary_unary_rpc_method_handler(name)}
    shown = server_credentials(Credentials.load(made, "server"))
    with grpc_serving(grpc.method_handlers_generic_handler("test.Test", handlers), credentials=shown) as address:
        yield address


def name_at(address: str, credentials: grpc.ChannelCredentials) -> bytes:
    with grpc.secure_channel(address, credentials) as channel:
        return channel.unary_unary("/test.Test/Name")(b"", timeout=5)


def test_grpc_server_sees_the_clients_name_and_refuses_strangers(made: Path, tmp_path: Path, echo: str) -> None:
    create_credentials(tmp_path / "other")
    anyone = grpc.ssl_channel_credentials((made / "alice" / "authority.pem").read_bytes())
    stranger = channel_credentials(Credentials.load(tmp_path / "other" / "client-a", "client"))
    assert name_at(echo, channel_credentials(Credentials.load(made / "alice", "client"))) == b"alice"
    for refused in (anyone, stranger):
        with pytest.raises(grpc.RpcError) as caught:
            name_at(echo, refused)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_grpc_server_knows_the_coordinator_by_its_certificate(made: Path, echo: str) -> None:
    coordinator = Credentials.load(made, "coordinator")
    assert coordinator == Credentials.load(made / "coordinator", "coordinator")
    assert name_at(echo, channel_credentials(coordinator)) == b"coordinator!"


@pytest.mark.parametrize("name", ["coordinator", COORDINATOR_URI])
def test_no_name_makes_a_client_a_coordinator(made: Path, echo: str, name: str) -> None:
    # Issued past the check of names, with the role's URI as a name and as a host, too.
    authority = authority_of(made)
    pair, _ = certificates.issue(authority, name, "client", DAY, [name])
    credentials = grpc.ssl_channel_credentials(authority.certificate, pair.key, pair.certificate)
    assert name_at(echo, credentials) == name.encode()
    with pytest.raises(CredentialsError, match="not for a coordinator: it is a client's"):
        certificates.check(authority.certificate, pair, "coordinator", "here", "renew")


def test_a_client_of_the_coordinators_name_gives_way_to_the_coordinator(made: Path) -> None:
    shutil.copytree(made / "alice", made / "coordinator", dirs_exist_ok=True)
    assert create_credentials(made).names("re-issued") == ("coordinator",)
    assert Credentials.load(made, "coordinator").name == "coordinator"


def test_use_without_tls_does_not_import_cryptography() -> None:
    code = "import sys, fedsea.wire.credentials, fedsea.wire.diagnose; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_command_prints_what_to_do_next(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["init", str(tmp_path / "c"), "--host", "gpu.example.org", "--client", "clinic"])
    assert result.exit_code == 0, result.output
    assert f"fedsea serve MODEL --credentials {tmp_path / 'c'}" in result.output
    assert f"{tmp_path / 'c' / 'clinic'}\n" in result.output
    assert f"Never copy {tmp_path / 'c' / 'authority'}" in result.output
    again = CliRunner().invoke(app, ["init", str(tmp_path / "c"), "--json"])
    summary = json.loads(again.output)
    assert [(entry["name"], entry["outcome"]) for entry in summary["entries"]] == [
        (name, "kept") for name in ("authority", "server", "coordinator", "clinic")
    ]
    assert isinstance(CliRunner().invoke(app, ["init", str(tmp_path), "--client", "server"]).exception, UsageError)


@pytest.mark.parametrize(
    ("text", "parts"),
    [("localhost:7070", ("localhost", 7070)), ("[::1]:1", ("::1", 1)), ("10.0.0.1:65535", ("10.0.0.1", 65535))],
)
def test_addresses_read_and_write_the_same(text: str, parts: tuple[str, int]) -> None:
    assert parse_address(text) == parts
    assert format_address(*parts) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "host", ":80", "host:", "host:x", "host:0", "host:65536", "host:-1", "::1:80", "[::1]", "[x]:80"),
        *("http://host:80", "https://host", "dns:///host:80", "host/x:80", "a b:80"),
        *("host:٣", "host:00708012345", "host:" + "9" * 5000),
    ],
)
def test_bad_addresses_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no address") as raised:
        parse_address(text)
    assert ("without a scheme" in str(raised.value)) == ("/" in text or " " in text)
    assert parse_address("127.0.0.1:0", allow_port_zero=True) == ("127.0.0.1", 0)  # to listen


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *((host, True) for host in ("localhost", "LOCALHOST.", "127.3.2.1", "::1", "::ffff:127.0.0.1")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.example.org", "")),
    ],
)
def test_loopback_is_this_machine_only(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
