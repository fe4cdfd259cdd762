"""Addresses on this machine that no other program takes while the tests run."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from fedsea.wire.address import format_address

_HELD: list[socket.socket] = []


def held_address(host: str = "127.0.0.1") -> str:
    """A free port that stays free for the server of a test, also between its end and its next start.

    The socket is bound and never listens: a server that reuses addresses, as gRPC's, may listen beside it, and until
    then connections are refused.
    """
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((host, 0))
    _HELD.append(held)
    return format_address(host, held.getsockname()[1])


@contextlib.contextmanager
def listening(handle: Callable[[socket.socket], object]) -> Iterator[str]:
    """A plain TCP server that hands each connection to a function; its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                with listener.accept()[0] as connection, contextlib.suppress(OSError):
                    connection.settimeout(5)
                    handle(connection)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield format_address(*listener.getsockname())
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@contextlib.contextmanager
def grpc_serving(*handlers: grpc.GenericRpcHandler, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """A gRPC server of a test's own; its address."""
    server, listen = grpc.server(ThreadPoolExecutor(1), handlers=handlers), "127.0.0.1:0"
    port = server.add_insecure_port(listen) if credentials is None else server.add_secure_port(listen, credentials)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


NOWHERE = held_address()  # nobody listens here
