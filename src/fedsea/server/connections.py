"""Connections as the operating system sees them: how many there may be, and how long one may be silent at first."""

import logging
from typing import Any
from urllib.parse import unquote

from fedsea.errors import FedSEAError
from fedsea.wire import contract

log = logging.getLogger(__name__)

# A connection that does not finish its TLS handshake in this time is closed; gRPC's default is two minutes.
HANDSHAKE_MS = 10_000
MESSAGE_CHARACTERS = 300  # of what a peer has sent, in a line of the log


def listener_options(frame_bytes: int) -> list[tuple[str, int]]:
    """gRPC's options of a block server, which takes frames of at most `frame_bytes`."""
    return [
        *contract.channel_options(frame_bytes + 4096),
        # One listener for one port: without this, a second server on the port would silently share it.
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
    ]


def peer_of(context: Any) -> str:
    """Address of a call's client, `HOST:PORT`."""
    return unquote(str(context.peer())).removeprefix("ipv4:").removeprefix("ipv6:")


def log_refusal(stream: Any, what: str, name: str, error: FedSEAError) -> None:
    """One line of the log for a stream that is refused: whose, from where, and why."""
    message = str(error)[:MESSAGE_CHARACTERS]
    log.warning(
        "refused %s=%s client=%s peer=%s error=%s message=%r",
        what,
        name,
        stream.client,
        stream.peer,
        error.code,
        message,
    )
