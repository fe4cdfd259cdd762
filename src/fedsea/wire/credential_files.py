"""The folder of credentials: made, and completed where something is missing or old; files whole and private.

`authority/` signs, and never leaves the machine that made it; `server/`, `coordinator/` and one folder for each client
hold `authority.pem`, `certificate.pem` and `key.pem`, and are what each is started with.
"""

import datetime
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Literal

from fedsea.errors import CredentialsError, UsageError
from fedsea.files import write_file
from fedsea.wire import certificates
from fedsea.wire.certificates import Pair
from fedsea.wire.credentials import RENEW_BEFORE, Credentials
from fedsea.wire.roles import COORDINATOR, Role

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")

_AUTHORITY, _SERVER = "authority", "server"
_TAKEN = (_AUTHORITY, _SERVER, COORDINATOR)
_FILES = ("authority.pem", "certificate.pem", "key.pem")
_CLIENT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)

Outcome = Literal["created", "kept", "re-issued"]


@dataclass(frozen=True)
class CredentialsEntry:
    """What became of one certificate: the authority's, the server's, or a client's."""

    name: str
    folder: Path
    outcome: Outcome
    expires: datetime.datetime


@dataclass(frozen=True)
class CredentialsSummary:
    """What `create_credentials` did."""

    directory: Path  # that holds everything
    hosts: tuple[str, ...]  # names and addresses that the server's certificate is good for
    entries: tuple[CredentialsEntry, ...]  # the authority, the server, the coordinator, then each client

    def names(self, outcome: Outcome) -> tuple[str, ...]:
        """Names of the entries with this outcome."""
        return tuple(entry.name for entry in self.entries if entry.outcome == outcome)


def create_credentials(
    directory: str | Path,
    *,
    hosts: Sequence[str] = (),
    clients: Sequence[str] | None = None,
    authority_lifetime: datetime.timedelta = datetime.timedelta(days=3650),
    lifetime: datetime.timedelta = datetime.timedelta(days=365),
) -> CredentialsSummary:
    """Create what mutual TLS needs, or complete and renew what is there.

    What exists and is good for 30 more days is kept. A certificate that is damaged, of another authority or near its
    end is issued again, and so is the server's when it lacks a host; hosts that it had stay. Certificates of an
    authority remain valid until they expire: to shut a client out takes a new authority.

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
    directory = Path(directory).expanduser()
    server_hosts = dict.fromkeys((*LOCAL_HOSTS, *(certificates.normalise_host(host) for host in hosts)))
    for client in clients or ():
        _check_client_name(client)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = (_existing_clients(directory) or ["client-a"]) if clients is None else list(dict.fromkeys(clients))
        authority, entry = _complete_authority(directory / _AUTHORITY, authority_lifetime)
        server_hosts.update(dict.fromkeys(_present_hosts(directory / _SERVER)))
        complete = partial(_complete_party, directory, authority, lifetime)
        entries = [entry, complete(_SERVER, "server", tuple(server_hosts)), complete(COORDINATOR, "coordinator")]
        entries.extend(complete(name, "client") for name in names)
    except OSError as error:
        raise CredentialsError(f"cannot write {error.filename or directory}: {error.strerror}") from error
    return CredentialsSummary(directory, tuple(server_hosts), tuple(entries))


def load(folder: Path, role: Role) -> Credentials:
    """What `Credentials.load` does."""
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
    authority, pair = _read_party(folder, renew)
    name, expires = certificates.check(authority, pair, role, str(folder), renew)
    return Credentials(authority, pair.certificate, pair.key, name, expires)


def _complete_authority(folder: Path, lifetime: datetime.timedelta) -> tuple[Pair, CredentialsEntry]:
    """Read the authority in `folder`, or create it if the folder holds none.

    Raises CredentialsError if only one of its files is there: a new authority would shut out all who hold credentials.
    """
    _make_private(folder)
    paths = folder / "certificate.pem", folder / "key.pem"
    present = [path for path in paths if path.exists()]
    if len(present) == 1:
        missing = next(path for path in paths if path not in present)
        raise CredentialsError(
            f"{missing} is missing: restore it, or create credentials in a new folder and hand them all out again"
        )
    outcome: Outcome = "kept" if present else "created"
    if not present:
        pair = certificates.create_authority(lifetime)
        write_file(folder / "key.pem", pair.key)
        write_file(folder / "certificate.pem", pair.certificate)
    pair = Pair(*(_only_pem(path.read_bytes()) for path in paths))
    return pair, CredentialsEntry("authority", folder, outcome, certificates.expiry(pair.certificate))


def _complete_party(
    directory: Path, authority: Pair, lifetime: datetime.timedelta, name: str, role: Role, hosts: Sequence[str] = ()
) -> CredentialsEntry:
    """Keep the credentials in the folder `name` if they are good for `hosts` and for a while, else issue them."""
    folder = directory / name
    existed = (folder / "certificate.pem").exists()
    expires = _usable_until(folder, authority, role, hosts) if existed else None
    if expires is not None:
        return CredentialsEntry(name, folder, "kept", expires)
    pair, expires = certificates.issue(authority, name, role, lifetime, hosts)
    _make_private(folder)
    write_file(folder / "authority.pem", authority.certificate)
    write_file(folder / "key.pem", pair.key)
    write_file(folder / "certificate.pem", pair.certificate)
    return CredentialsEntry(name, folder, "re-issued" if existed else "created", expires)


def _present_hosts(folder: Path) -> tuple[str, ...]:
    """Hosts that the server's certificate in `folder` is good for; none if there is no readable certificate."""
    try:
        return certificates.hosts_of(_only_pem((folder / "certificate.pem").read_bytes()))
    except (FileNotFoundError, CredentialsError):
        return ()


def _read_party(folder: Path, renew: str) -> tuple[bytes, Pair]:
    """Read `authority.pem`, `certificate.pem` and `key.pem`.

    Raises CredentialsError if one is missing or unreadable, or if other users of the machine can change it or read the
    key.
    """
    contents = []
    for name in _FILES:
        path = folder / name
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                contents.append(_only_pem(file.read()))
        except FileNotFoundError:
            raise CredentialsError(f"{path} is missing: {renew}") from None
        except OSError as error:
            raise CredentialsError(f"cannot read {path}: {error.strerror}") from error
        # Windows keeps no such mode bits; access lists protect a user's files there.
        if name == "key.pem" and os.name == "posix" and mode & 0o077:
            raise CredentialsError(f"other users of this machine can read {path}: run `chmod 600 {quote(str(path))}`")
        if os.name == "posix" and mode & 0o022:
            raise CredentialsError(
                f"other users of this machine can change {path}: run `chmod go-w {quote(str(path))}`"
            )
    authority, certificate, key = contents
    return authority, Pair(certificate, key)


def _only_pem(content: bytes) -> bytes:
    """What is PEM in a file, without a byte order mark before it or notes around it; all of it if nothing is."""
    blocks = [found[0] for found in _PEM.finditer(content)]
    return b"\n".join([*blocks, b""]) if blocks else content


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)


def _usable_until(folder: Path, authority: Pair, role: Role, hosts: Sequence[str]) -> datetime.datetime | None:
    """When the credentials in `folder` expire; None if they must be issued again."""
    try:
        trusted, *pair_files = ((folder / name).read_bytes() for name in _FILES)
        pair = Pair(*pair_files)
        _, expires = certificates.check(authority.certificate, pair, role, str(folder), renew="")
    except (FileNotFoundError, CredentialsError):
        return None
    lasts = expires > datetime.datetime.now(datetime.UTC) + RENEW_BEFORE
    named = set(hosts) <= set(certificates.hosts_of(pair.certificate))
    return expires if lasts and named and trusted == authority.certificate else None


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
