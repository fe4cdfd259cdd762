"""The sandbox for a model's programs: what runs through, what does not, what it refuses, and that nothing is left."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsea.errors import UsageError
from fedsea.tasks import sandbox
from fedsea.tasks.sandbox import Limits, require_sandbox, runs_through

PATIENT = Limits(cpu_seconds=60, seconds=240)  # for what must run through, on however busy a machine
SHORT = Limits(cpu_seconds=1, seconds=5)  # for what must not
DEADLINE = 60.0


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the working folders are made; afterwards nothing is in it, and no process works there."""
    folder = tmp_path / "folders"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not working_in(folder)
    assert not list(folder.iterdir())


def working_in(folder: Path) -> list[str]:
    """The processes whose current folder is below this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str((process / "cwd").readlink()).startswith(str(folder)):
                found.append(process.name)
    return found


def test_a_program_that_comes_to_its_end_runs_through() -> None:
    program = "import math\nprint('x' * 100_000)\nassert math.comb(4, 2) == 6\nfedsea = __name__\nassert fedsea"
    assert runs_through(program, PATIENT)


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "def broken(:",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import atexit, os; atexit.register(print)\nos.abort()",
        "input()",
        "import sys\nint(sys.stdin.read())",
        "import numpy",  # only the standard library is there
        "import fedsea",
        "while True: pass",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "import time; time.sleep(1000)",
        "while True: print('x' * 10_000)",
        "x = bytearray(1 << 40)",
        "x = []\nwhile True: x.append(bytes(1 << 24))",
        "import os\nwhile True: os.fork()",
        "import ctypes; ctypes.string_at(0)",
        "import sys; sys.setrecursionlimit(1 << 30)\ndef deep(): deep()\ndeep()",
        "open('file', 'w')",
        "import os\nfor stream in range(3, 32):\n    try: os.write(stream, b'x' * 32)\n    except OSError: pass",
        "x = '\\ud800'.encode()",
        "\x00",
    ],
)
def test_a_program_that_does_not_fails_within_seconds(program: str) -> None:
    began = time.monotonic()
    assert not runs_through(program, SHORT)
    assert time.monotonic() - began < DEADLINE


def test_what_is_refused_raises_and_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    kept.chmod(0o600)
    monkeypatch.setenv("SECRET", "x")
    program = f"""
import _posixsubprocess, ctypes, mmap, os, pathlib, resource, shutil, signal, socket, subprocess, threading

kept, new, mine = {str(kept)!r}, {str(tmp_path / "new")!r}, {os.getpid()}
for action in (
    lambda: open(kept, "w"), lambda: open(kept, "a"), lambda: open(kept, "r+"), lambda: open(new, "x"),
    lambda: os.open(kept, os.O_RDONLY | os.O_TRUNC), lambda: os.open(new, os.O_RDONLY | os.O_CREAT),
    lambda: os.open(".", os.O_WRONLY | os.O_TMPFILE), lambda: os.truncate(kept, 0), lambda: os.unlink(kept),
    lambda: os.rename(kept, new), lambda: os.link(kept, new), lambda: os.symlink(kept, new), lambda: os.chmod(kept, 0),
    lambda: os.chown(kept, 1, 1), lambda: os.utime(kept, (0, 0)), lambda: os.mkdir(new), lambda: os.mkfifo(new),
    lambda: shutil.rmtree({str(tmp_path)!r}), lambda: pathlib.Path(new).touch(), lambda: os.chdir("/"),
    lambda: os.fork(), lambda: subprocess.run(["true"]), lambda: os.posix_spawn("/bin/true", ["true"], {{}}),
    lambda: os.execv("/bin/true", ["true"]), lambda: threading.Thread(target=print).start(),
    lambda: os.kill(mine, signal.SIGKILL), lambda: os.killpg(0, signal.SIGKILL), lambda: os.setsid(),
    lambda: os.sched_setaffinity(mine, [0]), lambda: os.setpriority(os.PRIO_PROCESS, mine, 19),
    lambda: socket.socket(), lambda: socket.socketpair(), lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: resource.setrlimit(resource.RLIMIT_CPU, (999, 999)), lambda: os.memfd_create("x"), lambda: os.pipe(),
):
    try:
        action()
    except (OSError, ValueError, RuntimeError):
        continue
    raise AssertionError(action.__code__.co_firstlineno)
libc = ctypes.CDLL(None)  # whatever Python forbids, the kernel does
assert libc.fork() == libc.socket(2, 1, 0) == libc.unlink(kept.encode()) == libc.kill(mine, 9) == -1
assert "SECRET" not in os.environ
assert os.listdir() == [] and os.getcwd() != {str(Path.cwd())!r}
assert open(kept).read() == "mine"  # reading is not held
"""
    assert runs_through(program, PATIENT)
    assert (kept.read_text(), kept.stat().st_mode & 0o777) == ("mine", 0o600)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folders", "kept"]


def test_a_program_ends_with_the_process_that_started_it(folders: Path) -> None:
    code = (
        f"import tempfile; tempfile.tempdir = {str(folders)!r}\n"
        "from fedsea.tasks.sandbox import Limits, runs_through\n"
        "runs_through('import time; time.sleep(1000)', Limits(seconds=1000))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as starter:
        while not working_in(folders) or not held(working_in(folders)[0]):
            assert starter.poll() is None
            time.sleep(0.05)
        starter.kill()
    end = time.monotonic() + DEADLINE
    while working_in(folders) and time.monotonic() < end:
        time.sleep(0.05)
    assert not working_in(folders)
    for left in folders.iterdir():  # a process that is killed cannot clean up
        left.rmdir()


def held(process: str) -> bool:
    """Whether seccomp's filter holds the process, which it asks for last of all."""
    with contextlib.suppress(OSError):
        return "Seccomp:\t2" in Path("/proc", process, "status").read_text()
    return False


def test_where_there_is_no_sandbox_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_sandbox()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UsageError, match=r"Linux on x86-64 or ARM64 is needed, with seccomp$"):
        require_sandbox()
    monkeypatch.setattr(sys, "platform", "linux")
    leaky = tmp_path / "leaky.py"
    source = sandbox.CHILD.read_text()
    assert source.count("        give_up_system_calls()\n") == 1
    for change, says in (
        ("pass", "does not start, or does not hold"),
        ("_filter('z80').__next__()", "OSError: .* z80"),
    ):
        leaky.write_text(source.replace("        give_up_system_calls()\n", f"        {change}\n"))
        monkeypatch.setattr(sandbox, "CHILD", leaky)
        with pytest.raises(UsageError, match=f"the sandbox fails its test: .*{says}"):
            require_sandbox()
