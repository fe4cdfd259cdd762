"""A data owner's side: a warm worker and a SuperNode, kept running until they are told to stop."""

import contextlib
import json
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedsea.errors import CredentialsError, FedSEAError, UsageError
from fedsea.federation.coordinator.deployment import SUPERNODE_KEY, Invitation, require_flower, require_port
from fedsea.federation.owner.participant_options import ParticipantOptions
from fedsea.federation.owner.worker import FINISH, WORKER, read_error
from fedsea.federation.process import Child, flower_environment
from fedsea.federation.settings import Settings
from fedsea.wire.address import parse_address
from fedsea.wire.credentials import Credentials

READY_SECONDS = 600.0  # a large model's files and data are read first
LOOK_SECONDS = 0.5
PATIENCE = 3  # that so often in a row a process dies young
YOUNG_SECONDS = 20.0
# After its SuperNode was killed, a data owner counts as connected for a while, and Flower lets nobody in twice.
LET_IN_SECONDS = 90.0
TRY_AGAIN_SECONDS = 3.0
QUIET_SECONDS = 10.0  # without a connection: then the reason is looked for
OWN_ENDS = "own-ends.safetensors"
LOOKS = "looks.db"
GOODBYE_SECONDS = 10.0  # a message takes Flower up to six
NOT_LET_IN = "[code: 2004] "


class OwnerProcess:
    """A data owner in a federation; a context manager.

    Parameters
    ----------
    folder
        What the coordinator gave to this data owner.
    options
        What it decides itself. Its name and credentials are the folder's; a model or task that is empty is the
        federation's.
    privacy
        Local differential privacy of what the coordinator gets: `dp-clip`, `dp-epsilon`, `dp-delta`, as `Settings` has
        them. Without, what the coordinator asks for.
    tell
        Told one line about each thing that happens.

    Attributes
    ----------
    adapter
        The folder of the federation's adapter once the federation is over; None before.

    Raises
    ------
    FedSEAError
        If the folder cannot be used, or Flower is not installed.
    """

    def __init__(
        self,
        folder: Path,
        options: ParticipantOptions,
        tell: Callable[[str], None],
        privacy: Mapping[str, float] | None = None,
    ) -> None:
        require_flower()
        self._folder, self._tell = folder.expanduser().resolve(), tell
        self.invitation = Invitation.read(self._folder)
        credentials = Credentials.load(self._folder, "client")
        name = credentials.name
        if name != self.invitation.client:
            raise CredentialsError(f"{self._folder} has the certificate of {name}, but is for {self.invitation.client}")
        if (warning := credentials.ends_soon()) is not None:
            tell(warning)
        if not (self._folder / SUPERNODE_KEY).is_file():
            raise CredentialsError(f"{self._folder / SUPERNODE_KEY} is missing: ask for the folder again")
        self.name = name
        self._options = replace(
            options,
            name=name,
            model=options.model or self.invitation.model,
            task=options.task or self.invitation.task,
            servers=self.invitation.servers,
            credentials=str(self._folder),
            private_ends=str(self._folder / OWN_ENDS),
            looks=options.looks or str(self._folder / LOOKS),
            output=str(self._folder / "adapter"),
        )
        if not self._options.task:
            raise UsageError("the coordinator leaves the task open: give --task TASK")
        self._privacy = dict(privacy or {})
        if self._privacy:
            Settings.from_run_config(self._privacy)  # checks them
        try:
            (self._folder / "logs").mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to {self._folder}: {error.strerror}; copy it to where you can") from None
        # A Unix socket's path is short, and its folder nobody else's.
        self._private = tempfile.TemporaryDirectory(prefix="fedsea-")
        self._socket = Path(self._private.name) / "worker"
        self._worker: Child | None = None
        self._node: Child | None = None
        self._begun: dict[str, float] = {}
        self._deaths: dict[str, int] = {}
        self._connected = False
        self._shut_out: float | None = None  # since when
        self._looked = False
        self.adapter: Path | None = None

    def start(self) -> dict[str, Any]:
        """Start the worker and wait until it has read its data, then the SuperNode. Returns what the worker brings.

        Raises
        ------
        FedSEAError
            If the worker cannot work: the model, the task, the data.
        """
        self._worker = self._start_worker()
        ready = self._await_worker(self._worker)
        self._node = self._start_node()
        return ready

    def watch(self, seconds: float | None = None) -> None:
        """Tell of each round; start again what dies; until the federation is over, an exception, or for some seconds.

        Raises
        ------
        FedSEAError
            If a process dies again and again, or the coordinator does not let this data owner in.
        """
        end = None if seconds is None else time.monotonic() + seconds
        while self.adapter is None and (end is None or time.monotonic() < end):
            assert self._worker is not None
            assert self._node is not None
            while (said := self._worker.says(0.05)) is not None:
                self._tell_of(said)
            while (said := self._node.says(0.05)) is not None:
                self._hear_node(said)
            if not self._worker.running:
                self._died("worker", self._worker)
                self._worker = self._start_worker()
            if not self._node.running:
                self._node_died(self._node)
                self._node = self._start_node()
            if not self._connected and not self._looked and time.monotonic() - self._begun["supernode"] > QUIET_SECONDS:
                self._looked = True
                self._tell(f"not connected yet: {why_no_connection(self.invitation.superlink, self._folder)}")
            time.sleep(LOOK_SECONDS)

    def say_goodbye(self) -> None:
        """Once the federation is over: give the SuperNode time to tell the coordinator that the adapter has come."""
        end = time.monotonic() + GOODBYE_SECONDS
        while self._node is not None and self._node.running and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)

    def close(self) -> None:
        """Stop both processes."""
        for child in (self._node, self._worker):
            if child is not None:
                child.stop()
        self._private.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def _start_worker(self) -> Child:
        threads = self._options.threads
        return self._start(
            "worker",
            "fedsea.federation.owner.worker_process",
            [str(self._socket)],
            {} if threads is None else {"OMP_NUM_THREADS": str(threads)},
            stdin=json.dumps(self._options.to_body()),
        )

    def _start_node(self) -> Child:
        port = require_port("127.0.0.1", 0, "")
        arguments = [
            "--superlink",
            self.invitation.superlink,
            "--root-certificates",
            str(self._folder / "authority.pem"),
        ]
        arguments += ["--auth-supernode-private-key", str(self._folder / SUPERNODE_KEY), "--port", str(port)]
        config = [f'name="{self.name}"', *(f"{key}={float(value)}" for key, value in self._privacy.items())]
        arguments += ["--node-config", " ".join(config)]
        environment = flower_environment(self._folder / "flower") | {WORKER: str(self._socket)}
        return self._start("supernode", "fedsea.federation.flower.supernode", arguments, environment)

    def _start(
        self, name: str, module: str, arguments: list[str], environment: dict[str, str], stdin: str | None = None
    ) -> Child:
        self._begun[name] = time.monotonic()
        return Child(module, arguments, self._folder / "logs" / f"{name}.log", environment, stdin)

    def _await_worker(self, worker: Child) -> dict[str, Any]:
        said = worker.says(READY_SECONDS) or {}
        if "error" in said:
            raise read_error(said["error"])
        if "ready" not in said:
            raise FedSEAError(f"the worker did not start: {worker.last_words()}")
        return dict(said["ready"])

    def _hear_node(self, said: dict[str, Any]) -> None:
        if "connected" in said:
            self._connected, self._shut_out = True, None
            self._tell(f"connected to {self.invitation.superlink} as {self.name}; waiting for rounds")
        elif "refused" in said:
            self._tell(str(said["refused"]))

    def _node_died(self, node: Child) -> None:
        connected, self._connected, self._looked = self._connected, False, False
        if not node.last_line_with(NOT_LET_IN):
            if connected and node.exit_code == 0:
                node.kill()  # what it has left
                self._tell("the connection to the coordinator is lost; connecting again")
            else:
                self._died("supernode", node)
            return
        node.kill()
        now = time.monotonic()
        if self._shut_out is None:
            self._shut_out = now
            self._tell("the coordinator does not let this client in (yet); trying again")
        if now - self._shut_out > LET_IN_SECONDS:
            raise FedSEAError(
                f"the coordinator at {self.invitation.superlink} does not let {self.name} in: its folder is of another "
                "federation or of an earlier start, or somebody else is connected with it; ask for the folder again"
            )
        time.sleep(TRY_AGAIN_SECONDS)

    def _died(self, name: str, child: Child) -> None:
        end = child.end()
        child.kill()  # its group
        if "error" in (said := self._last_of(child)):
            raise read_error(said["error"])
        young = time.monotonic() - self._begun[name] < YOUNG_SECONDS
        self._deaths[name] = self._deaths.get(name, 0) + 1 if young else 1
        if self._deaths[name] > PATIENCE:
            raise FedSEAError(f"the {name} died {self._deaths[name]} times in a row: {end}; see {child.log}")
        self._tell(f"the {name} died ({end}); starting it again")

    @staticmethod
    def _last_of(child: Child) -> dict[str, Any]:
        last: dict[str, Any] = {}
        while (said := child.says(0)) is not None:
            last = said
        return last

    def _tell_of(self, said: dict[str, Any]) -> None:
        if "did" not in said:
            return
        number = said.get("round")
        what = f"{said['did']}, round {number}" if number is not None else str(said["did"])
        if "error" in said:
            self._tell(f"{what}: {said['error'].get('message')}")
            return
        if said["did"] == FINISH:
            self.adapter = Path(self._options.output)
            return
        self._tell(f"{what}: {_figures(said.get('metrics', {}))}{said.get('seconds', 0):.1f} s")


@contextlib.contextmanager
def kept_running(members: Sequence[OwnerProcess]) -> Iterator[None]:
    """Watch started members, each in a thread, as `fedsea federation join` does in a process.

    Raises
    ------
    FedSEAError
        At the end: what has ended one of them.
    """
    over, ended = threading.Event(), list[BaseException]()

    def watch(member: OwnerProcess) -> None:
        try:
            while not over.is_set() and member.adapter is None:
                member.watch(LOOK_SECONDS)
        except FedSEAError as error:
            ended.append(error)

    threads = [threading.Thread(target=watch, args=(member,), daemon=True) for member in members]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if ended:
        raise ended[0]


def why_no_connection(superlink: str, folder: Path) -> str:
    """What keeps a SuperNode from its SuperLink, in words."""
    host, port = parse_address(superlink)
    context = ssl.create_default_context(cafile=str(folder / "authority.pem"))
    try:
        with (
            socket.create_connection((host, port), timeout=QUIET_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return f"{superlink} answers, but not as a SuperLink that is ready; trying on"
    except ssl.SSLCertVerificationError as error:
        return f"{superlink} shows a certificate that is not this federation's ({error.verify_message}); trying on"
    except ssl.SSLError as error:
        return f"{superlink} does not speak TLS as it should ({error.reason}); trying on"
    except OSError as error:
        return f"nobody answers at {superlink} ({error.strerror or error}); trying on until the coordinator is there"


def _figures(metrics: dict[str, Any]) -> str:
    known: dict[str, Callable[[Any], str]] = {
        "train-loss": lambda value: f"loss {value:.4f}",
        "steps": lambda value: f"{value} steps",
        "bytes-up": lambda value: f"{value / 1e6:.2f} MB up",
        "bytes-down": lambda value: f"{value / 1e6:.2f} MB down",
        "accuracy": lambda value: f"accuracy {value:.3f}",
        "answer_loss": lambda value: f"answer loss {value:.4f}",
    }
    return "".join(f"{word(metrics[name])}, " for name, word in known.items() if name in metrics)
