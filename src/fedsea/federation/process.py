"""The processes of a federation: started, watched, started again, and stopped with all that they have started."""

import contextlib
import json
import math
import os
import queue
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from fedsea.errors import FedSEAError, UsageError
from fedsea.process import TOOLS, child_environment, module_command
from fedsea.wire.address import format_address

STOP_SECONDS = 10.0
RESTARTS = 3
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ERROR = re.compile(r"error", re.IGNORECASE)
# What Flower does by itself is turned off, unless its user has turned it on.
QUIET_FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}


def flower_environment(home: Path) -> dict[str, str]:
    """Environment of Flower's processes: its files under `home`, its commands those beside this Python."""
    path = os.pathsep.join((str(TOOLS), os.environ.get("PATH", "")))
    return child_environment(QUIET_FLOWER | os.environ | {"FLWR_HOME": str(home), "PATH": path})


class Child:
    """A Python module as a process of its own, in a process group of its own; a context manager.

    An interrupt typed at the terminal does not reach it, only the process that started it. If that process is killed,
    the child ends, too.

    Parameters
    ----------
    module, arguments
        As for `python -m`.
    log
        Where its standard error goes. Standard output is read here: JSON objects, one a line.
    environment
        Replaces parts of this process's.
    stdin
        A first line for it; the module then calls `put_on_leash` itself.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        stdin: str | None = None,
    ) -> None:
        self.log = log
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                module_command(module, *arguments, leash=stdin is None),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=child_environment(environment),
                start_new_session=True,
            )
        if stdin is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has died: the process that waits for it will find out
                self._process.stdin.write(stdin + "\n")
                self._process.stdin.flush()
        self._lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed while it is read
            for line in self._process.stdout:
                with contextlib.suppress(ValueError):
                    said = json.loads(line)
                    if isinstance(said, dict):
                        self._lines.put(said)

    @property
    def pid(self) -> int:
        """The process's number, and its group's."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.exit_code is None

    @property
    def exit_code(self) -> int | None:
        """With what it has ended; None while it runs."""
        return self._process.poll()

    def says(self, seconds: float) -> dict[str, Any] | None:
        """The next JSON object that it prints; None if none comes within the time or it has ended."""
        end = time.monotonic() + seconds
        while True:
            ended = not self.running
            try:
                return self._lines.get(timeout=0.05 if ended else min(0.2, max(0.0, end - time.monotonic())))
            except queue.Empty:
                if ended or time.monotonic() >= end:
                    return None

    def end(self) -> str:
        """How it ended, in words."""
        code = self.exit_code
        if code is not None and code < 0:
            return f"it was killed by signal {-code}"
        return f"exit status {code}: {self.last_words()}"

    def last_words(self) -> str:
        """The last line of its log that tells of an error; else its last line."""
        lines = [" ".join(line.split()) for line in self._logged() if line.strip()]
        errors = [line for line in lines if _ERROR.search(line)]
        return next(iter([*errors[-1:], *lines[-1:]]), "it said nothing").removeprefix("fedsea: error: ")

    def last_line_with(self, text: str) -> str:
        """What follows this text in the last line of its log that has it; empty if none does."""
        return next((line.partition(text)[2].strip() for line in reversed(self._logged()) if text in line), "")

    def _logged(self) -> list[str]:
        try:
            return _COLOURS.sub("", self.log.read_text(errors="replace")).splitlines()
        except OSError:
            return []

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Send it SIGTERM, wait, and kill its group. Safe to call twice."""
        if self.running:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        self.kill()

    def kill(self) -> None:
        """Kill it and its group with -9."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, ValueError):
                if stream is not None:
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_what: object) -> None:
        self.stop()


class Supervised:
    """A child that is started again when it dies, until it has died more than `RESTARTS` times in a row.

    One that dies later than `young_seconds` after its start does not count with those before it.
    """

    def __init__(
        self, name: str, start: Callable[[], Child], tell: Callable[[str], None], young_seconds: float = math.inf
    ) -> None:
        self._name, self._start, self._tell, self._young_seconds = name, start, tell, young_seconds
        self._deaths = 0
        self.restart()

    def restart(self) -> None:
        """Start it, whatever became of the one before."""
        self.child, self.began = self._start(), time.monotonic()

    def check(self) -> None:
        """Start it again if it has died; FedSEAError if it dies again and again."""
        if self.child.running:
            return
        end = self.child.end()
        self.child.kill()  # its group
        young = time.monotonic() - self.began < self._young_seconds
        self._deaths = self._deaths + 1 if young else 1
        if self._deaths > RESTARTS:
            raise FedSEAError(f"the {self._name} died {self._deaths} times in a row: {end}; see {self.child.log}")
        self._tell(f"the {self._name} died ({end}); starting it again")
        self.restart()


def require_port(host: str, port: int, option: str) -> int:
    """Check that a port can be listened on, and return it; 0 takes a free one.

    Raises
    ------
    UsageError
        If it is taken, or the host is not this machine's; `option` is where the user has it from.
    """
    where = format_address(host, port)
    try:
        family, kind, protocol, _name, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except socket.gaierror:
        raise UsageError(f"cannot listen on {where}: no machine is known by the name {host!r}") from None
    except OSError as error:
        raise UsageError(f"cannot listen on {where}: {(error.strerror or str(error)).lower()}; see {option}") from None
