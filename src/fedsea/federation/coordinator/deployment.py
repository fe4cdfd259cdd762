"""A federation's folder at the coordinator, and the folder that each data owner gets.

DIR/federation.json      the options of `fedsea federation up`, and where it listens
DIR/credentials/         authority, server and coordinator (`fedsea credentials`)
DIR/clients/NAME/        what the data owner NAME gets: its certificate and key, the authority's certificate, its
                         SuperNode's key, and federation.json, which says where to connect to
DIR/output/              rounds, checkpoints and the adapter
DIR/online.json          while it runs: whose SuperNodes are there
DIR/logs/, DIR/flower/   logs; Flower's own files
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsea.errors import CredentialsError, UsageError
from fedsea.federation.invitation import FEDERATION, SUPERNODE_KEY, VERSION
from fedsea.files import read_object, write_file, write_json

_OURS = ("credentials", "clients", "output", "logs", "flower", "online.json", ".DS_Store")


class Deployment:
    """The coordinator's folder: where each thing in it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.credentials, self.coordinator = path / "credentials", path / "credentials" / "coordinator"
        self.authority = self.credentials / "server" / "authority.pem"
        self.output, self.online = path / "output", path / "online.json"
        self.logs, self.flower = path / "logs", path / "flower"

    def client(self, name: str) -> Path:
        """A data owner's folder."""
        return self.path / "clients" / name

    def prepare(self, hosts: Sequence[str], clients: Sequence[str]) -> None:
        """Make or complete certificates and keys; UsageError for a name, CredentialsError if they cannot be made."""
        from fedsea.wire.credential_files import create_credentials

        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            create_credentials(self.credentials, hosts=hosts, clients=clients)
            for name in clients:
                folder = self.client(name)
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                for file in ("authority.pem", "certificate.pem", "key.pem"):
                    write_file(folder / file, (self.credentials / name / file).read_bytes())
                if not (folder / SUPERNODE_KEY).exists():
                    write_file(folder / SUPERNODE_KEY, new_key())
        except OSError as error:
            raise CredentialsError(f"cannot write {error.filename or self.path}: {error.strerror}") from error

    def public_key(self, name: str) -> bytes:
        """A data owner's SuperNode's public key (PEM); CredentialsError if its key cannot be read."""
        file = self.client(name) / SUPERNODE_KEY
        try:
            key = serialization.load_ssh_private_key(file.read_bytes(), None)
        except (OSError, ValueError):
            raise CredentialsError(f"{file} is no key of a SuperNode: remove it, and start again") from None
        return key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def describe(self, **what: Any) -> None:
        """Write what the federation is and where it listens."""
        write_json(self.path / FEDERATION, {"version": VERSION, **what})

    def before(self) -> dict[str, Any]:
        """What `describe` wrote, with `settings` and `options`; nothing if it is new. UsageError if it is another's."""
        file = self.path / FEDERATION
        if not file.exists():
            if self.path.is_dir() and any(one.name not in _OURS for one in self.path.iterdir()):
                raise UsageError(f"{self.path} is not empty and holds no federation; choose another folder")
            return {}
        body = read_object(file, "")
        if body.get("version") != VERSION:
            raise UsageError(f"{file} is not what fedsea federation up writes")
        return body


def new_key() -> bytes:
    """A SuperNode's private key: EC P-384, PEM as OpenSSH has it."""
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
