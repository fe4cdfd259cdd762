"""The processes of a federation: started on a leash, watched, and stopped with all that they have started."""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from fedsea.process import TOOLS, child_environment, module_command

STOP_SECONDS = 10.0
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

    An interrupt typed at the terminal does not reach it: whoever started it stops it. If that process is killed, the
    child ends, too.

    Parameters
    ----------
    module, arguments
        As for `python -m`.
    log
        Where its standard error goes. Standard output is read here: JSON objects, one a line.
    environment
        Replaces parts of this process's.
    stdin
        A first line for it; the module then puts itself on the leash.
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
            with contextlib.suppress(BrokenPipeError):  # it has died: whoever waits for it will find out
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
        return self._process.poll() is None

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
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            text = ""
        lines = [" ".join(line.split()) for line in _COLOURS.sub("", text).splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR.search(line)]
        return next(iter([*errors[-1:], *lines[-1:]]), "it said nothing").removeprefix("fedsea: error: ")

    def last_line_with(self, text: str) -> str:
        """What follows this text in the last line of its log that has it; empty if none does."""
        try:
            lines = _COLOURS.sub("", self.log.read_text(errors="replace")).splitlines()
        except OSError:
            lines = []
        return next((line.partition(text)[2].strip() for line in reversed(lines) if text in line), "")

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Ask it to end, wait, and kill its group. Safe to call twice."""
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
