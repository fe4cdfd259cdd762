"""`fedsea bench` as the package finds it: beside the package, told in one line where it is not, and checked at once."""

import inspect
import pkgutil
import posixpath
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import fedsea
from fedsea_bench.link import Link
from fedsea_bench.processes import run_fresh
from fedsea_bench.topics import TOPICS
from tests.cli.test_checks_first import outcomes

PROJECT = Path(__file__).parents[2] / "bench" / "pyproject.toml"
# Runs a command where neither torch nor the bench is.
WITHOUT = """
import importlib.metadata, sys
importlib.metadata.entry_points = lambda **_which: ()
sys.modules["torch"] = sys.modules["fedsea_bench"] = None
from fedsea.cli import run
sys.exit(run(sys.argv[1:]))
"""


def without(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", WITHOUT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["inference", "--quick", "--only", "exactness"]])
def test_a_bench_that_is_not_installed_is_one_line_that_installs_it(arguments: list[str]) -> None:
    done = without("bench", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("pip install ./bench\n")


def test_help_lists_the_bench_whether_it_is_installed_or_not(tmp_path: Path) -> None:
    assert " bench " in without("--help").stdout
    ran = subprocess.run([sys.executable, "-m", "fedsea", "--help"], capture_output=True, text=True, check=True)
    assert " bench " in ran.stdout
    assert outcomes(["--help", "bench --help"], tmp_path) == [(0, "")] * 2  # with no torch


def test_the_bench_is_of_the_packages_version() -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    assert project["version"] == fedsea.__version__
    assert f"fedsea[tasks]=={fedsea.__version__}" in project["dependencies"]


@pytest.mark.parametrize("function", [function for topics in TOPICS.values() for function in topics.values()])
def test_every_topic_is_a_function_with_a_text(function: str) -> None:
    assert inspect.getdoc(pkgutil.resolve_name(f"fedsea_bench.{function}"))


def test_a_wrong_command_is_one_line_without_torch(tmp_path: Path) -> None:
    wrong = [
        *((f"bench {bench} --only qualty", 2, f"there are {', '.join(TOPICS[bench])}") for bench in TOPICS),
        ("bench inference --model no-such-model", 1, "no model 'no-such-model'"),
    ]
    found = outcomes([command for command, _, _ in wrong], tmp_path)
    for (command, code, says), (got, told) in zip(wrong, found, strict=True):
        assert (got, told.count("\n")) == (code, 1), (command, told)
        assert says in told, (command, told)


def link() -> None:
    with Link("127.0.0.1:1") as started:
        assert started.counters().connections == 0


def measure() -> None:
    assert run_fresh(posixpath.basename, threads=1, p="a/b") == "b"


@pytest.mark.parametrize("start", [link, measure])
def test_no_code_of_the_current_folder_runs_in_a_child(start: Callable[[], None], hostile: Path) -> None:
    start()
    assert not hostile.exists(), hostile.read_text()
