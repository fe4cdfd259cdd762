"""Processes that FedSEA starts: nothing is imported from the folder in which they run."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fedsea
from fedsea.checkpoints import open_checkpoint
from fedsea.errors import FedSEAError, ModelNotFoundError
from fedsea.federation.process import flower_environment
from fedsea.process import Child
from fedsea.server import ServerProcess
from fedsea.tasks.sandbox import require_sandbox

SOURCE = Path(fedsea.__file__).parent
BENCH = Path(__file__).parents[1] / "bench" / "src" / "fedsea_bench"
FILES = sorted([*SOURCE.rglob("*.py"), *BENCH.rglob("*.py")])


def convert() -> None:
    Path("model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelNotFoundError, match=r"model\.gguf cannot be converted: .") as raised:
        open_checkpoint("model.gguf")
    assert "\n" not in str(raised.value)
    assert not [path for path in Path(os.environ["FEDSEA_CACHE"], "gguf").iterdir() if path.is_dir()]


def federate() -> None:
    environment = flower_environment(Path("flower").resolve())
    with Child("fedsea.federation.flower.superlink", ["--help"], Path("log"), environment) as child:
        while child.running:
            child.says(1.0)
        assert child.exit_code == 0, child.last_words()


def work() -> None:
    Path("open").mkdir(mode=0o755)
    with Child("fedsea.federation.owner.worker_process", ["open/socket"], Path("log"), stdin="{}") as child:
        said = child.says(60.0)
        assert said is not None, child.last_words()
        assert "chmod 700" in str(said["error"])


def serve() -> None:
    starting = ServerProcess("random:tiny", threads=1, secure=False, options=("--layers", "none"))
    with starting as server, pytest.raises(FedSEAError, match="LO:HI"):
        _ = server.address


def run_untrusted() -> None:
    require_sandbox()


def command() -> None:
    ran = subprocess.run([sys.executable, "-m", "fedsea", "--version"], capture_output=True, text=True, check=False)
    assert ran.stdout == f"fedsea {fedsea.__version__}\n", ran.stderr


@pytest.mark.parametrize("start", [convert, federate, work, serve, run_untrusted, command])
def test_no_code_of_the_current_folder_runs_in_a_child(
    start: Callable[[], None], hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSEA_CACHE", str(tmp_path / "cache"))
    start()
    assert not hostile.exists(), hostile.read_text()


def test_commands_that_run_python_are_built_in_one_place() -> None:
    for path in FILES:
        if path == SOURCE / "process.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}: see fedsea.process"
            # `-m` and `-c` are how Python is told what to run; nobody else needs its interpreter, or a shell.
            assert not (isinstance(node, ast.Constant) and node.value in ("-m", "-Im")), where
            named = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            assert named not in ("sys.executable", "os.system", "os.popen"), where
            assert not (isinstance(node, ast.keyword) and node.arg in ("shell", "executable")), where


PASTED = re.compile(
    r"`((?:fedsea|chmod|pip) [^`]*)`|(?:^|:  )((?:fedsea (?!federation up )[a-z]+ [a-zA-Z-]|source ).*)", re.DOTALL
)


def pasted_values(template: ast.JoinedStr) -> Iterator[ast.expr]:
    """What an f-string puts into commands that it shows."""
    values = [part.value for part in template.values if isinstance(part, ast.FormattedValue)]
    numbers = iter(range(len(values)))
    text = "".join(
        str(part.value) if isinstance(part, ast.Constant) else f"\0{next(numbers)}\0" for part in template.values
    )
    for found in PASTED.finditer(text):
        yield from (values[int(number)] for number in re.findall("\0([0-9]+)\0", found[1] or found[2]))


def test_commands_that_are_shown_to_be_pasted_are_quoted() -> None:
    checked = 0
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            for value in pasted_values(node) if isinstance(node, ast.JoinedStr) else ():
                calls = {
                    getattr(one.func, "attr", getattr(one.func, "id", ""))
                    for one in ast.walk(value)
                    if isinstance(one, ast.Call)
                }
                assert calls & {"quote", "join"}, f"{path.name}:{value.lineno}: {ast.unparse(value)}"
                checked += 1
    assert checked > 5
