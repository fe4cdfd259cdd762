"""One gRPC stream to a block server: frames out, frames in, losses told apart from refusals. It does not reconnect."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import grpc

from fedsea.client.traffic import Traffic
from fedsea.errors import FedSEAError, ProtocolError, ServerUnavailableError
from fedsea.wire import contract
from fedsea.wire.credentials import Credentials, channel_credentials
from fedsea.wire.diagnose import explain_unreachable
from fedsea.wire.frames import Frame, Message, Result, Step, decode, encode

FRAME_BYTES = 1 << 30  # the server's own limit, told at OPEN, is what counts


class ConnectionLost(Exception):  # noqa: N818 - not an error for the user: the session reconnects
    """The stream broke without the server refusing anything."""


class Endpoint:
    """Where the block server is, and how to be recognised there; makes streams over one channel.

    Parameters
    ----------
    address
        `HOST:PORT`.
    credentials
        The client's certificate; None for a plaintext connection (loopback only, or the server refuses).
    """

    def __init__(self, address: str, credentials: Credentials | None) -> None:
        self.address, self.credentials = address, credentials
        self._channel: grpc.Channel | None = None

    def stream(self, traffic: Traffic) -> "Connection":
        """A new stream. Does not wait for the server."""
        if self._channel is None:
            options = contract.channel_options(FRAME_BYTES)
            if self.credentials is None:
                self._channel = grpc.insecure_channel(self.address, options)
            else:
                self._channel = grpc.secure_channel(self.address, channel_credentials(self.credentials), options)
        return Connection(self._channel, traffic)

    def explain(self, detail: str) -> FedSEAError:
        """Why the server cannot be reached, in one line."""
        return explain_unreachable(self.address, self.credentials, detail)

    def reset(self) -> None:
        """Drop the channel, so that the next stream connects at once and not after gRPC's own back-off."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


class Connection:
    """A stream of one session."""

    def __init__(self, channel: grpc.Channel, traffic: Traffic) -> None:
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._traffic = traffic
        self._call: Any = channel.stream_stream(contract.PATH)(iter(self._outgoing.get, None))
        self._responses: Iterator[bytes] = iter(self._call)
        self._open = True

    def send(self, frame: Frame) -> None:
        """Put a frame on its way."""
        data = encode(frame)
        self._traffic.bytes_up += len(data)
        if isinstance(frame, Step):
            self._traffic.tensor_bytes_up += frame.states.numel() * frame.states.element_size()
        self._outgoing.put(data)

    def receive(self) -> Frame:
        """Wait for the next frame, as long as the peer's keepalive answers (a long prompt may take minutes).

        Raises
        ------
        ConnectionLost
            If the stream ended.
        FedSEAError
            What the server refused.
        """
        try:
            data = next(self._responses)
        except StopIteration:
            raise ConnectionLost("the server ended the stream") from None
        except grpc.RpcError:
            raise self._reason() from None
        self._traffic.bytes_down += len(data)
        frame = decode(data)
        if isinstance(frame, Result) and frame.states is not None:
            self._traffic.tensor_bytes_down += frame.states.numel() * frame.states.element_size()
        return frame

    def _reason(self) -> Exception:
        """What ended the stream: a refusal is a FedSEAError, anything else a loss."""
        details, code = self._call.details() or "", self._call.code()
        refused = contract.error_from(details, self._call.trailing_metadata())
        if refused is None and code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return ProtocolError(f"the block server refused a frame: {details}")
        if refused is None and code is grpc.StatusCode.UNIMPLEMENTED:
            return ServerUnavailableError("what listens there speaks gRPC, but is not a FedSEA block server")
        if refused is None or isinstance(refused, ServerUnavailableError):
            return ConnectionLost(details)
        return refused

    def close(self, goodbye: Message | None = None, *, wait_seconds: float = 0.0) -> None:
        """End the stream: at once, or politely if there is a goodbye to send (which goes on in the background)."""
        if not self._open:
            return
        self._open = False
        if goodbye is None:
            self._outgoing.put(None)
            self._call.cancel()
            return
        # A call that is forgotten is cancelled, and would take the goodbye with it: hold it until it is over.
        over = threading.Event()
        _closing.add(self)

        def finished() -> None:
            _closing.discard(self)
            over.set()

        if not self._call.add_callback(finished):
            finished()
        self._outgoing.put(encode(goodbye))
        self._outgoing.put(None)
        over.wait(wait_seconds)


_closing: set[Connection] = set()
