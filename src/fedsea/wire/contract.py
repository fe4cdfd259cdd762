"""The service contract: the gRPC methods, their options, and how an error travels from server to client.

The methods are bidirectional streams of frames, without protobuf: requests and responses are raw bytes.

A `Session` stream carries one session: OPEN and OPENED, then a RESULT for each STEP, and CLOSE. A stream that ends
without CLOSE is a lost connection; the server keeps the session for a while, and OPEN with its name takes it up again.

A `Run` stream carries one run: OPEN and OPENED, then an answer for each operation, in order, of which several may be
under way. CLOSE ends the run; a run whose stream ends in any other way is kept for its client to come back.

A `Coordinate` stream carries a federation's coordinator: OPEN and OPENED, then an answer for each command. Only a
coordinator's certificate may open one.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import grpc

from fedsea.errors import (
    BY_CODE,
    CredentialsError,
    FedSEAError,
    LimitExceededError,
    ProtocolError,
    RefusedTicketError,
    ServerError,
    ServerUnavailableError,
)
from fedsea.text import one_line
from fedsea.wire.codec import other_version

SERVICE = "fedsea.BlockServer"
SESSION, RUN, COORDINATE = "Session", "Run", "Coordinate"
SESSION_PATH, RUN_PATH, COORDINATE_PATH = (f"/{SERVICE}/{method}" for method in (SESSION, RUN, COORDINATE))
ERROR_KEY = "fedsea-error"
ERROR_CHARACTERS = 1000  # of an error as its client gets it: it may quote what came

_STATUS: dict[type[FedSEAError], grpc.StatusCode] = {
    LimitExceededError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    CredentialsError: grpc.StatusCode.PERMISSION_DENIED,
    RefusedTicketError: grpc.StatusCode.PERMISSION_DENIED,
    ServerUnavailableError: grpc.StatusCode.UNAVAILABLE,
    ServerError: grpc.StatusCode.INTERNAL,
}


def channel_options(frame_bytes: int) -> list[tuple[str, int]]:
    """Options that client and server share. Frames may have `frame_bytes` bytes.

    Probes of the link's bandwidth are off: they cost bytes at every token. Keepalive notices a peer that is gone.
    """
    return [
        ("grpc.max_receive_message_length", frame_bytes),
        ("grpc.max_send_message_length", frame_bytes),
        ("grpc.http2.bdp_probe", 0),
        # Without probing the windows do not grow by themselves: start where a long prompt is not throttled.
        ("grpc.http2.lookahead_bytes", 8 << 20),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def refusal(error: FedSEAError) -> tuple[grpc.StatusCode, str, Sequence[tuple[str, str]]]:
    """What ends a stream with an error: the status, a line for the client, and the class that it is to raise there."""
    status = _STATUS.get(type(error), grpc.StatusCode.FAILED_PRECONDITION)
    return status, one_line(str(error))[:ERROR_CHARACTERS], ((ERROR_KEY, error.code),)


def error_from(details: str | None, metadata: Iterable[tuple[str, Any]] | None) -> FedSEAError | None:
    """The error that a server sent with a stream's status; None if the status is not one of FedSEA's."""
    for key, value in metadata or ():
        if key == ERROR_KEY:
            said = one_line(details or "") or "the server gave no reason"
            if said.startswith("this side speaks version 1 of the protocol"):  # a server of version 1, of itself
                said = other_version(1)
            return BY_CODE.get(str(value), ServerError)(said)
    return None
