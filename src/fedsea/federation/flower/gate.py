"""Who may call Flower's interfaces, and with how much: ASGI middleware before the SuperLink and the SuperNode.

Flower 1.41's SuperLink serves three interfaces at one port. Data owners need one of them, where every request is
signed. The other two start runs and hand out tasks, and do not check who calls: a stranger who reaches them can run
code here and, through the SuperNodes, at the data owners. `Gate` lets only this user of this machine call them.

Of a data owner's request Flower reads all of the body before it looks at the signature. The gate looks at it first, and
reads no more than a data owner can need. A peer that sends nothing, or too slowly, is not waited for.

Flower's processes of one machine speak over TCP on a loopback address, which every account of the machine can reach.
Linux lists each socket with its user, so a request is held against the user that this process runs as. The tokens that
Flower shows on command lines (`ps`) are of no use to others then.
"""

import asyncio
import base64
import binascii
import contextlib
import ipaddress
import logging
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

from fedsea.text import one_line

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

log = logging.getLogger("flwr")  # what Flower's processes write
FOR_DATA_OWNERS = "/v1/fleet/"
# Flower sends arrays in pieces of 5 MiB; a message's list of its pieces is shorter.
KNOWN_BYTES, UNKNOWN_BYTES = 16 << 20, 64 << 10
KNOWN_SECONDS, UNKNOWN_SECONDS = 300.0, 10.0  # for a body
BODIES_AT_ONCE = 8  # of one data owner; its other requests wait
LINGER_SECONDS = 10.0
SILENT_SECONDS = 10.0  # a connection without a request is closed after once to twice that
TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
CLOSING = ((b"content-type", b"text/plain"), (b"connection", b"close"))
_ROOT = 0


class Gate:
    """Data owners reach their interface, in requests of a bounded size; all else is this machine's."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._turns: dict[bytes, asyncio.Semaphore] = {}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif is_for_data_owners(scope):
            await self._pass_bounded(scope, receive, send)
        elif is_local(scope) and of_own_process(scope):
            await self.app(scope, receive, send)
        else:
            await refuse(scope, send, 403, "only from the coordinator's own machine, by the user that runs this")

    async def _pass_bounded(self, scope: Scope, receive: Any, send: Any) -> None:
        key = await asyncio.to_thread(signer, scope)
        most, seconds = (KNOWN_BYTES, KNOWN_SECONDS) if key else (UNKNOWN_BYTES, UNKNOWN_SECONDS)
        too_long = f"a request has at most {most} bytes"
        if declared(scope) > most:
            await refuse(scope, send, 413, too_long, receive)
            return
        turn = self._turns.setdefault(key, asyncio.Semaphore(BODIES_AT_ONCE)) if key else contextlib.nullcontext()
        async with turn:
            try:
                body = await asyncio.wait_for(read_body(receive, most), seconds)
            except TimeoutError:
                await refuse(scope, send, 408, f"a request takes at most {seconds:g} s")
                return
            if body is None:
                return  # it has left
            if len(body) > most:
                await refuse(scope, send, 413, too_long, receive)
                return
            await self.app(scope, partial(_again, [body], receive), send)


class OwnProcessesOnly:
    """Only this user's processes on this machine are answered."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or of_own_process(scope):
            await self.app(scope, receive, send)
        else:
            await refuse(scope, send, 403, "only processes of the user that runs this are answered")


async def refuse(scope: Scope, send: Any, status: int, why: str, receive: Any = None) -> None:
    """Answer a request with a status and one line, and end its connection: what else it sends is not read.

    With `receive`, what comes for a moment is thrown away, so that the sender of a long request sees the answer.
    """
    host, port, *_ = scope.get("client") or ("somewhere", 0)
    log.warning("refused peer=%s:%s path=%s status=%d", host, port, one_line(str(scope.get("path")))[:100], status)
    if scope["type"] != "http":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": status, "headers": list(CLOSING)})
    await send({"type": "http.response.body", "body": why.encode(), "more_body": receive is not None})
    if receive is not None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_throw_away(receive), LINGER_SECONDS)
        await send({"type": "http.response.body", "body": b""})


async def _throw_away(receive: Any) -> None:
    while (await receive())["type"] == "http.request":
        pass


async def read_body(receive: Any, most: int) -> bytes | None:
    """A request's body, or as much of it as shows that it is longer than `most`; None if its sender has left."""
    body, more = bytearray(), True
    while more and len(body) <= most:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


async def _again(unread: list[bytes], receive: Any) -> Any:
    """Give the body that was read, then whatever comes."""
    if unread:
        return {"type": "http.request", "body": unread.pop(), "more_body": False}
    return await receive()


def declared(scope: Scope) -> int:
    """How long a request says it is; 0 if it does not."""
    value = dict(scope["headers"]).get(b"content-length", b"0")
    return int(value) if value.isdigit() and len(value) < 20 else KNOWN_BYTES + 1


def signer(scope: Scope) -> bytes | None:
    """The registered key that has signed a request; None if none has."""
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

    headers = dict(scope["headers"])
    names = (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)
    given = [headers.get(name.lower().encode(), b"") for name in names]
    try:
        key, signature = (base64.b64decode(one, validate=True) for one in given[:2])
        # The key first: it costs little, and without a known key a signature need not be looked at.
        if scope["app"].state.linkstate_factory.state().get_node_id_by_public_key(key) is None:
            return None
        # How old a signature may be is Flower's to say, when it has the request.
        return key if verify_signature(bytes_to_public_key(key), given[2], signature) else None
    except (ValueError, TypeError, binascii.Error):
        return None


def is_for_data_owners(scope: Scope) -> bool:
    """Whether a request is for the interface that data owners need."""
    return scope["type"] == "http" and str(scope["path"]).startswith(FOR_DATA_OWNERS)


def is_local(scope: Scope) -> bool:
    """Whether a request comes from this machine, by its addresses."""
    client, server = scope.get("client"), scope.get("server")
    if client is None:
        return False
    try:
        # It is under the address that is listened on, or loopback.
        return (server is not None and client[0] == server[0]) or _plain(client[0]).is_loopback
    except ValueError:
        return False


def of_own_process(scope: Scope, user: int | None = None) -> bool:
    """Whether a request comes from a process of this user (None: this process's) or of root on this machine.

    Where the system does not list sockets (it is no Linux), any process of this machine counts as one.
    """
    if not any(table.exists() for table in TABLES):
        return is_local(scope)
    client, server = scope.get("client"), scope.get("server")
    if not client or not server:
        return False
    return _user_of(client, server) in (os.geteuid() if user is None else user, _ROOT)


def _user_of(near: tuple[str, int], far: tuple[str, int]) -> int | None:
    """The user that holds a socket of this machine with these two ends; None if there is none, or it is not held."""
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


def patient_protocol() -> type[asyncio.Protocol]:
    """Uvicorn's HTTP/1.1, except that a connection that makes no request is closed."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._seen: object = self
            self.loop.call_later(SILENT_SECONDS, self._look)

        def _look(self) -> None:
            if self.transport.is_closing():
                return
            # Without a request under way it is where it was at the last look: nothing has come since, or not enough.
            idle = self.cycle is None or self.cycle.response_complete
            if idle and self._seen is self.cycle:
                self.transport.close()
                return
            self._seen = self.cycle if idle else self
            self.loop.call_later(SILENT_SECONDS, self._look)

    return Patient
