"""A block server under mutual TLS: who may come in, whose sessions are whose, and one clear line for all others."""

import datetime
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedsea import SplitModelForCausalLM
from fedsea.errors import CredentialsError, UsageError
from fedsea.wire import certificates, diagnose
from fedsea.wire.credential_files import create_credentials
from fedsea.wire.credentials import Credentials
from tests.conftest import RunningServer, StartServer, connect
from tests.support.raw_stream import RawStream, assert_same_tokens, step


@pytest.fixture(scope="module")
def secure_server(start_server: StartServer, made: Path) -> RunningServer:
    return start_server(credentials=Credentials.load(made, "server"))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnose, "_ANSWER_SECONDS", 0.5)


def refusal(server: RunningServer, **how: Any) -> str:
    with pytest.raises(CredentialsError) as raised:
        SplitModelForCausalLM.from_pretrained("random:tiny", server=server.address, **how)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_client_with_its_certificate_gets_the_whole_models_tokens(
    secure_server: RunningServer, made: Path, whole_tiny: Any
) -> None:
    with connect(secure_server, credentials=made / "client-a") as model:
        assert_same_tokens(model, whole_tiny, lambda: None)


def test_a_session_is_not_resumed_by_another_clients_certificate(secure_server: RunningServer, made: Path) -> None:
    a, b = (Credentials.load(made / name, "client") for name in ("client-a", "client-b"))
    with RawStream(secure_server.address, a) as owner:
        name = owner.open().session
        owner.send(step(1))
        owner.receive()
        with RawStream(secure_server.address, b) as thief:
            opened = thief.open(resume=name)
            assert opened.session != name
            assert opened.step == 0
        owner.send(step(2, 3))
        owner.receive()  # the owner's connection has not been taken from it


def test_an_expired_certificate(
    secure_server: RunningServer, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority_of = tmp_path / "copy"
    shutil.copytree(made, authority_of)
    create_credentials(authority_of, clients=["late"], lifetime=datetime.timedelta(minutes=-1))
    assert "expired" in refusal(secure_server, credentials=authority_of / "late")
    monkeypatch.setattr(certificates, "check", lambda *_args: ("late", datetime.datetime.now(datetime.UTC)))
    assert "expired" in refusal(secure_server, credentials=authority_of / "late")  # by the server's clock


def test_a_certificate_of_another_authority(secure_server: RunningServer, other: Path) -> None:
    assert "of another authority" in refusal(secure_server, credentials=other / "client-a")


def test_an_insecure_client_of_a_server_with_tls(secure_server: RunningServer) -> None:
    assert "asks for TLS" in refusal(secure_server, insecure=True)


def test_a_client_with_credentials_of_an_insecure_server(tiny_server: RunningServer, made: Path) -> None:
    assert "runs without TLS" in refusal(tiny_server, credentials=made / "client-a")


def test_plaintext_stays_on_this_machine(start_server: StartServer) -> None:
    with pytest.raises(UsageError, match="listens on loopback addresses only"):
        start_server(listen="0.0.0.0:0")
    with pytest.raises(UsageError, match="insecure connections stay on this machine"):
        SplitModelForCausalLM.from_pretrained("random:tiny", server="192.0.2.1:7070", insecure=True)


def test_a_port_that_is_taken(start_server: StartServer, tiny_server: RunningServer) -> None:
    with pytest.raises(UsageError, match="the address is taken or not this machine's"):
        start_server(listen=tiny_server.address)
