"""The coordinator's side on one machine: block server, SuperLink, credentials for all, and the run."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any, Self

from fedsea.errors import FedSEAError, ServerUnavailableError
from fedsea.federation.coordinator.control import Control, FlowerRun
from fedsea.federation.coordinator.deployment import Deployment
from fedsea.federation.coordinator.status import app_is_gone
from fedsea.federation.coordinator.up_options import UpOptions
from fedsea.federation.flower.patches import require_flower
from fedsea.federation.invitation import Invitation, check_name
from fedsea.federation.process import Supervised, flower_environment
from fedsea.federation.settings import Settings
from fedsea.files import write_json
from fedsea.process import Child
from fedsea.wire.address import format_address, require_free

START_SECONDS = 600.0  # a large model is read first
SUPERLINK_SECONDS = 60.0
GONE_SECONDS = 3.0
POLL_SECONDS = 0.5


class Federation:
    """A federation whose servers run on this machine; a context manager, that stops them all.

    Parameters
    ----------
    path
        Its folder; made if it is not there, taken up if it is.
    settings
        What is trained and how. Where its servers, credentials and output are is set here.
    options
        Where the servers run and who may take part.
    tell
        Gets one line about each thing that happens.
    server_options
        Further options of `fedsea serve`.

    Raises
    ------
    FedSEAError
        If something of it cannot be done: a port is taken, Flower is not installed.
    """

    control: Control  # once it is started
    _superlink: Child

    def __init__(
        self,
        path: Path,
        settings: Settings,
        options: UpOptions,
        tell: Callable[[str], None],
        server_options: tuple[str, ...] = (),
    ) -> None:
        require_flower()
        check_name(settings.name)
        self.deployment, self._tell = Deployment(path.expanduser().resolve()), tell
        self._server_options = server_options
        self._running = ExitStack()
        self._block_server: Supervised | None = None
        self._there: set[str] = set()
        port = 0 if options.servers else require_free(options.listen, options.port, "--port")
        superlink_port = require_free(options.listen, options.superlink_port, "--superlink-port")
        # Written down with their ports: the data owners' folders name them, and must be right when it goes on.
        self.options = replace(options, port=port, superlink_port=superlink_port)
        self._block_listen = format_address(options.listen, port)
        self.superlink = format_address(options.host, superlink_port)
        self._chosen = settings
        self.settings = replace(
            settings,
            wait_seconds=0.0,  # data owners come when they come, and `tell` says who is there
            servers=",".join(options.servers or (format_address(options.host, port),)),
            credentials=str(self.deployment.coordinator),
            insecure=False,
            output=str(self.deployment.output),
        )

    def start(self) -> None:
        """Start the servers, and write the data owners' folders; FedSEAError if a server fails, with its words."""
        here, settings, options = self.deployment, self.settings, self.options
        here.prepare(options.certified, options.clients)
        self._running.callback(here.online.unlink, missing_ok=True)
        if not options.servers:
            self._block_server = server = Supervised("block server", self._start_block_server, self._tell)
            self._running.callback(lambda: server.child.stop())  # of the last one that was started
        self._superlink = self._running.enter_context(self._start_superlink())
        for client in options.clients:
            names = settings.name, client, settings.model, settings.task
            Invitation(*names, self.superlink, settings.addresses).write(here.client(client))
        if self._block_server is not None:
            self._tell(f"loading {settings.model} for the block server at {self._block_listen}")
            if self._block_server.child.says(START_SECONDS) is None:
                raise FedSEAError(f"the block server did not start: {self._block_server.child.last_words()}")
        self.control = Control(format_address(options.local, options.superlink_port), here.authority)
        self._running.callback(self.control.close)
        self._await_superlink()
        for client in options.clients:
            self.control.register(client, here.public_key(client))
        here.describe(
            name=settings.name,
            model=settings.model,
            mode=settings.mode,
            rounds=settings.rounds,
            clients=list(options.clients),
            superlink=self.superlink,
            servers=list(settings.addresses),
            settings=run_config(self._chosen),
            options=vars(options),
        )

    def commands(self) -> dict[str, str]:
        """For each client the command that its data owner runs."""
        task, folder = self.settings.task or "TASK", self.deployment.client
        return {
            name: f"fedsea federation join {quote(str(folder(name)))} --task {quote(task)} --data PATH"
            for name in self.options.clients
        }

    def online(self) -> list[str]:
        """Names of the clients whose SuperNodes are there."""
        return [node.name for node in self.control.nodes() if node.online and node.name in self.options.clients]

    def run(self, on_look: Callable[[], None] | None = None) -> FlowerRun:
        """Start the run and wait for its end; FedSEAError if it fails, or a server dies.

        `on_look` is called twice a second. The run itself waits for the clients: what is wrong with the settings shows
        at once, not when all are there.
        """
        began, gone = time.time(), 0
        # A coordinator's app gets numbers of nodes from Flower; their keys are known here.
        keys = {self.deployment.public_key(client): client for client in self.options.clients}
        members = [f"{keys[node.public_key]}={node.number}" for node in self.control.nodes() if node.public_key in keys]
        # The public name of this machine may not lead here from here: it is reached as it is listened on.
        dial = "" if self.options.servers else format_address(self.options.local, self.options.port)
        number = self.control.start(run_config(replace(self.settings, members=", ".join(members), dial=dial)))
        try:
            while True:
                self.check()
                self._tell_of_clients()
                state = self.control.run(number)
                if on_look is not None:
                    on_look()
                if state.status == "finished":
                    break
                # Flower itself notices after a minute. One that ends by itself may take a moment to be reported.
                gone = gone + 1 if app_is_gone(self.deployment.output, began) else 0
                if gone * POLL_SECONDS > GONE_SECONDS:
                    self.control.stop(number)
                    raise FedSEAError("the coordinator's app has died; the same command goes on after the last round")
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            self.control.stop(number)
            raise
        if state.outcome != "completed":
            why = state.details.removeprefix("ServerApp failed with exception: ") or f"see {self._superlink.log}"
            raise FedSEAError(f"the federation has ended early ({state.outcome}): {why}")
        return state

    def check(self) -> None:
        """Start the block server again if it has died, as it holds nothing for long.

        FedSEAError if it dies again and again, or the SuperLink has ended.
        """
        if not self._superlink.running:
            raise FedSEAError(
                f"Flower's SuperLink has ended ({self._superlink.end()}); the same command goes on after the last round"
            )
        if self._block_server is not None:
            self._block_server.check()

    def close(self) -> None:
        """Stop the servers, and all that they have started."""
        self._running.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_what: object) -> None:
        self.close()

    def _tell_of_clients(self) -> None:
        for name in sorted(set(self.online()) ^ self._there):
            self._there ^= {name}
            what = "there" if name in self._there else "gone"
            self._tell(f"{name} is {what}: {len(self._there)} of {len(self.options.clients)} clients")
            write_json(self.deployment.online, {"clients": sorted(self._there)})

    def _start_block_server(self) -> Child:
        credentials = ("--credentials", str(self.deployment.credentials))
        arguments = ("--listen", self._block_listen, "--json", *self._server_options, *credentials)
        return Child("fedsea", ("serve", self.settings.model, *arguments), self.deployment.logs / "block-server.log")

    def _start_superlink(self) -> Child:
        certificate = self.deployment.credentials / "server"
        options = {
            "host": self.options.listen,
            "port": self.options.superlink_port,
            "ssl-certfile": certificate / "certificate.pem",
            "ssl-keyfile": certificate / "key.pem",
            "ssl-ca-certfile": self.deployment.authority,
        }
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        arguments += ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        log, environment = self.deployment.logs / "superlink.log", flower_environment(self.deployment.flower)
        return Child("fedsea.federation.flower.superlink", arguments, log, environment)

    def _await_superlink(self) -> None:
        end = time.monotonic() + SUPERLINK_SECONDS
        while True:
            try:
                self.control.nodes()
                return
            except ServerUnavailableError as error:
                if not self._superlink.running or time.monotonic() >= end:
                    words = self._superlink.last_words()
                    raise FedSEAError(f"Flower's SuperLink did not start: {words} ({error})") from None
            time.sleep(0.1)


def run_config(settings: Settings) -> dict[str, Any]:
    """Settings as Flower's run configuration: those that are not the defaults."""
    return {name.replace("_", "-"): value for name, value in vars(settings).items() if value != getattr(Settings, name)}
