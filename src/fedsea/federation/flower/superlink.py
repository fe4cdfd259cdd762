"""Flower's SuperLink behind a gate: `python -m fedsea.federation.flower.superlink ARGUMENTS…`, as `flower-superlink`.

Flower 1.41 serves three interfaces at one port. Data owners need one of them, where every request is signed. The other
two start runs and hand out tasks, and ask nobody who they are: whoever can reach them can run code here and, through
the SuperNodes, at the data owners. The gate lets them be called from this machine and by this user only.

Of a data owner's request Flower reads all of the body before it looks at the signature. The gate looks at it first, and
reads no more than whoever has signed can need. Who sends nothing, or too slowly, is not waited for.
"""

import asyncio
import base64
import binascii
import contextlib
import importlib
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

from fedsea.federation.flower.peers import CLOSING, App, Scope, is_local, log_refusal, of_own_process, refuse
from fedsea.process import raise_file_limit

FOR_DATA_OWNERS = "/v1/fleet/"
# Flower sends arrays in pieces of 5 MiB; a message's list of its pieces is shorter.
KNOWN_BYTES, UNKNOWN_BYTES = 16 << 20, 64 << 10
KNOWN_SECONDS, UNKNOWN_SECONDS = 300.0, 10.0  # for a body
BODIES_AT_ONCE = 8  # of one data owner; its other requests wait
LINGER_SECONDS = 10.0
SILENT_SECONDS = 10.0  # a connection without a request is closed after once to twice that
CONNECTIONS = 4096  # more are answered that the service is unavailable


class Gate:
    """ASGI middleware: data owners reach their interface, in requests of a bounded size; all else is this machine's."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._turns: dict[bytes, asyncio.Semaphore] = {}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif is_for_data_owners(scope):
            await self._pass_bounded(scope, receive, send)
        elif may_call(scope) and of_own_process(scope):
            await self.app(scope, receive, send)
        else:
            await refuse(scope, send, 403, "only from the coordinator's own machine, by the user that runs this")

    async def _pass_bounded(self, scope: Scope, receive: Any, send: Any) -> None:
        from starlette.concurrency import run_in_threadpool

        key = await run_in_threadpool(signer, scope)
        most, seconds = (KNOWN_BYTES, KNOWN_SECONDS) if key else (UNKNOWN_BYTES, UNKNOWN_SECONDS)
        if declared(scope) > most:
            await refuse_body(scope, receive, send, most)
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
                await refuse_body(scope, receive, send, most)
                return
            await self.app(scope, partial(_again, [body], receive), send)


async def read_body(receive: Any, most: int) -> bytes | None:
    """A request's body, or as much of it as tells that it is longer than `most`; None if its sender has left."""
    body, more = bytearray(), True
    while more and len(body) <= most:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


async def refuse_body(scope: Scope, receive: Any, send: Any, most: int) -> None:
    """Answer that a request is too long. What comes for a moment is thrown away, so that its sender sees the answer."""

    async def throw_away() -> None:
        while (await receive())["type"] == "http.request":
            pass

    log_refusal(scope, 413)
    await send({"type": "http.response.start", "status": 413, "headers": list(CLOSING)})
    text = f"a request has at most {most} bytes".encode()
    await send({"type": "http.response.body", "body": text, "more_body": True})
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(throw_away(), LINGER_SECONDS)
    await send({"type": "http.response.body", "body": b""})


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
        # The key first: it costs little, and who has none is not worth the look at a signature.
        if scope["app"].state.linkstate_factory.state().get_node_id_by_public_key(key) is None:
            return None
        # How old a signature may be is Flower's to say, when it has the request.
        return key if verify_signature(bytes_to_public_key(key), given[2], signature) else None
    except (ValueError, TypeError, binascii.Error):
        return None


def is_for_data_owners(scope: Scope) -> bool:
    """Whether a request is for the interface that data owners need."""
    return scope["type"] == "http" and str(scope["path"]).startswith(FOR_DATA_OWNERS)


def may_call(scope: Scope) -> bool:
    """Whether the peer may make this request, by its address."""
    return is_for_data_owners(scope) or is_local(scope)


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


def main() -> None:
    """Run the SuperLink."""
    import uvicorn
    from flwr.superlink import extensions
    from starlette.middleware import Middleware

    command: Any = importlib.import_module("flwr.superlink.cli.flower_superlink")
    if not callable(getattr(extensions, "get_middleware", None)) or not hasattr(command, "uvicorn"):
        sys.exit("this version of Flower has no place for the gate in front of its SuperLink; install flwr 1.41")
    before = extensions.get_middleware
    extensions.get_middleware = lambda: (Middleware(Gate), *before())
    how: dict[str, Any] = {
        "http": patient_protocol(),
        "ws": "none",
        "proxy_headers": False,
        "limit_concurrency": CONNECTIONS,
        "access_log": False,  # a line for every look for replies, day and night; what is refused is logged here
    }
    command.uvicorn = SimpleNamespace(run=lambda **given: uvicorn.run(**(given | how)))
    raise_file_limit()
    command.flower_superlink()


if __name__ == "__main__":
    main()
