"""One workbench for all tests of the bench: the tiny model, its block server, little of everything."""

import io
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from rich.console import Console

from fedsea_bench.workbench import Settings, Workbench


def silent() -> Console:
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(scope="session")
def bench() -> Iterator[Workbench]:
    with Workbench(Settings("random:tiny", quick=True, threads=1), silent()) as workbench:
        yield workbench


@pytest.fixture
def in_this_process(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks are measured here, at the server that is there: three processes that import torch would take their time."""
    monkeypatch.setattr("fedsea_bench.peak.run_fresh", lambda function, *, threads, **case: function(**case))
    monkeypatch.setattr("fedsea_bench.peak.ServerProcess", lambda *_args, **_options: nullcontext(bench.server))
