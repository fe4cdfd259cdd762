"""Flower's simulation runtime for benches: a SuperLink that simulates clients with Ray, and runs of the app in it."""

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fedsea.errors import FedSEAError, UsageError
from fedsea.federation import read_status
from fedsea.federation.flower.app import project_file
from fedsea.federation.process import flower_environment
from fedsea.process import TOOLS, Child
from fedsea.server import ServerProcess

START_SECONDS = 60.0
RUN_SECONDS = 3600.0
POLL_SECONDS = 0.5
RAY_ATTEMPTS = 3
RAY_DID_NOT_START = "in init_ray"  # in the traceback of a simulation that ends before it begins


def missing_ray() -> str:
    """Why clients cannot be simulated here; empty if they can be."""
    try:
        import ray  # noqa: F401
    except ImportError:
        return "simulated clients need Ray: pip install 'fedsea[simulation]'"
    return ""


def simulate(
    server: ServerProcess,
    data: Path,
    output: Path,
    actors: int,
    on_poll: Callable[[], None] = lambda: None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Run a federation at a block server to its end, `actors` clients at a time; returns the rounds' reports."""
    given = {name.replace("_", "-"): value for name, value in settings.items()}
    given |= {"servers": server.address, "insecure": True, "data": str(data), "output": str(output)}
    with SimulationLink() as link:
        link.run(given, actors, on_poll)
    return read_status(output).reports


class SimulationLink(AbstractContextManager["SimulationLink"]):
    """A SuperLink that simulates; a context manager. UsageError without Ray, FedSEAError if it does not start."""

    def __init__(self) -> None:
        if why := missing_ray():
            raise UsageError(why)
        self._folder = tempfile.TemporaryDirectory(prefix="fedsea-bench-")
        home = Path(self._folder.name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        self._environment = flower_environment(home) | {"RAY_USAGE_STATS_ENABLED": "0"}
        options = ["--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
        options += ["--disable-runtime-dependency-installation"]
        module, log = "fedsea.federation.flower.superlink", home / "superlink.log"
        # Ray's processes import from where they run, whatever Python's flags say.
        self._process = Child(module, options, log, self._environment, folder=home)
        try:
            self._await(port)
        except BaseException:
            self.close()
            raise

    def _await(self, port: int) -> None:
        end = time.monotonic() + START_SECONDS
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            if time.monotonic() > end or not self._process.running:
                raise FedSEAError(f"Flower's SuperLink did not start: {self._process.last_words()}")
            time.sleep(0.1)

    def run(
        self,
        settings: Mapping[str, Any],
        actors: int,
        on_poll: Callable[[], None] = lambda: None,
        app: Path | None = None,
    ) -> None:
        """Run FedSEA's app, or the one in a folder, with `actors` clients computing at a time.

        Raises FedSEAError if the run fails.
        """
        if app is None:
            app = Path(self._folder.name) / "app"
            app.mkdir(exist_ok=True)
            (app / "pyproject.toml").write_text(project_file())
        given = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
        simulated = f"num-supernodes={settings['clients']} client-resources-num-cpus=1 init-args-num-cpus={actors}"
        command: list[str | Path] = [
            TOOLS / "flwr",
            *("run", app, "here", "--stream", "-c", given, "--federation-config", simulated),
        ]
        for attempt in range(RAY_ATTEMPTS):
            failed, text = self._run_once(command, on_poll)
            # Ray's own processes now and then die as they start, long before a client has trained.
            if not failed or RAY_DID_NOT_START not in text or attempt == RAY_ATTEMPTS - 1:
                break
            print("fedsea: Ray did not start; once more", file=sys.stderr)
        if failed:
            raise FedSEAError(f"the simulated federation did not end well: {' '.join(text.split())[-600:]}")

    def _run_once(self, command: Sequence[str | Path], on_poll: Callable[[], None]) -> tuple[bool, str]:
        said = Path(self._folder.name) / "run.log"
        with said.open("wb") as log:
            run = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
        end = time.monotonic() + RUN_SECONDS
        while run.poll() is None:
            if time.monotonic() > end:
                run.kill()
            on_poll()
            time.sleep(POLL_SECONDS)
        text = said.read_text(errors="replace")
        return run.returncode != 0 or "the adapter is in" not in text, text

    def close(self) -> None:
        """End it and what it has started. Safe to call twice."""
        self._process.kill()
        self._folder.cleanup()

    def __exit__(self, *_what: object) -> None:
        self.close()
