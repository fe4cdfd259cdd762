"""What a bench prints and writes, and the light lines of `fedsea bench inference` on the tiny model."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedsea.checkpoints import load_whole_model
from fedsea.errors import FedSEAError, UsageError
from fedsea.server import ServerProcess
from fedsea_bench.clock import bare_loop, decode_rate, times_of_generate
from fedsea_bench.command import app
from fedsea_bench.context import draw_curve, text_curve
from fedsea_bench.exactness import exactness
from fedsea_bench.memory import compare, gpu
from fedsea_bench.peak import PeakCase
from fedsea_bench.processes import process_memory, run_fresh
from fedsea_bench.results import SHARE, Line, Report, markdown_table, meets, number, write_json
from fedsea_bench.traffic import link_bytes, row_entries
from fedsea_bench.training_memory import training_gpu_memory
from fedsea_bench.workbench import Workbench, endless
from tests.bench.conftest import silent
from tests.bench.memory_holder import hold


@pytest.mark.parametrize(
    ("measured", "target", "holds"),
    [(0.95, ">= 0.95", True), (0.94, ">= 0.95", False), (2650, "<= 2650", True), (1, "== 0", False), (0, "== 0", True)],
)
def test_target_is_compared_as_it_is_written(measured: float, target: str, holds: bool) -> None:
    assert meets(measured, target) is holds
    assert Line.of("a", measured, "x", target=target, conditions="").holds is holds


@pytest.mark.parametrize("target", ["", "0.95", "> 0.95", ">= much"])
def test_target_of_another_form_is_refused(target: str) -> None:
    with pytest.raises(UsageError, match="written like"):
        meets(1.0, target)


def test_median_line_keeps_the_samples_in_order() -> None:
    line = Line.median("speed", [3.0, 1.0, 2.5], "x", target=">= 2", conditions="")
    assert line.measured == statistics.median([3.0, 1.0, 2.5])
    assert line.samples == (3.0, 1.0, 2.5)
    assert line.holds is True
    assert line.spread == "1 … 3 (n = 3)"


def test_json_is_a_list_of_lines_with_the_agreed_fields(tmp_path: Path) -> None:
    lines = [Line.of("a", 1.5, "x", target=">= 1", conditions="here"), Line.skipped("b", "s", reason="no")]
    write_json(lines, tmp_path / "lines.json")
    first = {"name": "a", "measured": 1.5, "unit": "x", "target": ">= 1", "holds": True}
    second = {"name": "b", "measured": None, "unit": "s", "target": "", "holds": None}
    assert json.loads((tmp_path / "lines.json").read_text()) == [
        first | {"samples": [1.5], "conditions": "here"},
        second | {"samples": [], "conditions": "skipped: no"},
    ]


def test_report_prints_each_line_as_it_comes_and_counts_verdicts() -> None:
    console = silent()
    report = Report(console)
    report.add(Line.of("first", 1.0, "x", target=">= 2", conditions="why"))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(part in printed for part in ("FAILS", "first", "why"))
    report.add(Line.of("second [0]", 3.0, "x", target=">= 2", conditions="why"))
    report.add(Line.of("third", 3.0, "x", conditions="why"))
    assert report.failed
    assert report.summary() == "1 holds, 1 FAILS, 1 reported"
    assert "second [0]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_share_is_shown_in_per_cent_and_compared_as_it_is() -> None:
    line = Line.largest("a", [0.0174, 0.003], SHARE, target="<= 0.05", conditions="c")
    assert (line.holds, line.figure, line.wanted, line.spread) == (True, "1.74 %", "<= 5 %", "0.3 … 1.74 (n = 2)")


def test_markdown_table_has_a_row_a_line() -> None:
    table = markdown_table([Line.of("a | b", 2650.0, "bytes", target="<= 2650", conditions="c")])
    assert table.splitlines()[2] == "| a \\| b | 2,650 bytes | <= 2650 | holds | – | c |"


def test_numbers_are_short_and_plain() -> None:
    assert [number(value) for value in (0.0, 12345.6, 0.98765, 7.53e-5)] == ["0", "12,346", "0.9877", "7.53e-05"]


def test_decode_rate_leaves_the_prompt_out() -> None:
    assert decode_rate([100.0, 100.5, 101.0]) == pytest.approx(2.0)


def test_bare_loop_gives_the_tokens_of_generate(bench: Workbench) -> None:
    whole = endless(load_whole_model("random:tiny"))
    prompt = bench.prompt(9)
    expected = whole.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=7)[0, 9:].tolist()
    assert list(bare_loop(whole, prompt, 7)) == expected
    assert len(times_of_generate(whole, prompt, 7)) == 7


def test_prompt_is_the_same_in_every_run(bench: Workbench) -> None:
    assert torch.equal(bench.prompt(5, rows=2)[0], bench.prompt(5)[0])


def test_curve_is_drawn_as_text_and_png(tmp_path: Path) -> None:
    points = [(500, 5.0), (1000, 10.0)]
    first, second = text_curve(points).splitlines()
    assert second.count("█") == 2 * first.count("█")
    draw_curve(points, tmp_path / "new" / "curve.png", "tiny")
    assert (tmp_path / "new" / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_fresh_process_has_its_own_memory_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    ballast = bytearray(b"x") * (500 << 20)
    small, large = (run_fresh(hold, threads=1, mib=mib) for mib in (1, 101))
    assert 90 << 20 < large - small < 110 << 20
    assert process_memory("VmHWM") > len(ballast)


def test_failure_in_a_fresh_process_is_an_error() -> None:
    with pytest.raises(FedSEAError, match="time:sleep failed"):
        run_fresh(time.sleep, threads=1)


def test_server_that_cannot_start_is_told_with_its_reason() -> None:
    options = ("--layers", "no-such")
    with (
        ServerProcess("random:tiny", threads=1, secure=False, options=options) as server,
        pytest.raises(FedSEAError, match=r"did not start: .*no-such"),
    ):
        assert server.address


def test_light_lines_hold_on_the_tiny_model(bench: Workbench) -> None:
    tokens, logits = exactness(bench)
    assert tokens.holds is True
    assert logits.holds is True
    (entries,) = row_entries(bench)
    assert entries.samples == (8.0, 12.0)
    assert entries.holds is True
    (link,) = link_bytes(bench)
    assert link.measured is not None
    assert 256 < link.measured < 256 + 250  # the hidden states, and some headers of a frame, gRPC, HTTP/2 and TLS


@pytest.mark.usefixtures("in_this_process")
def test_gpu_comparison_runs_on_any_device(bench: Workbench) -> None:
    memory, speed = compare(bench, PeakCase("random:tiny", "decode", 20, new_tokens=4, rounds=2))
    assert memory.measured is not None
    assert 30 < memory.measured < 50  # two layers of six, embedding and head
    assert len(speed.samples) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_lines_are_skipped_without_a_gpu(bench: Workbench) -> None:
    assert [line.verdict for line in (*gpu(bench), *training_gpu_memory(bench))] == ["skipped"] * 3


def test_command_runs_one_topic_and_writes_files(tmp_path: Path) -> None:
    json_file, markdown = tmp_path / "lines.json", tmp_path / "lines.md"
    arguments = ["inference", "--only", "client-weights", "--strict", "--json", str(json_file)]
    arguments += ["--markdown", str(markdown)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (line,) = json.loads(json_file.read_text())
    assert line["measured"] == pytest.approx(9.897, abs=1e-3)
    assert "client weights" in markdown.read_text()


def test_a_bench_that_is_killed_leaves_no_server() -> None:
    code = (
        "import time; from fedsea.server import ServerProcess; "
        "server = ServerProcess('random:tiny', threads=1, secure=False); print(server.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        server = int(bench.stdout.readline())
        assert Path(f"/proc/{server}").exists()
        bench.kill()
    deadline = time.monotonic() + 60
    while (status := _status(server)) not in ("gone", "Z"):
        assert time.monotonic() < deadline, status
        time.sleep(0.05)


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
