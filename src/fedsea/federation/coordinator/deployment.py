"""A federation's folder at the coordinator, and the folder that each data owner gets.

DIR/federation.json      what `fedsea federation up` was told, and where it listens
DIR/credentials/         authority, server and coordinator (`fedsea credentials`)
DIR/clients/NAME/        what the data owner NAME gets: its certificate and key, the authority's certificate, its
                         SuperNode's key, and federation.json, which says where to connect to
DIR/output/              rounds, checkpoints and the adapter
DIR/online.json          while it runs: whose SuperNodes are there
DIR/logs/, DIR/flower/   logs; Flower's own files
"""

import re
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fedsea.errors import CredentialsError, UsageError
from fedsea.extras import install_line
from fedsea.federation.coordinator.control import new_key, public_key_of
from fedsea.files import parse_json, write_file, write_json
from fedsea.wire.address import format_address

FEDERATION = "federation.json"
SUPERNODE_KEY = "supernode-key.pem"
VERSION = 1
_OURS = ("credentials", "clients", "output", "logs", "flower", "online.json", ".DS_Store")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True)
class Invitation:
    """What a data owner's folder says.

    Attributes
    ----------
    federation, client
        Names.
    model
        Of the federation; a data owner may have its own copy of it.
    task
        That everybody learns; empty if the coordinator leaves it open.
    superlink
        `HOST:PORT` of Flower's SuperLink.
    servers
        Addresses of the block servers.
    """

    federation: str
    client: str
    model: str
    task: str
    superlink: str
    servers: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> "Invitation":
        """Read a data owner's folder.

        Raises
        ------
        UsageError
            If it is no such folder, or its file cannot be read.
        """
        body = read_object(
            folder / FEDERATION, f"{folder} is no folder of a data owner: fedsea federation up makes them"
        )
        try:
            values = {field.name: body[field.name] for field in fields(cls)}
            servers = tuple(values.pop("servers"))
        except (KeyError, TypeError):
            servers, values = (), {}
        if not servers or not all(isinstance(value, str) for value in (*values.values(), *servers)):
            raise UsageError(f"{folder / FEDERATION} is not what fedsea federation up {VERSION} writes")
        return cls(**values, servers=servers)


@dataclass(frozen=True)
class Deployment:
    """The coordinator's folder.

    Attributes
    ----------
    path
        Where it is.
    """

    path: Path

    @property
    def credentials(self) -> Path:
        """Certificates of authority, server and coordinator."""
        return self.path / "credentials"

    @property
    def coordinator(self) -> Path:
        """The coordinator's certificate."""
        return self.credentials / "coordinator"

    @property
    def authority(self) -> Path:
        """The authority's certificate."""
        return self.credentials / "server" / "authority.pem"

    @property
    def output(self) -> Path:
        """Rounds, checkpoints, adapter."""
        return self.path / "output"

    @property
    def online(self) -> Path:
        """Which data owners are there."""
        return self.path / "online.json"

    @property
    def logs(self) -> Path:
        """Logs of block server and SuperLink."""
        return self.path / "logs"

    @property
    def flower(self) -> Path:
        """Flower's files (FLWR_HOME)."""
        return self.path / "flower"

    def client(self, name: str) -> Path:
        """A data owner's folder."""
        return self.path / "clients" / name

    def prepare(self, hosts: Sequence[str], clients: Sequence[str]) -> None:
        """Make or complete certificates and keys.

        Raises
        ------
        UsageError
            If a name cannot be used.
        CredentialsError
            If they cannot be made.
        """
        from fedsea.wire.credentials import create_credentials

        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            create_credentials(self.credentials, hosts=hosts, clients=clients)
            for name in clients:
                folder = self.client(name)
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                for file in ("authority.pem", "certificate.pem", "key.pem"):
                    write_file(folder / file, (self.credentials / name / file).read_bytes())
                if not (folder / SUPERNODE_KEY).exists():
                    write_file(folder / SUPERNODE_KEY, new_key()[0])
        except OSError as error:
            raise CredentialsError(f"cannot write {error.filename or self.path}: {error.strerror}") from error

    def public_key(self, name: str) -> bytes:
        """A data owner's SuperNode's public key (PEM).

        Raises
        ------
        CredentialsError
            If its key cannot be read.
        """
        file = self.client(name) / SUPERNODE_KEY
        try:
            return public_key_of(file.read_bytes())
        except (OSError, ValueError):
            raise CredentialsError(
                f"{file} is no key of a SuperNode: remove it, and start again for a new one"
            ) from None

    def invite(self, invitation: Invitation) -> None:
        """Write what a data owner is told."""
        write_json(self.client(invitation.client) / FEDERATION, {"version": VERSION, **asdict(invitation)})

    def describe(self, **what: Any) -> None:
        """Write what the federation is and where it listens."""
        write_json(self.path / FEDERATION, {"version": VERSION, **what})

    def before(self) -> dict[str, Any]:
        """What `describe` wrote, with `settings` and `options`; nothing if this federation is new.

        Raises
        ------
        UsageError
            If the folder holds something else.
        """
        file = self.path / FEDERATION
        if not file.exists():
            if self.path.is_dir() and any(one.name not in _OURS for one in self.path.iterdir()):
                raise UsageError(f"{self.path} is not empty and holds no federation; choose another folder")
            return {}
        body = read_object(file, "")
        if body.get("version") != VERSION:
            raise UsageError(f"{file} is not what fedsea federation up writes")
        return body


def federation_name(path: Path) -> str:
    """A name for a federation, from its folder's."""
    name = re.sub(r"[^a-z0-9]+", "-", path.expanduser().resolve().name.lower()).strip("-")[:20].strip("-")
    return name or "federation"


def check_name(name: str) -> None:
    """Check the name of a federation or of a client; the two make names of runs together.

    Raises
    ------
    UsageError
        If it cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name here: use 1 to 32 small letters, digits and dashes, a letter or digit first"
        )


def require_port(host: str, port: int, option: str) -> int:
    """Check that a port can be listened on; 0 takes a free one.

    Raises
    ------
    UsageError
        If it is taken, or the host is not this machine's.
    """
    where = format_address(host, port)
    try:
        family, kind, protocol, _name, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except socket.gaierror:
        raise UsageError(f"cannot listen on {where}: no machine is known by the name {host!r}") from None
    except OSError as error:
        raise UsageError(f"cannot listen on {where}: {(error.strerror or str(error)).lower()}; see {option}") from None


def read_object(file: Path, otherwise: str) -> dict[str, Any]:
    """Read a file with one JSON object.

    Raises
    ------
    UsageError
        With `otherwise` if there is no such file; if it cannot be read.
    """
    try:
        body = parse_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(otherwise) from None
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise UsageError(f"{file} is damaged: it holds no JSON object")
    return body


def require_flower() -> None:
    """Check that Flower is installed, in a version that this works with.

    Raises
    ------
    UsageError
        If it is not.
    """
    import importlib.metadata

    try:
        version = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(f"a federation needs Flower: {install_line('flwr')}") from None
    if not version.startswith("1.41."):
        raise UsageError(f"a federation needs Flower 1.41, not {version}: {install_line('flwr')}")
