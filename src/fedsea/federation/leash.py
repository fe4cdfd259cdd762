"""Processes that end with the one that started them, even where that is killed with -9.

A process on a leash has a group of its own, and standard input is a pipe whose other end its starter holds. When that
end closes, for whatever reason, the process ends its whole group.
"""

import os
import runpy
import signal
import sys
import threading
import time

GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL


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
    """`python -m fedsea.federation.leash MODULE ARGUMENTS…`: like `python -m MODULE ARGUMENTS…`, on a leash."""
    put_on_leash()
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
