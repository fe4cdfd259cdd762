"""Measurements that need a fresh interpreter, and how much memory a process has.

A measurement that runs in a process of its own is a function `name(**arguments)` of JSON values that returns JSON
values, called by `run_fresh`. This module is what that process starts with, so it imports nothing heavy.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from fedsea.errors import FedSEAError
from fedsea.process import child_environment, module_command


def run_fresh(function: Callable[..., Any], *, threads: int, **arguments: Any) -> Any:
    """Call a module's function in a new Python process and return its result.

    The process is executed, not forked: its memory peak is its own. Raises FedSEAError if it fails; its own message is
    on standard error.
    """
    name = f"{function.__module__}:{function.__qualname__}"
    command = module_command("fedsea_bench.processes", name, json.dumps(arguments))
    environment = child_environment({"OMP_NUM_THREADS": str(threads)})  # the user's own settings stay
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise FedSEAError(f"the measurement {name} failed in its process (exit status {done.returncode})")
    return json.loads(done.stdout.splitlines()[-1])


def process_memory(field: str, pid: int | None = None) -> int:
    """Bytes of a process, by default this one: `VmRSS`, resident now, or `VmHWM`, at most ever. Linux only."""
    with open(f"/proc/{pid or 'self'}/status") as status:  # noqa: PTH123 - no path from outside
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(f"{field}:"))


def _main() -> None:
    module, _colon, function = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    _main()
