"""Flower's SuperLink behind a gate: `python -m fedsea.federation.superlink ARGUMENTS…`, as `flower-superlink` has them.

Flower 1.41 serves three interfaces at one port. Data owners need one of them, where every request is signed. The other
two start runs and hand out tasks, and ask nobody who they are: whoever can reach them can run code here and, through
the SuperNodes, at the data owners. The gate lets them be called from this machine only.
"""

import ipaddress
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

FOR_DATA_OWNERS = "/v1/fleet/"


class Gate:
    """ASGI middleware: from other machines only the interface for data owners is reachable."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "lifespan" or may_call(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": b"only from the coordinator's own machine"})
        else:
            await send({"type": "websocket.close", "code": 1008})


def may_call(scope: Scope) -> bool:
    """Whether the peer may make this request."""
    if scope["type"] == "http" and str(scope["path"]).startswith(FOR_DATA_OWNERS):
        return True
    client, server = scope.get("client"), scope.get("server")
    if not client:
        return False
    if server and client[0] == server[0]:  # this machine, under the address that is listened on
        return True
    try:
        address = ipaddress.ip_address(client[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def main() -> None:
    """Run the SuperLink."""
    from flwr.superlink import extensions
    from flwr.superlink.cli.flower_superlink import flower_superlink
    from starlette.middleware import Middleware

    if not callable(getattr(extensions, "get_middleware", None)):
        sys.exit("this version of Flower has no place for the gate in front of its SuperLink; install flwr 1.41")
    before = extensions.get_middleware
    extensions.get_middleware = lambda: (Middleware(Gate), *before())
    flower_superlink()


if __name__ == "__main__":
    main()
