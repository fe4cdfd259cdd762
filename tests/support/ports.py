"""Addresses on this machine that no other program takes while the tests run."""

import socket

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


NOWHERE = held_address()  # nobody listens here
