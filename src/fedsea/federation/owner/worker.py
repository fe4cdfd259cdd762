"""A data owner's worker, as the process that Flower starts for each message sees it.

Importing torch and loading a model takes seconds, so this is done once, by the worker (`worker_process.py`); a
ClientApp passes on what came to it. The two speak over a Unix socket in a folder that no other user may enter. Each
request is a connection of its own: JSON and safetensors there, the same back, sent as bytes; nothing is pickled.

This module imports neither torch nor transformers.
"""

import json
import os
import time
from collections.abc import Mapping
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

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
from fedsea.files import parse_json
from fedsea.text import one_line

if TYPE_CHECKING:  # a refused request needs no arrays
    from fedsea.federation.arrays import Arrays

WORKER = "FEDSEA_WORKER"  # the environment variable that names the worker's socket
FINISH = "finish"  # the request, and the query to a ClientApp, that ends the federation
MAX_TEXT, MAX_TENSORS = 16 << 20, 8 << 30  # bytes
CONNECT_SECONDS = 60.0  # a worker that died is started again meanwhile


class Worker(Protocol):
    """A data owner's part in a federation: `Participant`, or `WorkerClient` for one in another process."""

    def describe(self) -> dict[str, Any]: ...
    def train(self, body: dict[str, Any], weights: "Arrays") -> "tuple[dict[str, Any], Arrays]": ...
    def evaluate(self, body: dict[str, Any], weights: "Arrays") -> dict[str, Any]: ...
    def finish(self, body: dict[str, Any], weights: "Arrays") -> dict[str, Any]: ...


class WorkerClient:
    """Calls the worker at a socket; waits while it is busy, and up to `connect_seconds` while it is not there.

    Every request raises an error of the class that the worker raised, or ServerUnavailableError if there is no worker
    or it dies meanwhile.
    """

    def __init__(self, path: str | Path, connect_seconds: float = CONNECT_SECONDS) -> None:
        self.path, self.connect_seconds = Path(path), connect_seconds

    @classmethod
    def from_environment(cls) -> "WorkerClient | None":
        """The worker that the environment names; None if it names none."""
        path = os.environ.get(WORKER)
        return cls(path) if path else None

    def ping(self) -> dict[str, Any]:
        """What the worker is doing; answered at once, even while it trains."""
        return self.request("ping")[0]

    def describe(self) -> dict[str, Any]:
        return self.request("describe")[0]

    def train(self, body: dict[str, Any], weights: "Arrays") -> "tuple[dict[str, Any], Arrays]":
        from safetensors.numpy import load

        metrics, tensors = self.request("train", body, weights)
        return metrics, load(tensors)

    def evaluate(self, body: dict[str, Any], weights: "Arrays") -> dict[str, Any]:
        return self.request("evaluate", body, weights)[0]

    def finish(self, body: dict[str, Any], weights: "Arrays") -> dict[str, Any]:
        return self.request(FINISH, body, weights)[0]

    def request(
        self, what: str, body: dict[str, Any] | None = None, weights: "Arrays | None" = None
    ) -> tuple[dict[str, Any], bytes]:
        """Send a request and wait for its answer: a JSON object, and safetensors."""
        tensors = b""
        if weights is not None:
            from safetensors.numpy import save

            tensors = save(dict(weights))
        with self._connect() as connection:
            try:
                send(connection, {"do": what, "body": body or {}}, tensors)
                answer, content = receive(connection)
            except (OSError, EOFError):
                raise ServerUnavailableError(f"the worker at {self.path} went away before it answered") from None
        if "error" in answer:
            raise read_error(answer["error"])
        return answer.get("value", {}), content

    def _connect(self) -> Connection:
        end = time.monotonic() + self.connect_seconds
        while True:
            try:
                return Client(str(self.path), "AF_UNIX")
            except OSError as error:
                if time.monotonic() >= end:
                    raise ServerUnavailableError(
                        f"there is no worker at {self.path} ({error.strerror or error}): it runs while "
                        "`fedsea federation join` does"
                    ) from None
            time.sleep(0.05)


def send(connection: Connection, body: Mapping[str, Any], tensors: bytes = b"") -> None:
    """Send a request or an answer: a JSON object, and safetensors."""
    connection.send_bytes(json.dumps(body).encode())
    connection.send_bytes(tensors)


def receive(connection: Connection) -> tuple[dict[str, Any], bytes]:
    """Receive what `send` sent; ProtocolError if it is anything else.

    OSError or EOFError if the other side is gone, or sends more than `MAX_TEXT` or `MAX_TENSORS`.
    """
    text, tensors = connection.recv_bytes(MAX_TEXT), connection.recv_bytes(MAX_TENSORS)
    try:
        body = parse_json(text)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ProtocolError("what came between client app and worker cannot be read")
    return body, tensors


def write_error(error: Exception, *, to_owner: bool = False) -> dict[str, str]:
    """An error as JSON: its code and its one line.

    The coordinator reads what concerns it: of its round, the block server, the adapter. What is wrong with the data
    owner's files, data or options may quote them, and an unexpected error may quote anything: of these it reads the
    kind only, and their data owner (`to_owner`) reads all.
    """
    expected, name = isinstance(error, FedSEAError), type(error).__name__
    code = error.code if isinstance(error, FedSEAError) else FedSEAError.code
    if expected and (to_owner or isinstance(error, TermsError) or not isinstance(error, _PRIVATE)):
        return {"code": code, "message": str(error)}
    if to_owner:
        return {"code": code, "message": f"unexpected {name}: {' '.join(str(error).split())}"}
    return {"code": code, "message": f"the client failed with {name}; its log says why"}


_PRIVATE = (UsageError, ModelNotFoundError, CredentialsError)


def read_error(body: Any) -> FedSEAError:
    """The error that `write_error` wrote."""
    if not isinstance(body, dict):
        return ProtocolError("the worker's error cannot be read")
    return BY_CODE.get(str(body.get("code")), FedSEAError)(one_line(str(body.get("message"))))
