"""Mutual TLS between a block server and its clients: making the credentials, reading them, giving them to gRPC.

One folder holds them all. `authority/` signs, and never leaves the machine that made it; `server/`, `coordinator/` and
one folder for each client hold `authority.pem`, `certificate.pem` and `key.pem`, and are what each is started with.
"""

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import grpc

from fedsea.errors import CredentialsError, UsageError
from fedsea.wire.address import is_loopback, parse_address
from fedsea.wire.roles import COORDINATOR

if TYPE_CHECKING:  # needs `cryptography`, which connecting without TLS does not
    from fedsea.wire.certificates import Role
    from fedsea.wire.credential_files import CredentialsEntry, Outcome

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")

_AUTHORITY, _SERVER = "authority", "server"
_TAKEN = (_AUTHORITY, _SERVER, COORDINATOR)
_CLIENT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True)
class CredentialsSummary:
    """What `create_credentials` did.

    Attributes
    ----------
    directory
        The folder that holds everything.
    hosts
        Names and addresses that the server's certificate is good for.
    entries
        The authority, the server, the coordinator, then each client.
    """

    directory: Path
    hosts: tuple[str, ...]
    entries: "tuple[CredentialsEntry, ...]"

    def names(self, outcome: "Outcome") -> tuple[str, ...]:
        """Names of the entries with this outcome."""
        return tuple(entry.name for entry in self.entries if entry.outcome == outcome)


@dataclass(frozen=True)
class Credentials:
    """One side's credentials, checked when they were loaded.

    Attributes
    ----------
    authority, certificate, key
        PEM. The key never shows in a `repr`.
    name
        The certificate's common name: a client's name, `server` or `coordinator`.
    expires
        When they stop being valid (UTC).
    """

    authority: bytes
    certificate: bytes
    key: bytes = field(repr=False)
    name: str
    expires: datetime.datetime

    def ends_soon(self) -> str | None:
        """A warning in one line if they end within 30 days (`credential_files.RENEW_BEFORE`); else None."""
        from fedsea.wire.credential_files import RENEW_BEFORE

        left = self.expires - datetime.datetime.now(datetime.UTC)
        if left > RENEW_BEFORE:
            return None
        return (
            f"the certificate of {self.name} ends on {self.expires:%Y-%m-%d}, in {max(0, left.days)} days: run "
            "`fedsea credentials init DIR` where the authority is, and start with the new files"
        )

    @classmethod
    def load(cls, directory: str | Path, role: "Role") -> "Credentials":
        """Read and check the credentials of one side.

        Parameters
        ----------
        directory
            The folder with `authority.pem`, `certificate.pem` and `key.pem`. For a server and a coordinator also the
            folder above it.
        role
            Which side will use them; the certificate must be for this side.

        Raises
        ------
        CredentialsError
            If a file is missing, unreadable or open to other users of the machine, or if the certificate is not for
            this role, not of this authority, not this key's, expired or not valid yet.
        """
        from fedsea.wire import certificates, credential_files

        folder = Path(directory).expanduser()
        if role == "server":
            top = folder.parent if folder.name == _SERVER else folder
            renew = f"run `fedsea credentials init {quote(str(top))}`"
            if (folder / _SERVER).is_dir():
                folder = folder / _SERVER
        else:
            renew = f"run `fedsea credentials init DIR` where the authority is, and copy the {role}'s folder here"
            if role == COORDINATOR and (folder / COORDINATOR).is_dir():
                folder = folder / COORDINATOR
        if not folder.is_dir():
            raise CredentialsError(f"there is no folder {folder}: {renew}")
        if role == "client" and (folder / _AUTHORITY).is_dir():
            clients = [f"{folder / name}" for name in _existing_clients(folder)]
            raise CredentialsError(
                f"{folder} holds credentials of several parties: give the folder of one client, "
                f"such as {next(iter(clients), folder / 'client-a')}"
            )
        authority, pair = credential_files.read_party(folder, renew)
        name, expires = certificates.check(authority, pair, role, str(folder), renew)
        return cls(authority, pair.certificate, pair.key, name, expires)


def open_channel(
    address: str, credentials: Credentials | None, options: Sequence[tuple[str, int]] = ()
) -> grpc.Channel:
    """A gRPC channel to a block server: the only place that makes one. It connects when it is used.

    A proxy that the environment names (`https_proxy` and so on) is used for TLS to another machine alone: to this
    machine it would be a way round, and to plaintext a way out.

    Parameters
    ----------
    address
        `HOST:PORT`.
    credentials
        The client's; None for plaintext.
    options
        gRPC's, beside those that FedSEA needs.
    """
    if credentials is None or is_loopback(parse_address(address)[0]):
        options = [*options, ("grpc.enable_http_proxy", 0)]
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, channel_credentials(credentials), options)


def channel_credentials(credentials: Credentials) -> grpc.ChannelCredentials:
    """gRPC's form of a client's credentials: it trusts this authority alone, and shows its own certificate."""
    return grpc.ssl_channel_credentials(credentials.authority, credentials.key, credentials.certificate)


def server_credentials(credentials: Credentials) -> grpc.ServerCredentials:
    """gRPC's form of a server's credentials: a client without a certificate of this authority is refused."""
    return grpc.ssl_server_credentials(
        [(credentials.key, credentials.certificate)],
        root_certificates=credentials.authority,
        require_client_auth=True,
    )


def create_credentials(
    directory: str | Path,
    *,
    hosts: Sequence[str] = (),
    clients: Sequence[str] | None = None,
    authority_lifetime: datetime.timedelta = datetime.timedelta(days=3650),
    lifetime: datetime.timedelta = datetime.timedelta(days=365),
) -> CredentialsSummary:
    """Create what mutual TLS needs, or complete and renew what is there.

    What exists and is good for 30 more days is kept. A certificate that is damaged, of another authority
    or near its end is issued again, and so is the server's when it lacks a host; hosts that it had stay. Certificates
    of an authority remain valid until they expire: taking a client away is a matter of the server's own list, or of a
    new authority.

    Parameters
    ----------
    directory
        The folder to create or complete.
    hosts
        Names and IP addresses under which clients reach the server. `LOCAL_HOSTS` are always added.
    clients
        Names of the clients that need credentials. None stands for those that exist, or `client-a` if none does.
    authority_lifetime, lifetime
        How long a new authority, and a new certificate, are valid.

    Raises
    ------
    UsageError
        If a host or a client's name cannot be used.
    CredentialsError
        If the authority is incomplete or expired, or the folder cannot be written.
    """
    from fedsea.wire import certificates, credential_files

    directory = Path(directory).expanduser()
    server_hosts = dict.fromkeys((*LOCAL_HOSTS, *(certificates.normalise_host(host) for host in hosts)))
    for client in clients or ():
        _check_client_name(client)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = (_existing_clients(directory) or ["client-a"]) if clients is None else list(dict.fromkeys(clients))
        authority, entry = credential_files.complete_authority(directory / _AUTHORITY, authority_lifetime)
        server = directory / _SERVER
        server_hosts.update(dict.fromkeys(credential_files.present_hosts(server)))
        complete = partial(credential_files.complete_party, authority=authority, lifetime=lifetime)
        entries = [entry, complete(server, _SERVER, role="server", hosts=tuple(server_hosts))]
        entries.append(complete(directory / COORDINATOR, COORDINATOR, role="coordinator"))
        entries.extend(complete(directory / name, name, role="client") for name in names)
    except OSError as error:
        raise CredentialsError(f"cannot write {error.filename or directory}: {error.strerror}") from error
    return CredentialsSummary(directory, tuple(server_hosts), tuple(entries))


def _check_client_name(name: str) -> None:
    if not _CLIENT_NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no client name: use 1 to 63 small letters, digits, dots, dashes and underscores, "
            "a letter or digit first"
        )
    if name in _TAKEN:
        raise UsageError(f"a client cannot be called {name!r}: the folder of that name is taken")


def _existing_clients(directory: Path) -> list[str]:
    return sorted(
        path.parent.name
        for path in directory.glob("*/certificate.pem")
        if path.parent.name not in _TAKEN and _CLIENT_NAME.fullmatch(path.parent.name)
    )
