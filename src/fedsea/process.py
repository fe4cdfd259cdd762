"""Processes that FedSEA starts: how their commands are built, and how they end with the one that started them.

`python -m` looks for modules in the current folder first, and that folder may hold anybody's files: a downloaded
model, what a coordinator has sent. So every command is built here, with `-P`, and its environment says the same to
whatever the process itself starts.

A process on a leash has a group of its own, and standard input is a pipe whose other end its starter holds. When that
end closes, even as its starter was killed with -9, the process ends its whole group.
"""

import logging
import os
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from fedsea.threads import WAITING

log = logging.getLogger(__name__)
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
TOOLS = Path(sys.executable).parent  # where the commands of the installed packages are
_SAFE_PATH = {"PYTHONSAFEPATH": "1"}
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


def module_command(module: str, *arguments: str, leash: bool = False) -> list[str]:
    """The command that runs a module in a new process of this Python.

    Parameters
    ----------
    module, arguments
        As for `python -m`.
    leash
        The process is to end with this one. It needs a session of its own, and a pipe as standard input.
    """
    first = ["fedsea.process"] if leash else []
    return [sys.executable, "-P", "-m", *first, module, *arguments]


def child_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for one that it starts, with the changes.

    Nothing is imported from where that process runs, and no proxy stands between it and this machine.
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
