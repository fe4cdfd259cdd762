"""What a coordinator writes into a data owner's folder, and the names that a federation and its clients may have."""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fedsea.errors import UsageError
from fedsea.files import read_object, write_json

FEDERATION = "federation.json"  # of a data owner's folder, of the coordinator's folder, and of its output
SUPERNODE_KEY = "supernode-key.pem"
VERSION = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True)
class Invitation:
    """What a data owner's folder says."""

    federation: str
    client: str
    model: str  # of the federation; a data owner may have its own copy of it
    task: str  # that all learn; empty if the coordinator leaves it open
    superlink: str  # `HOST:PORT` of Flower's
    servers: tuple[str, ...]  # addresses of the block servers

    @classmethod
    def read(cls, folder: Path) -> "Invitation":
        """Read a data owner's folder; UsageError if it is none, or its file cannot be read."""
        file = folder / FEDERATION
        body = read_object(file, f"{folder} is no folder of a data owner: fedsea federation up makes them")
        try:
            values = {field.name: body[field.name] for field in fields(cls)}
            servers = tuple(values.pop("servers"))
        except (KeyError, TypeError):
            servers, values = (), {}
        if not servers or not all(isinstance(value, str) for value in (*values.values(), *servers)):
            raise UsageError(f"{file} is not what fedsea federation up {VERSION} writes")
        return cls(**values, servers=servers)

    def write(self, folder: Path) -> None:
        """Write it into the folder."""
        write_json(folder / FEDERATION, {"version": VERSION, **asdict(self)})


def federation_name(path: Path) -> str:
    """A name for a federation, from its folder's."""
    name = re.sub(r"[^a-z0-9]+", "-", path.expanduser().resolve().name.lower()).strip("-")[:20].strip("-")
    return name or "federation"


def check_name(name: str) -> None:
    """Check the name of a federation or client, of which names of runs are made; UsageError if it cannot be used."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name here: use 1 to 32 small letters, digits and dashes, a letter or digit first"
        )
