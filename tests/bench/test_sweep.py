"""Outcomes that are measured once and kept."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from fedsea.errors import UsageError
from fedsea_bench.sweep import Sweep


@dataclass(frozen=True)
class Point:
    place: int


@dataclass(frozen=True)
class Outcome:
    found: tuple[int, ...] | list[int]


def test_a_point_is_measured_once_for_what_it_has_in_common(tmp_path: Path) -> None:
    file, asked = tmp_path / "new" / "kept.jsonl", []

    def measure(point: Point) -> Outcome:
        asked.append(point.place)
        return Outcome([point.place * 10])

    for common in ({"steps": (2,)}, {"steps": (2,)}, {"steps": (3,)}, {"steps": (2,)}):
        sweep = Sweep(file, common, Point, Outcome)
        assert [sweep.measured(Point(place), measure).found for place in (1, 2, 1)] == [[10], [20], [10]]
    assert asked == [1, 2, 1, 2]
    assert Sweep(None, {}, Point, Outcome).measured(Point(3), measure).found == [30]


@pytest.mark.parametrize("line", ["{", "3", '{"steps": 2}', '{"steps": 2, "point": {"where": 1}, "outcome": {}}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "kept.jsonl").write_text(f"{line}\n")
    with pytest.raises(UsageError, match="is damaged; remove it"):
        Sweep(tmp_path / "kept.jsonl", {"steps": 2}, Point, Outcome)
