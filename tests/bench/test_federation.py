"""`fedsea bench federation` on the tiny model: the lines that take seconds, and what the others are made of."""

import sys
from pathlib import Path

import pytest

from fedsea.errors import UsageError
from fedsea.tasks import get_task
from fedsea_bench.federation_exactness import federation_exactness
from fedsea_bench.federation_quality import (
    ALONE,
    CENTRALISED,
    MODES,
    Curve,
    Size,
    copy_task,
    draw_curves,
    federation_quality,
    quality_lines,
    train_in_one_place,
)
from fedsea_bench.task_case import TaskCase
from fedsea_bench.topics import run_topics
from fedsea_bench.workbench import Settings, Workbench
from tests.bench.conftest import silent
from tests.support.federation_commands import write_cb


def curves(task: str) -> list[Curve]:
    def points(last: float) -> tuple[tuple[int, dict[str, float]], ...]:
        return ((0, {"accuracy": 0.5, "answer_loss": 1.0}), (2, {"accuracy": last, "answer_loss": 1 - last}))

    alone = [Curve(f"{ALONE}, client {number}", points(0.6 + number / 100), 10 + number) for number in range(4)]
    return [*(Curve(mode, points(0.7), 46) for mode in MODES), Curve(CENTRALISED, points(0.75), 46), *alone]


def test_every_strategy_is_what_it_is_defined_as(bench: Workbench) -> None:
    lines = list(federation_exactness(bench))
    assert len(lines) >= 5
    assert [line.name for line in lines if not line.holds] == []


def test_without_data_quality_is_skipped_and_says_what_it_needs() -> None:
    report = run_topics("federation", Settings("random:tiny", quick=True), silent(), ["quality"])
    assert {line.verdict for line in report.lines} == {"skipped"}
    assert all("--data" in line.conditions for line in report.lines)


def test_quality_compares_the_last_scores(bench: Workbench, tmp_path: Path) -> None:
    ratio, alone, loss, _, *others = quality_lines(bench, get_task("cb"), curves("cb"), Size(2, 1, 1, 6))
    assert (ratio.name.split(" / ")[0], others[0].name.split(" / ")[0]) == MODES
    assert ratio.measured == pytest.approx(0.7 / 0.75)
    assert not ratio.holds  # below 0.95
    assert alone.measured == pytest.approx(0.7 / 0.615)
    assert loss.measured == pytest.approx(0.3 / 0.25)
    assert "10, 11, 12, 13 examples" in loss.conditions
    draw_curves({"cb": curves("cb"), "rte": curves("rte")}, tmp_path / "plots" / "quality.png", "random:tiny")
    assert (tmp_path / "plots" / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_the_other_side_is_pefts_training_in_one_place(small: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    case = TaskCase("cb", copy_task(get_task("cb"), write_cb(tmp_path / "data"), tmp_path / "copy", 4), small, 256)
    assert len(case.read("validation")) == 4
    with Workbench(Settings(small, quick=True, threads=1), silent()) as bench:
        points = train_in_one_place(case, bench.whole, case.read("train"), Size(2, 3, 1, 4), 2, every=1)
        assert [number for number, _ in points] == [1, 2]
        assert points[1][1]["answer_loss"] < points[0][1]["answer_loss"]
        assert not any("lora" in name for name, _ in bench.whole.named_parameters())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no file train\.jsonl"):
        copy_task(get_task("cb"), tmp_path, tmp_path / "copy", 4)


def test_quality_needs_ray_for_its_simulated_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with Workbench(Settings("random:tiny", data=tmp_path), silent()) as other:
        assert all("fedsea[simulation]" in line.conditions for line in federation_quality(other))
