"""A data owner's warm half, seen from the process that Flower starts for each message.

Importing torch and loading a model takes seconds, so this is done once, by the worker (`worker_process.py`); a
ClientApp only passes on what came to it. The two speak over a Unix socket in a folder that no other user may enter. A
request is one connection: a frame there, a frame back. A frame is two lengths, a JSON object, and safetensors.

This module imports neither torch nor transformers.
"""

import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsea.errors import (
    BY_CODE,
    CredentialsError,
    FedSEAError,
    ModelNotFoundError,
    ProtocolError,
    ServerUnavailableError,
    TermsError,
    UsageError,
)
from fedsea.text import one_line

if TYPE_CHECKING:  # a refused request needs no arrays
    import numpy as np
    import numpy.typing as npt

    Arrays = Mapping[str, npt.NDArray[np.float32]]

WORKER = "FEDSEA_WORKER"
"""The environment variable that names the worker's socket."""

FINISH = "finish"
"""What a worker, and the query to its ClientApp, is asked for when the federation is over."""

LENGTHS = struct.Struct("<IQ")  # of the JSON text and of the tensors, in bytes
MAX_TEXT = 16 << 20
MAX_TENSORS = 8 << 30
CONNECT_SECONDS = 60.0  # a worker that died is started again meanwhile


class WorkerClient:
    """Calls the worker at a socket. Each call is a connection of its own; it waits while the worker is busy.

    Parameters
    ----------
    path
        The worker's socket.
    connect_seconds
        How long to wait for a worker that is not there (yet).
    """

    def __init__(self, path: str | Path, connect_seconds: float = CONNECT_SECONDS) -> None:
        self.path = Path(path)
        self.connect_seconds = connect_seconds

    @classmethod
    def from_environment(cls) -> "WorkerClient | None":
        """The worker that the environment names; None if it names none."""
        path = os.environ.get(WORKER)
        return cls(path) if path else None

    def ping(self) -> dict[str, Any]:
        """What the worker is doing; answered at once, even while it trains."""
        return self._call("ping")[0]

    def describe(self) -> dict[str, Any]:
        """What this data owner brings; see `Participant.describe`."""
        return self._call("describe")[0]

    def train(
        self, body: dict[str, Any], weights: "Arrays"
    ) -> "tuple[dict[str, Any], dict[str, npt.NDArray[np.float32]]]":
        """Take part in a round; see `Participant.train`.

        Raises
        ------
        FedSEAError
            Of the class that the worker raised.
        ServerUnavailableError
            If there is no worker, or it died meanwhile.
        """
        from safetensors.numpy import load

        metrics, tensors = self._call("train", body, weights)
        return metrics, load(tensors)

    def evaluate(self, body: dict[str, Any], weights: "Arrays") -> dict[str, Any]:
        """Evaluate an adapter; see `Participant.evaluate`. Raises as `train` does."""
        return self._call("evaluate", body, weights)[0]

    def finish(self, body: dict[str, Any], weights: "Arrays") -> dict[str, Any]:
        """Keep the federation's adapter; see `Participant.finish`. Raises as `train` does."""
        return self._call(FINISH, body, weights)[0]

    def _call(
        self, what: str, body: dict[str, Any] | None = None, weights: "Arrays | None" = None
    ) -> tuple[dict[str, Any], bytes]:
        tensors = b""
        if weights is not None:
            from safetensors.numpy import save

            tensors = save(dict(weights))
        with self._connect() as connection:
            try:
                send_frame(connection, {"do": what, "body": body or {}}, tensors)
                received = receive_frame(connection)
            except OSError:
                received = None
        if received is None:
            raise ServerUnavailableError(f"the worker at {self.path} went away before it answered")
        answer, content = received
        if "error" in answer:
            raise read_error(answer["error"])
        return answer.get("value", {}), content

    def _connect(self) -> socket.socket:
        end = time.monotonic() + self.connect_seconds
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(str(self.path))
                return connection
            except OSError as error:
                connection.close()
                if time.monotonic() >= end:
                    raise ServerUnavailableError(
                        f"there is no worker at {self.path} ({error.strerror or error}): it runs while "
                        "`fedsea federation join` does"
                    ) from None
            time.sleep(0.05)


def send_frame(connection: socket.socket, body: Mapping[str, Any], tensors: bytes = b"") -> None:
    """Send one frame.

    Raises
    ------
    OSError
        If the other side is gone.
    """
    text = json.dumps(body).encode()
    connection.sendall(LENGTHS.pack(len(text), len(tensors)) + text)
    if tensors:  # to send nothing fails as well, where the other side has answered and gone meanwhile
        connection.sendall(tensors)


def receive_frame(connection: socket.socket) -> tuple[dict[str, Any], bytes] | None:
    """Receive one frame: its JSON object and its safetensors; None if the other side is gone.

    Raises
    ------
    ProtocolError
        If what came is no frame.
    OSError
        If the connection is lost.
    """
    lengths = _receive(connection, LENGTHS.size)
    if lengths is None:
        return None
    text_length, tensors_length = LENGTHS.unpack(lengths)
    if text_length > MAX_TEXT or tensors_length > MAX_TENSORS:
        raise ProtocolError(f"a frame between client app and worker is too long ({text_length} + {tensors_length})")
    text, tensors = _receive(connection, text_length), _receive(connection, tensors_length)
    if text is None or tensors is None:
        return None
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise ProtocolError("a frame between client app and worker cannot be read")
    return body, bytes(tensors)


def _receive(connection: socket.socket, length: int) -> bytearray | None:
    content = bytearray()
    while len(content) < length:
        part = connection.recv(min(length - len(content), 1 << 20))
        if not part:
            return None
        content += part
    return content


def write_error(error: Exception, *, to_owner: bool = False) -> dict[str, str]:
    """An error as a frame carries it: its code and its one line.

    The coordinator is told what concerns it: of its round, the block server, the adapter. What is wrong with the data
    owner's files, data or options may quote them, and an error that nobody has foreseen may quote anything: of these it
    is told the kind.

    Parameters
    ----------
    to_owner
        Whether its data owner is told, who may read all of it.
    """
    told = isinstance(error, FedSEAError) and (isinstance(error, TermsError) or not isinstance(error, _PRIVATE))
    code = error.code if isinstance(error, FedSEAError) else FedSEAError.code
    if told or (to_owner and isinstance(error, FedSEAError)):
        return {"code": code, "message": str(error)}
    if to_owner:
        return {"code": code, "message": f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"}
    return {"code": code, "message": f"the client failed with {type(error).__name__}; its log says why"}


_PRIVATE = (UsageError, ModelNotFoundError, CredentialsError)


def read_error(body: Any) -> FedSEAError:
    """The error that `write_error` wrote."""
    if not isinstance(body, dict):
        return ProtocolError("the worker's error cannot be read")
    return BY_CODE.get(str(body.get("code")), FedSEAError)(one_line(str(body.get("message"))))
