"""Certificates that `fedsea credentials init` would not issue."""

from pathlib import Path

from fedsea.wire import certificates
from fedsea.wire.credentials import Credentials


def authority_of(made: Path) -> certificates.Pair:
    """The authority of a folder of credentials."""
    return certificates.Pair(*((made / "authority" / f"{what}.pem").read_bytes() for what in ("certificate", "key")))


def issued(made: Path, **how: object) -> Credentials:
    """Credentials of that authority, past the checks of names and times."""
    authority = authority_of(made)
    pair, expires = certificates.issue(authority, **how)  # type: ignore[arg-type]
    return Credentials(authority.certificate, pair.certificate, pair.key, str(how["name"]), expires)
