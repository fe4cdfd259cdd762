"""Where a federation's servers run and who may take part: fields and flags. Imports neither torch nor grpc."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from fedsea.errors import UsageError
from fedsea.federation.invitation import check_name
from fedsea.flags import Flag
from fedsea.wire.address import is_loopback, parse_address

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # and how this machine reaches itself there


@dataclass(frozen=True)
class UpOptions:
    """Where a federation's servers run and who may take part. The help of each flag says what a field means.

    Port 0 is a free one. Without `hosts`, data owners reach this machine as it is listened on. With `servers`, whose
    certificates are of this federation's authority, no block server is started here.

    Raises
    ------
    UsageError
        If a name or address cannot be used.
    """

    clients: Annotated[tuple[str, ...], Flag("Names of the data owners, such as a,b,c.", metavar="NAMES")]
    listen: Annotated[str, Flag("Address of this machine to listen on.")] = "127.0.0.1"
    hosts: Annotated[
        tuple[str, ...],
        Flag(
            "Name or address by which data owners reach this machine; may be given several times, and the first one is "
            "written into their folders.",
            "--host",
        ),
    ] = ()
    port: Annotated[int, Flag("Port of the block server.", min=0, max=65535)] = 7070
    superlink_port: Annotated[int, Flag("Port of Flower's SuperLink.", min=0, max=65535)] = 7071
    servers: Annotated[
        tuple[str, ...],
        Flag("A block server on another machine; may be given several times.", "--server", metavar="HOST:PORT"),
    ] = ()

    def __post_init__(self) -> None:
        if not self.clients:
            raise UsageError("a federation needs clients: --clients a,b,c")
        for name in self.clients:
            check_name(name)
        if len(set(self.clients)) < len(self.clients):
            raise UsageError("a client is named twice")
        for server in self.servers:
            parse_address(server)
        if self.listen in _EVERYWHERE and not self.hosts:
            raise UsageError("data owners must know how to reach this machine: give --host NAME with --listen 0.0.0.0")

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> "UpOptions":
        """Read what `vars` of one gave, as JSON; UsageError if an option is unknown or cannot be used."""
        names = {field.name for field in fields(cls)}
        if not body.keys() <= names:
            raise UsageError(f"the federation's folder names unknown options: {', '.join(body.keys() - names)}")
        plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in body.items()}
        return cls(**{"clients": (), **plain})

    @property
    def host(self) -> str:
        """How data owners reach this machine."""
        return self.hosts[0] if self.hosts else self.listen

    @property
    def local(self) -> str:
        """How this machine reaches what it listens on."""
        return _EVERYWHERE.get(self.listen, self.listen)

    @property
    def certified(self) -> tuple[str, ...]:
        """What the server's certificate must be good for, beside the loopback names."""
        here = () if self.listen in _EVERYWHERE or is_loopback(self.listen) else (self.listen,)
        return (*self.hosts, *here, *(parse_address(server)[0] for server in self.servers))
