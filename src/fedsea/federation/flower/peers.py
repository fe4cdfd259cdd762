"""Whose process is at the other end of a connection, as far as the system says it.

Flower's processes of one machine speak to each other over TCP on a loopback address, which every account of the machine
can reach, and some of its interfaces ask nobody who they are. Linux lists each socket with its user, so a request can
be held against the user that this process runs as. The tokens that Flower shows on command lines (`ps`) are of no use
to others then.
"""

import ipaddress
import logging
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from fedsea.text import one_line

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

log = logging.getLogger("flwr")  # what Flower's processes write
TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
CLOSING = ((b"content-type", b"text/plain"), (b"connection", b"close"))
_ROOT = 0


class OwnProcessesOnly:
    """ASGI middleware: only this user's processes on this machine are answered."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "lifespan" or of_own_process(scope):
            await self.app(scope, receive, send)
        else:
            await refuse(scope, send, 403, "only processes of the user that runs this are answered")


async def refuse(scope: Scope, send: Any, status: int, why: str) -> None:
    """Answer a request with a status and one line, and end its connection: what else it sends is not read."""
    log_refusal(scope, status)
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": status, "headers": list(CLOSING)})
        await send({"type": "http.response.body", "body": why.encode()})
    else:
        await send({"type": "websocket.close", "code": 1008})


def log_refusal(scope: Scope, status: int) -> None:
    """One line of the log: from where, for what, and with which status."""
    host, port, *_ = scope.get("client") or ("somewhere", 0)
    log.warning("refused peer=%s:%s path=%s status=%d", host, port, one_line(str(scope.get("path")))[:100], status)


def of_own_process(scope: Scope, user: int | None = None) -> bool:
    """Whether a request comes from a process of this user (or of root) on this machine.

    Where the system does not list sockets (it is no Linux), any process of this machine counts as one.

    Parameters
    ----------
    user
        Whose processes count; None for the user of this process.
    """
    if not any(table.exists() for table in TABLES):
        return is_local(scope)
    client, server = scope.get("client"), scope.get("server")
    if not client or not server:
        return False
    return _user_of(client, server) in (os.geteuid() if user is None else user, _ROOT)


def is_local(scope: Scope) -> bool:
    """Whether a request comes from this machine, by its addresses."""
    client, server = scope.get("client"), scope.get("server")
    if not client:
        return False
    if server and client[0] == server[0]:  # this machine, under the address that is listened on
        return True
    try:
        return _plain(client[0]).is_loopback
    except ValueError:
        return False


def _user_of(near: tuple[str, int], far: tuple[str, int]) -> int | None:
    """The user that holds a socket of this machine with these two ends; None if there is none, or nobody holds it."""
    try:
        wanted = [(_plain(host), port) for host, port in (near, far)]
    except ValueError:
        return None
    for table in TABLES:
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            _, local, remote, _, _, _, _, user, _, inode, *_ = line.split()
            # One that its process has given up is listed as root's, with no inode.
            if inode != "0" and [_end(local), _end(remote)] == wanted:
                return int(user)
    return None


def _plain(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(host)
    return getattr(address, "ipv4_mapped", None) or address


def _end(text: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    """One end of a socket as the kernel writes it: words of 32 bits in the machine's order, and the port."""
    digits, port = text.split(":")
    words = [bytes.fromhex(digits[at : at + 8]) for at in range(0, len(digits), 8)]
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    return _plain(str(ipaddress.ip_address(packed))), int(port, 16)
