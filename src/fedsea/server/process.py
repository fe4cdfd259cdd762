"""`fedsea serve` as a process that another one starts and stops: the demo's, the benches' and the tests' server."""

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from fedsea.errors import FedSEAError
from fedsea.process import Child
from fedsea.wire.credential_files import create_credentials

START_SECONDS = 600.0  # a large model is drawn or read first
STOP_SECONDS = 20.0


class ServerProcess:
    """`fedsea serve` in a process of its own, on a free loopback port, which ends with this one; a context manager.

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
        clients: tuple[str, ...] = ("client",),
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fedsea-server-")
        self.folder = Path(self._folder.name)
        self._client = self.folder / clients[0] if secure else None
        if secure:
            create_credentials(self.folder, clients=list(clients))
        security = f"--credentials={self.folder}" if secure else "--insecure"
        self._child = Child(
            "fedsea",
            ["serve", model, "--listen", "127.0.0.1:0", "--json", *options, security],
            self.folder / "server.log",
            {"OMP_NUM_THREADS": str(threads)},
        )

    @property
    def connection(self) -> dict[str, Any]:
        """What a client gives to `SplitModelForCausalLM.from_pretrained` to connect, as JSON values."""
        if self._client is None:
            return {"server": self.address, "insecure": True}
        return {"server": self.address, "credentials": str(self._client)}

    @property
    def address(self) -> str:
        """`HOST:PORT`; waits until the server is ready."""
        return str(self.ready["address"])

    @cached_property
    def ready(self) -> dict[str, Any]:
        """What `fedsea serve --json` says once it is ready; FedSEAError, with what it said, if it does not start."""
        ready = self._child.says(START_SECONDS)
        if ready is None or "address" not in ready:
            raise FedSEAError(f"the block server did not start: {self._child.last_words()}")
        return ready

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._child.pid

    def close(self) -> None:
        """Stop the server and remove its credentials. Safe to call twice."""
        self._child.stop(STOP_SECONDS)
        self._folder.cleanup()

    def kill(self) -> None:
        """Kill the server with -9, as a crash would, and wait until it is gone."""
        self._child.kill()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_what: object) -> None:
        self.close()
