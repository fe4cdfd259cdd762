"""The folders that credentials live in: written whole and private, and completed where something is missing or old."""

import datetime
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

from fedsea.errors import CredentialsError
from fedsea.files import write_file
from fedsea.wire import certificates
from fedsea.wire.certificates import Pair, Role

RENEW_BEFORE = datetime.timedelta(days=30)

_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)

Outcome = Literal["created", "kept", "re-issued"]


@dataclass(frozen=True)
class CredentialsEntry:
    """What became of one certificate: the authority's, the server's, or a client's."""

    name: str
    folder: Path
    outcome: Outcome
    expires: datetime.datetime


def complete_authority(folder: Path, lifetime: datetime.timedelta) -> tuple[Pair, CredentialsEntry]:
    """Read the authority in `folder`, or create it if the folder holds none.

    Raises
    ------
    CredentialsError
        If only one of its two files is there: a new authority would silently shut out all who hold credentials.
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
    pair = Pair(*(only_pem(path.read_bytes()) for path in paths))
    return pair, CredentialsEntry("authority", folder, outcome, certificates.expiry(pair.certificate))


def complete_party(
    folder: Path,
    name: str,
    authority: Pair,
    lifetime: datetime.timedelta,
    *,
    role: Role,
    hosts: Sequence[str] = (),
) -> CredentialsEntry:
    """Keep the credentials in `folder` if they are good for `hosts` and for a while, else issue them."""
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


def present_hosts(folder: Path) -> tuple[str, ...]:
    """Hosts that the server's certificate in `folder` is good for; none if there is no readable certificate."""
    try:
        return certificates.hosts_of(only_pem((folder / "certificate.pem").read_bytes()))
    except (FileNotFoundError, CredentialsError):
        return ()


def read_party(folder: Path, renew: str) -> tuple[bytes, Pair]:
    """Read `authority.pem`, `certificate.pem` and `key.pem`.

    Raises
    ------
    CredentialsError
        If one is missing or unreadable, or if other users of the machine can change it, or read the key.
    """
    contents = []
    for name in ("authority.pem", "certificate.pem", "key.pem"):
        path = folder / name
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                contents.append(only_pem(file.read()))
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


def only_pem(content: bytes) -> bytes:
    """What is PEM in a file, without a byte order mark before it or notes around it; all of it if nothing is."""
    blocks = [found[0] for found in _PEM.finditer(content)]
    return b"\n".join([*blocks, b""]) if blocks else content


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)


def _usable_until(folder: Path, authority: Pair, role: Role, hosts: Sequence[str]) -> datetime.datetime | None:
    """When the credentials in `folder` expire; None if they must be issued again."""
    try:
        trusted, pair = (
            (folder / "authority.pem").read_bytes(),
            Pair((folder / "certificate.pem").read_bytes(), (folder / "key.pem").read_bytes()),
        )
        _, expires = certificates.check(authority.certificate, pair, role, str(folder), renew="")
    except (FileNotFoundError, CredentialsError):
        return None
    soon = datetime.datetime.now(datetime.UTC) + RENEW_BEFORE
    good = (
        trusted == authority.certificate
        and expires > soon
        and set(hosts) <= set(certificates.hosts_of(pair.certificate))
    )
    return expires if good else None
