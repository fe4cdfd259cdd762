"""`fedsea serve` as a process that another one starts and stops: the demo's, the benches' and the tests' server."""

import contextlib
import json
import queue
import signal
import subprocess
import tempfile
import threading
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from fedsea.errors import FedSEAError
from fedsea.process import child_environment, module_command
from fedsea.wire.credentials import create_credentials

START_SECONDS = 600.0  # a large model is drawn or read first
STOP_SECONDS = 20.0


class ServerProcess:
    """`fedsea serve` in a process of its own, on a free loopback port; a context manager.

    Constructing it starts the process; who asks for the address waits until it serves.

    Parameters
    ----------
    model
        Name of the model; the server holds all its layers.
    threads
        Its OpenMP threads.
    secure
        Mutual TLS, with credentials made for this server alone; else plaintext.
    options
        Further options of `fedsea serve`.
    clients
        Names of the clients that get certificates, the first of them for `connection`.

    Attributes
    ----------
    folder
        With TLS: the folder of all credentials.
    """

    def __init__(
        self,
        model: str,
        *,
        threads: int,
        secure: bool = True,
        options: tuple[str, ...] = (),
        clients: tuple[str, ...] = ("bench",),
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fedsea-server-")
        self.folder = Path(self._folder.name)
        self._client: Path | None = None
        security = "--insecure"
        # On a leash: a caller that is killed leaves no server behind.
        command = module_command("fedsea", "serve", model, "--listen", "127.0.0.1:0", "--json", *options, leash=True)
        if secure:
            create_credentials(self.folder, clients=list(clients))
            self._client = self.folder / clients[0]
            security = f"--credentials={self._folder.name}"
        self._log = Path(self._folder.name) / "server.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, security],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=child_environment({"OMP_NUM_THREADS": str(threads)}),
                start_new_session=True,  # an interrupt typed at the terminal is for the caller, who then stops it
            )

    @property
    def connection(self) -> dict[str, Any]:
        """What a client gives to `SplitModelForCausalLM.from_pretrained` to connect, as JSON values."""
        if self._client is None:
            return {"server": self.address, "insecure": True}
        return {"server": self.address, "credentials": str(self._client)}

    @property
    def address(self) -> str:
        """`HOST:PORT`, once the server is ready."""
        return str(self.ready["address"])

    @cached_property
    def ready(self) -> dict[str, Any]:
        """What `fedsea serve --json` says once it is ready: address, layers, bytes of weights and so on.

        Raises
        ------
        FedSEAError
            If the server does not start; the message has what it said.
        """
        assert self._process.stdout is not None
        for line in _lines_within(self._process.stdout, START_SECONDS):
            with contextlib.suppress(ValueError):
                ready = json.loads(line)
                if isinstance(ready, dict) and "address" in ready:
                    return ready
        said = self._log.read_text(errors="replace").strip()[-2000:]
        raise FedSEAError(f"the block server did not start: {said or 'it said nothing'}")

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def close(self) -> None:
        """Stop the server and remove its credentials. Safe to call twice."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._folder.cleanup()

    def kill(self) -> None:
        """Kill the server with -9, as a crash would, and wait until it is gone."""
        self._process.kill()
        self._process.wait()
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


def _lines_within(stream: IO[str], seconds: float) -> list[str]:
    """The stream's first line that is a JSON object, or nothing if it ends or the time is up."""
    first: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

    def read() -> None:
        first.put([line] if (line := next((text for text in stream if text.startswith("{")), "")) else [])

    threading.Thread(target=read, daemon=True).start()
    try:
        return first.get(timeout=seconds)
    except queue.Empty:
        return []
