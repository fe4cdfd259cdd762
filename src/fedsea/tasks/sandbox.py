"""Runs programs that nobody has read, as a model writes them: each in a process that can compute and read, no more.

What the process gives up, and how, is in `sandbox_child`. It has a session of its own, an empty working folder that is
removed, no environment, no input, and its output goes nowhere.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from fedsea.errors import UsageError
from fedsea.process import script_command

CHILD = Path(__file__).with_name("sandbox_child.py")
KEPT = ("LD_LIBRARY_PATH",)  # of the environment: some builds of Python do not start without it

# Runs through where a program can compute and import, and where the sandbox holds.
SELF_TEST = """
import collections, copy, functools, hashlib, heapq, itertools, math, os, random, re, socket, string, typing

def refused(action, *arguments):
    try:
        action(*arguments)
    except PermissionError:
        return True
    return False

assert refused(open, "file", "w")
assert refused(os.mkdir, "folder")
assert refused(os.fork)
assert refused(os.kill, os.getppid(), 0)
assert refused(socket.socket)
"""


@dataclass(frozen=True)
class Limits:
    """How much one program may take."""

    cpu_seconds: int = 3  # with the start of the interpreter, a tenth of a second
    seconds: float = 60.0  # by the clock: it only ends those that wait
    memory_bytes: int = 1 << 30  # of address space


def runs_through(program: str, limits: Limits | None = None) -> bool:
    """Whether a Python program comes to its end without an exception, an exit, or going over its limits.

    Nothing of it is left running. It can read what the user can read, and tell nobody.
    """
    token = secrets.token_hex(16)
    return _run(program, token, limits or Limits()) == token


def require_sandbox() -> None:
    """Raise a UsageError if programs cannot be run in a sandbox here, or it does not hold."""
    needs = "to run a model's programs, Linux on x86-64 or ARM64 is needed, with seccomp"
    if sys.platform != "linux":
        raise UsageError(needs)
    token = secrets.token_hex(16)
    said = _run(SELF_TEST, token, Limits(cpu_seconds=30, seconds=120))
    if said != token:
        raise UsageError(f"{needs}; here the sandbox fails its test: {said or 'it does not start, or does not hold'}")


def _run(program: str, token: str, limits: Limits) -> str:
    """What the child says: the token if the program has run through."""
    given = {"program": program, "token": token, **asdict(limits)}
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    with (
        tempfile.TemporaryDirectory(prefix="fedsea-") as folder,
        tempfile.TemporaryFile() as asked,
        tempfile.TemporaryFile() as said,  # a file, whose size is limited: no pipe that could be filled or held open
    ):
        asked.write(json.dumps(given).encode())
        asked.seek(0)
        process = subprocess.Popen(
            script_command(CHILD),
            stdin=asked,
            stdout=said,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limits.seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        return said.read(1000).decode(errors="replace")
