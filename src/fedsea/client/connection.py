"""One gRPC stream to a block server: frames out, frames in, losses apart from refusals. It does not reconnect."""

import atexit
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import grpc

from fedsea.client.traffic import Traffic
from fedsea.errors import FedSEAError, LimitExceededError, ProtocolError, ServerUnavailableError, UsageError
from fedsea.text import one_line
from fedsea.wire import contract
from fedsea.wire.address import check_server, parse_address
from fedsea.wire.codec import MAX_PLACES, decode, encode
from fedsea.wire.credentials import Credentials, open_channel
from fedsea.wire.diagnose import explain_unreachable
from fedsea.wire.frames import Backward, Forward, Frame, Kind, Message, Result, States, Step

# The longest result that is accepted: a full step of a hidden size of 16,384 in float32.
FRAME_BYTES = MAX_PLACES * 16_384 * 4
CLOSING_SECONDS = 2.0


def client_credentials(
    server: str,
    credentials: str | Path | Credentials | None,
    insecure: bool,
    role: Literal["client", "coordinator"] = "client",
) -> Credentials | None:
    """Load the certificate to connect with, or accept that there is none.

    UsageError if neither or both are given, or plaintext would leave this machine.
    """
    parse_address(server)
    if (credentials is None) != insecure:
        raise UsageError("give either credentials (a folder made by: fedsea credentials init DIR) or insecure=True")
    if isinstance(credentials, Credentials):
        return credentials
    if credentials is not None:
        return Credentials.load(credentials, role=role)
    check_server(server, plaintext=True)
    return None


class ConnectionLost(Exception):  # noqa: N818 - not an error for the user: the session reconnects
    """The stream broke without a refusal; `end_reason` is what the server said, if it left on purpose."""

    def __init__(self, detail: str, end_reason: str | None = None) -> None:
        super().__init__(detail)
        self.end_reason = end_reason


class Endpoint:
    """Where the block server is, and how to be recognised there; makes streams over one channel. Safe across threads.

    Parameters
    ----------
    address
        `HOST:PORT`.
    credentials
        The client's certificate; None for a plaintext connection. UsageError if that would leave this machine.

    Attributes
    ----------
    frame_bytes
        The longest frame that the server takes; None until a session knows.
    """

    def __init__(self, address: str, credentials: Credentials | None) -> None:
        check_server(address, plaintext=credentials is None)
        self.address, self.credentials = address, credentials
        self.frame_bytes: int | None = None
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._process = os.getpid()

    def require_own_process(self) -> None:
        """UsageError in a forked process: threads of gRPC and torch are missing there, and nothing would ever end."""
        if os.getpid() != self._process:
            raise UsageError(
                "a split model cannot be used in a forked process: load it there, or start processes with 'spawn'"
            )

    def stream(self, traffic: Traffic, path: str = contract.SESSION_PATH) -> "Connection":
        """A new stream of a method of the service. Does not wait for the server."""
        self.require_own_process()
        with self._lock:
            if self._channel is None:
                # With a pool of its own, a new channel does not wait out the back-off of one that failed.
                options = [*contract.channel_options(FRAME_BYTES), ("grpc.use_local_subchannel_pool", 1)]
                self._channel = open_channel(self.address, self.credentials, options)
            return Connection(self._channel, traffic, path)

    def explain(self, detail: str) -> FedSEAError:
        """Why the server cannot be reached, in one line."""
        return explain_unreachable(self.address, self.credentials, detail)

    def lost(self, connection: "Connection") -> None:
        """Have the next stream connect anew, unless another session has seen to that already.

        The channel is not closed: other sessions may have streams on it that live. It goes with the last of them.
        """
        with self._lock:
            if self._channel is connection.channel:
                self._channel = None

    def close(self) -> None:
        """Close the channel, and whatever streams are left on it, once those that are being closed are over."""
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None and os.getpid() == self._process:
            _wait_for_closing(channel)
            channel.close()


class Connection:
    """A stream of one session, run or coordinator's call."""

    def __init__(self, channel: grpc.Channel, traffic: Traffic, path: str) -> None:
        self.channel = channel
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._traffic = traffic
        self._call: Any = channel.stream_stream(path)(iter(self._outgoing.get, None))
        self._responses: Iterator[bytes] = iter(self._call)
        self._process = os.getpid()
        self._open = True
        self._over = threading.Event()

    def send(self, frame: Frame) -> None:
        data = encode(frame)
        self._traffic.bytes_up += len(data)
        if isinstance(frame, Step | Forward):
            self._traffic.tensor_bytes_up += frame.states.nbytes
        elif isinstance(frame, Backward):
            self._traffic.tensor_bytes_up += frame.gradient.nbytes
        self._outgoing.put(data)

    def receive(self, **limits: Any) -> Frame:
        """Wait for the next frame, as long as the peer's keepalive answers (a long prompt may take minutes).

        `limits` are those of `decode`. Raises ConnectionLost if the stream ended, what the server refused, or why what
        it sent is no frame.
        """
        try:
            data = next(self._responses)
        except StopIteration:
            raise ConnectionLost("the server ended the stream") from None
        except grpc.RpcError:
            raise self._reason() from None
        frame = decode(data, **limits)
        self._traffic.bytes_down += len(data)
        if isinstance(frame, Result | States) and frame.states is not None:
            self._traffic.tensor_bytes_down += frame.states.nbytes
        return frame

    def receive_opened(self) -> dict[str, Any]:
        """Wait for the answer to OPEN; returns its body."""
        frame = self.receive()
        if not isinstance(frame, Message) or frame.kind is not Kind.OPENED:
            raise ProtocolError("the block server did not answer OPEN with OPENED")
        return frame.body

    def _reason(self) -> Exception:
        """What ended the stream: a refusal is a FedSEAError, anything else a loss."""
        details, code = one_line(self._call.details() or ""), self._call.code()
        refused = contract.error_from(details, self._call.trailing_metadata())
        if refused is None and code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return LimitExceededError(f"a frame is longer than the peer takes: {details}")
        if refused is None and code is grpc.StatusCode.UNIMPLEMENTED:
            return ServerUnavailableError("what listens there speaks gRPC, but is not a FedSEA block server")
        if refused is None:
            return ConnectionLost(details)
        if isinstance(refused, ServerUnavailableError):
            return ConnectionLost(details, end_reason=details)
        return refused

    def close(self, last: Message | None = None) -> None:
        """End the stream: at once, or in the background once a last message is sent.

        Any thread may call it, in the middle of anything: the garbage collector does.
        """
        if not self._open or os.getpid() != self._process:
            return
        self._open = False
        if last is None:
            self._outgoing.put(None)
            self._call.cancel()
            return
        # A call that is forgotten is cancelled, and would take the message with it: hold it until it is over.
        _closing.add(self)
        if not self._call.add_callback(self._finished):
            self._finished()
        self._outgoing.put(encode(last))
        self._outgoing.put(None)

    def wait_until_over(self, seconds: float) -> None:
        """Wait, after a last message, until the server has ended the stream."""
        self._over.wait(seconds)

    def _finished(self) -> None:
        _closing.discard(self)
        self._over.set()


_closing: set[Connection] = set()


def _wait_for_closing(channel: grpc.Channel | None = None) -> None:
    """Wait a moment for the streams that are being closed, on one channel or on all."""
    deadline = time.monotonic() + CLOSING_SECONDS
    for connection in list(_closing):
        if channel is None or connection.channel is channel:
            connection.wait_until_over(max(0.0, deadline - time.monotonic()))


# A script that ends without closing its model: finalizers close the sessions then, and the server should hear of it.
atexit.register(_wait_for_closing)
