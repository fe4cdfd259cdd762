"""A data owner's side: a worker and a SuperNode, kept running until the federation is over or they are stopped."""

import contextlib
import json
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from fedsea.errors import CredentialsError, FedSEAError, UsageError
from fedsea.federation.flower.patches import require_flower
from fedsea.federation.invitation import SUPERNODE_KEY, Invitation
from fedsea.federation.owner.participant_options import ParticipantOptions
from fedsea.federation.owner.worker import FINISH, WORKER, read_error
from fedsea.federation.process import Supervised, flower_environment
from fedsea.federation.settings import Settings
from fedsea.process import Child
from fedsea.wire.address import parse_address, require_free
from fedsea.wire.credentials import Credentials

READY_SECONDS = 600.0  # a large model's files and data are read first
POLL_SECONDS = 0.5
YOUNG_SECONDS = 20.0  # a process that dies later does not count with those that died before
# After its SuperNode was killed, a data owner counts as connected for a while, and Flower admits no client twice.
LET_IN_SECONDS = 90.0
TRY_AGAIN_SECONDS = 3.0
QUIET_SECONDS = 10.0  # without a connection: then the reason is looked for
OWN_ENDS = "own-ends.safetensors"
LOOKS = "looks.db"
GOODBYE_SECONDS = 10.0  # a message takes Flower up to six
NOT_LET_IN = "[code: 2004] "
FIGURES = {
    "train-loss": "loss {:.4f}",
    "steps": "{} steps",
    "bytes-up": "{:.2f} MB up",
    "bytes-down": "{:.2f} MB down",
    "accuracy": "accuracy {:.3f}",
    "answer_loss": "answer loss {:.4f}",
}


class OwnerProcess:
    """A data owner in a federation; a context manager.

    Parameters
    ----------
    folder
        What the coordinator gave to this data owner: its name, credentials and addresses.
    options
        What the data owner decides itself.
    tell
        Gets one line about each thing that happens.
    privacy
        Local differential privacy of what the coordinator gets: `dp-clip`, `dp-epsilon`, `dp-delta`, as `Settings` has
        them. Without, what the coordinator asks for.

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
        self.name = self._checked_name()
        self._options = replace(
            options,
            name=self.name,
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
        # A Unix socket's path is short, and its folder is private.
        self._private = tempfile.TemporaryDirectory(prefix="fedsea-")
        self._socket = Path(self._private.name) / "worker"
        self._worker: Supervised | None = None
        self._node: Supervised | None = None
        self._connected = False
        self._shut_out: float | None = None  # since when
        self._why_told = False
        self.adapter: Path | None = None

    def _checked_name(self) -> str:
        credentials = Credentials.load(self._folder, "client")
        if credentials.name != self.invitation.client:
            raise CredentialsError(
                f"{self._folder} has the certificate of {credentials.name}, but is for {self.invitation.client}"
            )
        if (warning := credentials.ends_soon()) is not None:
            self._tell(warning)
        if not (self._folder / SUPERNODE_KEY).is_file():
            raise CredentialsError(f"{self._folder / SUPERNODE_KEY} is missing: ask for the folder again")
        return credentials.name

    def start(self) -> dict[str, Any]:
        """Start the worker, wait until it has read its data, then start the SuperNode.

        Returns what `Participant.describe` says; FedSEAError if the worker cannot work: the model, the task, the data.
        """
        self._worker = Supervised("worker", self._start_worker, self._tell, YOUNG_SECONDS)
        said = self._worker.child.says(READY_SECONDS) or {}
        if "error" in said:
            raise read_error(said["error"])
        if "ready" not in said:
            raise FedSEAError(f"the worker did not start: {self._worker.child.last_words()}")
        self._node = Supervised("supernode", self._start_node, self._tell, YOUNG_SECONDS)
        return dict(said["ready"])

    def watch(self, seconds: float | None = None) -> None:
        """Tell of each round; start again what dies; until the federation is over, an exception, or for some seconds.

        FedSEAError if a process dies again and again, or the coordinator does not let this data owner in.
        """
        end = None if seconds is None else time.monotonic() + seconds
        assert self._worker is not None
        assert self._node is not None
        while self.adapter is None and (end is None or time.monotonic() < end):
            while (said := self._worker.child.says(0.05)) is not None:
                self._hear_worker(said)
            while (said := self._node.child.says(0.05)) is not None:
                self._hear_node(said)
            self._worker.check()
            if not self._node.child.running:
                self._node_died(self._node)
            if not (self._connected or self._why_told) and time.monotonic() - self._node.began > QUIET_SECONDS:
                self._why_told = True
                self._tell(f"not connected yet: {why_no_connection(self.invitation.superlink, self._folder)}")
            time.sleep(POLL_SECONDS)

    def say_goodbye(self) -> None:
        """Once the federation is over: give the SuperNode time to tell the coordinator that the adapter has come."""
        end = time.monotonic() + GOODBYE_SECONDS
        while self._node is not None and self._node.child.running and time.monotonic() < end:
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Stop both processes."""
        for one in (self._node, self._worker):
            if one is not None:
                one.child.stop()
        self._private.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_what: object) -> None:
        self.close()

    def _start_worker(self) -> Child:
        threads = self._options.threads
        return Child(
            "fedsea.federation.owner.worker_process",
            [str(self._socket)],
            self._folder / "logs" / "worker.log",
            {} if threads is None else {"OMP_NUM_THREADS": str(threads)},
            json.dumps(self._options.to_body()),
        )

    def _start_node(self) -> Child:
        config = [f'name="{self.name}"', *(f"{key}={float(value)}" for key, value in self._privacy.items())]
        options = {
            "superlink": self.invitation.superlink,
            "root-certificates": self._folder / "authority.pem",
            "auth-supernode-private-key": self._folder / SUPERNODE_KEY,
            "port": require_free("127.0.0.1", 0, ""),
            "node-config": " ".join(config),
        }
        return Child(
            "fedsea.federation.flower.supernode",
            [word for name, value in options.items() for word in (f"--{name}", str(value))],
            self._folder / "logs" / "supernode.log",
            flower_environment(self._folder / "flower") | {WORKER: str(self._socket)},
        )

    def _hear_worker(self, said: dict[str, Any]) -> None:
        if "did" not in said:
            if "error" in said:  # it ends: what it needs is not there any more
                raise read_error(said["error"])
            return
        number = said.get("round")
        what = f"{said['did']}, round {number}" if number is not None else str(said["did"])
        if "error" in said:
            self._tell(f"{what}: {said['error'].get('message')}")
        elif said["did"] == FINISH:
            self.adapter = Path(self._options.output)
        else:
            self._tell(f"{what}: {_figures(said.get('metrics', {}))}{said.get('seconds', 0):.1f} s")

    def _hear_node(self, said: dict[str, Any]) -> None:
        if "connected" in said:
            self._connected, self._shut_out = True, None
            self._tell(f"connected to {self.invitation.superlink} as {self.name}; waiting for rounds")
        elif "refused" in said:
            self._tell(str(said["refused"]))

    def _node_died(self, node: Supervised) -> None:
        connected, self._connected, self._why_told = self._connected, False, False
        if node.child.last_line_with(NOT_LET_IN):
            self._wait_to_be_let_in()
        elif connected and node.child.exit_code == 0:
            self._tell("the connection to the coordinator is lost; connecting again")
        else:
            node.check()
            return
        node.child.kill()  # what it has left
        node.restart()

    def _wait_to_be_let_in(self) -> None:
        now = time.monotonic()
        if self._shut_out is None:
            self._shut_out = now
            self._tell("the coordinator does not let this client in (yet); trying again")
        if now - self._shut_out > LET_IN_SECONDS:
            raise FedSEAError(
                f"the coordinator at {self.invitation.superlink} does not let {self.name} in: its folder is of another "
                "federation or of an earlier start, or another process is connected with it; ask for the folder again"
            )
        time.sleep(TRY_AGAIN_SECONDS)


@contextlib.contextmanager
def kept_running(owners: Sequence[OwnerProcess]) -> Iterator[None]:
    """Watch started data owners, each in a thread, as `fedsea federation join` does in a process.

    At the end it raises the FedSEAError that has ended one of them.
    """
    over = threading.Event()

    def watch(owner: OwnerProcess) -> None:
        while not over.is_set() and owner.adapter is None:
            owner.watch(POLL_SECONDS)

    with ThreadPoolExecutor(len(owners)) as pool:
        watches = [pool.submit(watch, owner) for owner in owners]
        try:
            yield
        finally:
            over.set()
    for one in watches:
        one.result()


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
        return f"{superlink} does not answer ({error.strerror or error}); trying on until the coordinator is there"


def _figures(metrics: dict[str, Any]) -> str:
    shown = dict(metrics) | {key: metrics[key] / 1e6 for key in ("bytes-up", "bytes-down") if key in metrics}
    return "".join(f"{words.format(shown[name])}, " for name, words in FIGURES.items() if name in shown)
