"""The worker: a process that keeps a data owner's model and data, and does what its ClientApps request, in turn.

The main thread computes; a thread accepts, and one for each connection reads the request and waits for its outcome. A
request whose ClientApp has died is dropped: before it begins, at its next step, or when it is done.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

from fedsea.errors import FedSEAError, ProtocolError, UsageError
from fedsea.federation.owner.worker import Worker, receive, send, write_error
from fedsea.files import write_json
from fedsea.process import put_on_leash
from fedsea.threads import let_idle_threads_sleep

log = logging.getLogger("fedsea.federation")
SILENT_SECONDS = 30  # without a byte from a ClientApp that is to send its request
POLL_SECONDS = 0.2  # between two checks whether a ClientApp is still there
STATUS_SECONDS = 0.5  # between two writings of the status file


class LocalWorker(Worker, Protocol):
    """A worker in this process: `Participant`."""

    on_step: Callable[[int, float], None] | None

    def close(self) -> None: ...


class AbandonedError(FedSEAError):
    """The ClientApp that requested this is gone."""

    code = "abandoned"


@dataclass
class Request:
    """One thing to do, and its outcome."""

    do: str
    body: dict[str, Any]
    tensors: bytes
    abandoned: bool = False
    answer: dict[str, Any] = field(default_factory=dict)
    answer_tensors: bytes = b""
    done: threading.Event = field(default_factory=threading.Event)


class WorkerServer:
    """Serves requests at a socket, one at a time; `status.json` beside it says what is going on.

    The socket's folder must be its owner's alone, and have no other worker: else UsageError. `tell` gets a JSON object
    for each request that is done.
    """

    def __init__(self, path: Path, tell: Callable[[dict[str, Any]], None]) -> None:
        self.path, self._tell, self.stopping = path, tell, False
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._request: Request | None = None
        self._listener = _listen(path)
        self._is("starting")
        threading.Thread(target=self._accept, daemon=True).start()

    def serve(self, worker: LocalWorker) -> None:
        """Do what comes, until the process has to end: an exception of a signal handler, and `stopping`."""
        worker.on_step = self._on_step
        self._is("idle")
        # An exception that comes within a destructor is swallowed by Python; then this flag ends the worker.
        while not self.stopping:
            self._next(worker)

    def _next(self, worker: LocalWorker) -> None:
        # A method of its own, so that nothing holds a request's tensors while the next one is waited for.
        try:
            request = self._request = self._requests.get(timeout=POLL_SECONDS)
        except queue.Empty:
            return
        if not request.abandoned:
            self._do(worker, request)
        request.done.set()
        self._request = None

    def close(self) -> None:
        """Take the socket away."""
        with contextlib.suppress(FileNotFoundError):
            self._listener.close()
        self._status_file.unlink(missing_ok=True)

    def _do(self, worker: LocalWorker, request: Request) -> None:
        begun = time.monotonic()
        self._is(request.do, round=request.body.get("round"))
        told: dict[str, Any] = {"did": request.do, "round": request.body.get("round")}
        try:
            value = self._result(worker, request)
            request.answer, told["metrics"] = {"value": value}, value
        except Exception as error:
            if isinstance(error, FedSEAError):
                log.warning("a request failed: %s: %s", request.do, error)
            else:
                log.exception("a request failed: %s", request.do)
            request.answer, told["error"] = {"error": write_error(error)}, write_error(error, to_owner=True)
        self._is("idle")
        if request.do != "describe":
            self._tell(told | {"seconds": round(time.monotonic() - begun, 2)})

    def _result(self, worker: LocalWorker, request: Request) -> dict[str, Any]:
        from safetensors import SafetensorError
        from safetensors.numpy import load, save

        try:
            weights = load(request.tensors) if request.tensors else {}
        except SafetensorError:
            raise ProtocolError("the adapter that came to the worker cannot be read") from None
        match request.do:
            case "describe":
                return worker.describe()
            case "train":
                metrics, trained = worker.train(request.body, weights)
                request.answer_tensors = save(dict(trained))
                return metrics
            case "evaluate":
                return worker.evaluate(request.body, weights)
            case "finish":
                return worker.finish(request.body, weights)
        raise ProtocolError(f"a worker cannot {request.do!r}")

    def _on_step(self, step: int, loss: float) -> None:
        if self.stopping:
            sys.exit(0)
        if self._request is not None and self._request.abandoned:
            raise AbandonedError("the client app that requested this training is gone")
        self._status |= {"step": step, "loss": loss}
        if time.monotonic() - self._status_written >= STATUS_SECONDS:
            self._show()

    def _is(self, state: str, **more: Any) -> None:
        self._status: dict[str, Any] = {"pid": os.getpid(), "state": state, "since": time.time()} | more
        self._show()

    @property
    def _status_file(self) -> Path:
        return self.path.with_name("status.json")

    def _show(self) -> None:
        self._status_written = time.monotonic()
        with contextlib.suppress(UsageError):  # a full disk must not end a training
            write_json(self._status_file, self._status)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                threading.Thread(target=self._answer, args=(self._listener.accept(),), daemon=True).start()

    def _answer(self, connection: Connection) -> None:
        with connection, contextlib.suppress(OSError):
            if not _same_user(connection):
                return
            try:
                body, tensors = receive(connection)
            except EOFError:
                return
            except (OSError, ProtocolError):
                send(connection, {"error": write_error(ProtocolError("the request cannot be read"))})
                return
            if body.get("do") == "ping":
                send(connection, {"value": self._status})
                return
            given = body.get("body")
            request = Request(str(body.get("do")), given if isinstance(given, dict) else {}, tensors)
            self._requests.put(request)
            while not request.done.wait(POLL_SECONDS):
                if connection.poll():  # a peer that waits for its answer sends nothing: this is its end
                    request.abandoned = True
                    return
            send(connection, request.answer, request.answer_tensors)


def _listen(path: Path) -> Listener:
    if stat.S_IMODE(path.parent.stat().st_mode) & 0o077:
        raise UsageError(
            f"other users of this machine can enter {path.parent}: run `chmod 700 {quote(str(path.parent))}`"
        )
    with contextlib.suppress(OSError), Client(str(path), "AF_UNIX"):
        raise UsageError(f"there is a worker at {path} already")
    path.unlink(missing_ok=True)  # of a worker that was killed
    listener = Listener(str(path), "AF_UNIX", backlog=16)
    path.chmod(0o600)
    return listener


def _same_user(connection: Connection) -> bool:
    """Whether the peer is of this user, where the system says so. One that is silent for long is not waited for."""
    with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", SILENT_SECONDS, 0))
        option = getattr(socket, "SO_PEERCRED", None)
        if option is None:
            return True
        _pid, user, _group = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i")))
    return bool(user == os.getuid())


def run_worker(path: Path, make: Callable[[], LocalWorker]) -> int:
    """Be a worker until SIGTERM: make it, say `{"ready": …}` on standard output, serve; returns the exit code.

    Standard output has one JSON object a line and nothing else: what libraries print goes to standard error. What
    keeps the worker from being made is said as `{"error": …}`.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(body: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the process that reads it is gone, and this one soon
            print(json.dumps(body), file=out, flush=True)

    server: WorkerServer | None = None
    worker: LocalWorker | None = None

    def stop(_number: int, _frame: object) -> None:
        if server is not None:
            server.stopping = True
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    try:
        server = WorkerServer(path, tell)
        worker = make()
        tell({"ready": worker.describe()})
        server.serve(worker)
    except FedSEAError as error:
        tell({"error": write_error(error, to_owner=True)})
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        for one in (worker, server):
            if one is not None:
                one.close()
    return 0


def _participant(options: dict[str, Any]) -> LocalWorker:
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
