"""One side's credentials of mutual TLS, and the gRPC channels that use them. credential_files.py makes them."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from fedsea.wire.address import is_loopback, parse_address
from fedsea.wire.roles import Role

RENEW_BEFORE = datetime.timedelta(days=30)  # a certificate that ends sooner is issued again


@dataclass(frozen=True)
class Credentials:
    """One side's credentials, checked when they were loaded; certificates and key are PEM."""

    authority: bytes
    certificate: bytes
    key: bytes = field(repr=False)
    name: str  # the certificate's common name: a client's name, "server" or "coordinator"
    expires: datetime.datetime  # UTC

    def ends_soon(self) -> str | None:
        """A warning in one line if they end within 30 days (`RENEW_BEFORE`); else None."""
        left = self.expires - datetime.datetime.now(datetime.UTC)
        if left > RENEW_BEFORE:
            return None
        return (
            f"the certificate of {self.name} ends on {self.expires:%Y-%m-%d}, in {max(0, left.days)} days: run "
            "`fedsea credentials init DIR` where the authority is, and start with the new files"
        )

    @classmethod
    def load(cls, directory: str | Path, role: Role) -> "Credentials":
        """Read and check the credentials of one side.

        Parameters
        ----------
        directory
            The folder with `authority.pem`, `certificate.pem` and `key.pem`. For a server and a coordinator also the
            folder above it.
        role
            Which side will use them.

        Raises
        ------
        CredentialsError
            If a file is missing, unreadable or open to other users of the machine, or if the certificate is not for
            this role, not of this authority, not this key's, expired or not valid yet.
        """
        from fedsea.wire import credential_files  # needs `cryptography`, which connecting without TLS does not

        return credential_files.load(Path(directory).expanduser(), role)


def open_channel(
    address: str, credentials: Credentials | None, options: Sequence[tuple[str, int]] = ()
) -> grpc.Channel:
    """A gRPC channel to a block server: the only place that makes one. It connects when it is used.

    A proxy that the environment names (`https_proxy` and so on) is used for TLS to another machine alone: to this
    machine it would be a way round, and to plaintext a way out. `credentials` are the client's; None for plaintext.
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
        [(credentials.key, credentials.certificate)], root_certificates=credentials.authority, require_client_auth=True
    )
