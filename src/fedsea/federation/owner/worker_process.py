"""The worker: a process that holds one data owner's half, warm, and does what its ClientApps ask for, in turn.

The main thread computes; a thread accepts, and one for each connection reads the request and waits for its outcome. A
request whose ClientApp has died is dropped: before it begins, or at its next step, or when it is done.
"""

import contextlib
import json
import logging
import os
import queue
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from fedsea.errors import FedSEAError, ProtocolError, UsageError
from fedsea.federation.owner.worker import FINISH, receive_frame, send_frame, write_error
from fedsea.files import write_json
from fedsea.process import put_on_leash
from fedsea.threads import let_idle_threads_sleep

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("fedsea.federation")
FRAME_SECONDS = 30.0  # without a byte from a ClientApp that is to send its request
LOOK_SECONDS = 0.2  # between two looks whether a ClientApp is still there
STATUS_SECONDS = 0.5  # between two writings of the status file


class Worker(Protocol):
    """What the worker holds: `Participant`."""

    on_step: Callable[[int, float], None] | None

    def describe(self) -> dict[str, Any]:
        """What this data owner brings."""

    def train(self, body: dict[str, Any], weights: "dict[str, Tensor]") -> "tuple[dict[str, Any], dict[str, Tensor]]":
        """Take part in a round."""

    def evaluate(self, body: dict[str, Any], weights: "dict[str, Tensor]") -> dict[str, Any]:
        """Evaluate an adapter."""

    def finish(self, body: dict[str, Any], weights: "dict[str, Tensor]") -> dict[str, Any]:
        """Keep the federation's adapter."""

    def close(self) -> None:
        """Leave the block server."""


class AbandonedError(FedSEAError):
    """The ClientApp that asked for this is gone."""

    code = "abandoned"


@dataclass
class Request:
    """One thing to do, and what became of it."""

    do: str
    body: dict[str, Any]
    tensors: bytes
    abandoned: bool = False
    answer: dict[str, Any] = field(default_factory=dict)
    answer_tensors: bytes = b""
    done: threading.Event = field(default_factory=threading.Event)


class WorkerServer:
    """Serves requests at a socket, one at a time.

    Parameters
    ----------
    path
        The socket to make, in a folder that is its owner's alone. A file `status.json` beside it says what is going on.
    tell
        Is told, as JSON values, of each request that is done.

    Raises
    ------
    UsageError
        If others may enter the folder, or there is a worker at the socket.
    """

    def __init__(self, path: Path, tell: Callable[[dict[str, Any]], None]) -> None:
        self.path = path
        self.stopping = False
        self._tell = tell
        self._status: dict[str, Any] = {"pid": os.getpid(), "state": "starting", "since": time.time()}
        self._status_written = 0.0
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._request: Request | None = None
        self._listener = _listen(path)
        threading.Thread(target=self._accept, daemon=True).start()
        self._show()

    def serve(self, half: Worker) -> None:
        """Do what comes, until the process is told to end: an exception of a signal handler, and `stopping`."""
        half.on_step = self._on_step
        self._is("idle")
        # An exception that comes within a destructor is swallowed by Python; then this flag ends the worker.
        while not self.stopping:
            self._next(half)

    def _next(self, half: Worker) -> None:
        # A method of its own, so that nothing holds a request's tensors while the next one is waited for.
        try:
            request = self._request = self._requests.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            return
        if not request.abandoned:
            self._do(half, request)
        request.done.set()
        self._request = None

    def close(self) -> None:
        """Take the socket away."""
        self._listener.close()
        for path in (self.path, self._status_file):
            path.unlink(missing_ok=True)

    def _do(self, half: Worker, request: Request) -> None:
        begun = time.monotonic()
        self._is(request.do, round=request.body.get("round"))
        told: dict[str, Any] = {"did": request.do, "round": request.body.get("round")}
        try:
            value = self._result(half, request)
            request.answer = {"value": value}
            told |= {"metrics": value} if request.do != "describe" else {}
        except Exception as error:
            if isinstance(error, FedSEAError):
                log.warning("a request failed: %s: %s", request.do, error)
            else:
                log.exception("a request failed: %s", request.do)
            request.answer = {"error": write_error(error)}
            told["error"] = write_error(error, to_owner=True)
        self._is("idle")
        if request.do != "describe":
            self._tell(told | {"seconds": round(time.monotonic() - begun, 2)})

    def _result(self, half: Worker, request: Request) -> dict[str, Any]:
        if request.do == "describe":
            return half.describe()
        if request.do not in ("train", "evaluate", FINISH):
            raise ProtocolError(f"a worker cannot {request.do!r}")
        from safetensors import SafetensorError
        from safetensors.torch import load, save

        try:
            weights = load(request.tensors) if request.tensors else {}
        except SafetensorError:
            raise ProtocolError("the adapter that came to the worker cannot be read") from None
        if request.do == "evaluate":
            return half.evaluate(request.body, weights)
        if request.do == FINISH:
            return half.finish(request.body, weights)
        metrics, trained = half.train(request.body, weights)
        request.answer_tensors = save({name: tensor.contiguous() for name, tensor in trained.items()})
        return metrics

    def _on_step(self, step: int, loss: float) -> None:
        if self.stopping:
            sys.exit(0)
        if self._request is not None and self._request.abandoned:
            raise AbandonedError("the client app that asked for this training is gone")
        self._status |= {"step": step, "loss": loss}
        if time.monotonic() - self._status_written >= STATUS_SECONDS:
            self._show()

    def _is(self, state: str, **more: Any) -> None:
        self._status = {"pid": os.getpid(), "state": state, "since": time.time()} | more
        self._show()

    @property
    def _status_file(self) -> Path:
        return self.path.with_name("status.json")

    def _show(self) -> None:
        self._status_written = time.monotonic()
        with contextlib.suppress(UsageError):  # for whoever looks; a full disk must not end a training
            write_json(self._status_file, self._status)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            if not _same_user(connection):
                return
            connection.settimeout(FRAME_SECONDS)
            try:
                received = receive_frame(connection)
            except ProtocolError as error:
                send_frame(connection, {"error": write_error(error)})
                return
            if received is None:
                return
            body, tensors = received
            if body.get("do") == "ping":
                send_frame(connection, {"value": self._status})
                return
            given = body.get("body")
            request = Request(str(body.get("do")), given if isinstance(given, dict) else {}, tensors)
            self._requests.put(request)
            while not request.done.wait(LOOK_SECONDS):
                # A peer that waits for its answer sends nothing: what can be read is its end.
                if select.select([connection], [], [], 0)[0]:
                    request.abandoned = True
                    return
            connection.settimeout(None)
            send_frame(connection, request.answer, request.answer_tensors)


def _listen(path: Path) -> socket.socket:
    mode = path.parent.stat().st_mode
    if stat.S_IMODE(mode) & 0o077:
        raise UsageError(
            f"other users of this machine can enter {path.parent}: run `chmod 700 {quote(str(path.parent))}`"
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
        probe.connect(str(path))
        listener.close()
        raise UsageError(f"there is a worker at {path} already")
    path.unlink(missing_ok=True)  # of a worker that was killed
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(16)
    return listener


def _same_user(connection: socket.socket) -> bool:
    """Whether the peer is of this user, where the system says so."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return True
    _pid, user, _group = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i")))
    return bool(user == os.getuid())


def run_worker(path: Path, make: Callable[[], Worker]) -> int:
    """Be a worker until SIGTERM: make the half, say `{"ready": …}` on standard output, serve.

    Standard output has one JSON object a line, and nothing else: what the half prints goes to standard error. Returns
    the exit code; what keeps the half from being made is told as `{"error": …}`.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(body: dict[str, Any]) -> None:
        # Whoever read this is gone: then so is this process, soon.
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(body), file=out, flush=True)

    worker: WorkerServer | None = None
    half: Worker | None = None

    def stop(_number: int, _frame: FrameType | None) -> None:
        if worker is not None:
            worker.stopping = True
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    try:
        worker = WorkerServer(path, tell)
        half = make()
        tell({"ready": half.describe()})
        worker.serve(half)
    except FedSEAError as error:
        tell({"error": write_error(error, to_owner=True)})
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if half is not None:
            half.close()
        if worker is not None:
            worker.close()
    return 0


def _participant(options: dict[str, Any]) -> Worker:
    from fedsea.federation.owner.participant import Participant
    from fedsea.federation.owner.participant_options import ParticipantOptions

    return Participant(ParticipantOptions.from_body(options))


def read_line(descriptor: int) -> bytes:
    """One line, and not a byte of what follows it."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(descriptor, 1)):
        line += byte
    return line


def main() -> int:
    """`python -m fedsea.federation.owner.worker_process SOCKET`; standard input has the options as JSON."""
    let_idle_threads_sleep()
    options = json.loads(read_line(0))
    put_on_leash()
    return run_worker(Path(sys.argv[1]), lambda: _participant(options))


if __name__ == "__main__":
    sys.exit(main())
