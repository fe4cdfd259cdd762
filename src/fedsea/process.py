"""Processes that FedSEA starts: how their commands are built, and how they end with the one that started them.

`python -m` looks for modules in the current folder first, and that folder may hold anybody's files: a downloaded
model, what a coordinator has sent. So every command is built here, with `-P`, and its environment says the same to
whatever the process itself starts.

A process on a leash has a group of its own, and standard input is a pipe whose other end its starter holds. When that
end closes, even as its starter was killed with -9, the process ends its whole group.
"""

import contextlib
import json
import logging
import os
import queue
import re
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from fedsea.errors import FedSEAError
from fedsea.threads import WAITING

log = logging.getLogger(__name__)
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
TOOLS = Path(sys.executable).parent  # where the commands of the installed packages are
STOP_SECONDS = 10.0
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ERROR = re.compile(r"error", re.IGNORECASE)
_SAFE_PATH = {"PYTHONSAFEPATH": "1"}
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module in a new process of this Python, with arguments as for `python -m`."""
    return [sys.executable, "-P", "-m", module, *arguments]


def script_command(script: Path) -> list[str]:
    """The command that runs a script in a new process with the standard library, and no installed package."""
    return [sys.executable, "-I", "-S", "-B", str(script)]


def child_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with the changes, for one that it starts.

    That one imports nothing from where it runs, and no proxy stands between it and this machine.
    """
    return WAITING | os.environ | dict(changes or {}) | _SAFE_PATH | without_proxy()


def without_proxy(*hosts: str) -> dict[str, str]:
    """The variables that keep HTTP clients from asking a proxy for this machine, and for these hosts."""
    named = (os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY"))
    spared = dict.fromkeys(one.strip() for names in (*named, *_THIS_MACHINE, *hosts) for one in names.split(","))
    return dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(filter(None, spared)))


def raise_file_limit() -> None:
    """Let this process have as many open files, and so connections, as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):  # macOS has a lower limit of its own
            log.warning("open files stay limited limit=%d", soft)


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
        Changes to this process's.
    stdin
        A first line for it. The module then reads its input itself, and ends as that ends (`put_on_leash`).
    folder
        Where it runs; None for where this process does.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        stdin: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self.log, self._module = log, module
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        leash = ["fedsea.process"] if stdin is None else []
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                module_command(*leash, module, *arguments),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=child_environment(environment),
                start_new_session=True,
                cwd=folder,
            )
        if stdin is not None:
            self.tell(stdin)
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

    def tell(self, line: str) -> None:
        """Write it a line. If it has died, that shows when its answer is waited for."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next JSON object that it prints; a FedSEAError if none comes within the time, or it has ended."""
        said = self.says(seconds)
        if said is None:
            why = f"gave no answer in {seconds:g} s" if self.running else f"has ended: {self.end()}"
            raise FedSEAError(f"the process of {self._module} {why}")
        return said

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


def put_on_leash() -> None:
    """End this process and its group once standard input ends. The process must be its group's leader."""
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    while True:
        try:
            if not os.read(0, 4096):
                break
        except OSError:
            break
    if os.getpgrp() != os.getpid():  # not a group of its own: others in it have done nothing
        os._exit(1)
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """`python -m fedsea.process MODULE ARGUMENTS…`: like `python -m MODULE ARGUMENTS…`, on a leash."""
    put_on_leash()
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
