"""An audit's page: whole, escaped, true to what was found, and legible on any screen."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedsea.audit import Report, share
from fedsea.audit.charts import HEIGHT, LINE, WIDTH, Chart, Curve, rounded_up, spaced
from fedsea.audit.page import environment, page
from fedsea.cli import run as command
from fedsea.privacy import parse_mechanism
from tests.audit.conftest import TEXTS
from tests.support.html import Page


@pytest.mark.parametrize("count", [1, 2])
def test_the_page_needs_nothing_and_runs_nothing(reports: list[Report], count: int) -> None:
    text = page(reports[:count], "fedsea audit <b>")
    seen = Page(text)
    assert not {name for name, _ in seen.tags} & {"script", "link", "img", "iframe", "object", "form"}
    given = {name for _, attributes in seen.tags for name in attributes}
    assert not [name for name in given if name in ("src", "href", "style") or name.startswith("on")]
    assert not re.search(r"url\(|@import", text)
    (policy,) = (one["content"] for name, one in seen.tags if name == "meta" and "http-equiv" in one)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert "fedsea audit <b>" in seen.texts


def test_every_token_is_marked_as_it_was_read(reports: list[Report]) -> None:
    report = reports[1]
    seen = Page(page([report], "fedsea audit"))
    guesses = [
        (token, guess)
        for finding in report.findings
        for ids, recovery in zip(report.ids, finding.recoveries, strict=True)
        for token, guess in zip(ids, recovery.tokens, strict=True)
    ]
    # One of each kind is in the legend.
    assert seen.count("b") == 1 + sum(token == guess for token, guess in guesses)
    assert seen.count("u") == 1 + sum(guess is None for _, guess in guesses)
    assert seen.count("i") + seen.count("b") + seen.count("u") == 3 + len(guesses)
    assert {report.verdict, report.limit} <= set(seen.texts)
    # What was sent stands there as it is, in one piece, the text's own angle brackets and all.
    assert "".join(report.words[token] for token in report.ids[0][: report.prompts[0]]) in seen.texts
    assert TEXTS[0].startswith(report.texts[0])


def test_several_strengths_are_compared_and_drawn(reports: list[Report]) -> None:
    seen = Page(page(reports[:2], "fedsea audit"))
    assert (seen.count("details"), seen.count("svg")) == (2, 3)  # what is read of text and answer, and the loss
    assert seen.count("polyline") == 3 + 1 + 3 + 2  # attacks and the bound; attacks; the loss with and without
    assert "Strength, leakage and cost: relative" in seen.texts
    assert [report.spec for report in reports[:2]] == ["relative:level=0.0", "relative:level=6.0"]
    assert reports[1].noise_level == pytest.approx(6.0)


def test_the_page_of_a_training_says_what_gradients_tell(trained: Report) -> None:
    seen = Page(page([trained], "fedsea audit"))
    assert {"learnt tokens", trained.limit, share(trained.learnt)} <= set(seen.texts)
    assert "not bounded in training" in trained.limit
    assert any("optimizer steps: 2" in text for text in seen.texts)


@pytest.mark.parametrize(
    ("mechanism", "name"),
    [
        ("relative:level=2.0", "relative"),
        ("gaussian:std=2.0", "gaussian"),
        ("relative-clipped-gaussian:clip=0.5,level=2.0", "relative-clip:norm=0.5+relative"),
        ("clip:norm=3.0+gaussian:std=1e+3", "clip:norm=3.0+gaussian"),
        ("clip:norm=3.0", "clip:norm=3.0"),
    ],
)
def test_a_family_is_named_without_its_strength(mechanism: str, name: str) -> None:
    assert parse_mechanism(mechanism).family == name


def test_a_chart_is_well_formed_and_stays_within_itself() -> None:
    curves = [
        Curve("one <&>", [(0.0, 0.9, 1.0, 1.0), (2.3, 0.5, 0.6, 0.7), (10.0, 0.0, 0.1, 0.2)]),
        Curve("other", [(0.0, 0.1, 0.1, 0.1), (10.0, 0.1, 0.1, 0.1)], bound=True),
    ]
    macros: Any = environment().get_template("chart.svg.j2").module
    seen = Page(macros.chart(Chart("A <title>", "y", curves, percent=True)))
    lines = [given for name, given in seen.tags if name == "polyline"]
    points = [[tuple(map(float, pair.split(","))) for pair in (line["points"] or "").split()] for line in lines]
    assert [len(one) for one in points] == [3, 2]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for one in points for x, y in one)
    assert [y for _, y in points[0]] == sorted(y for _, y in points[0])  # less is further down
    assert {"one <&>", "other", "100 %", "2.3", "10"} <= {text for _, text in seen.drawn}
    assert len({line["stroke-dasharray"] for line in lines}) == 2


@pytest.mark.parametrize("value", [0.0, 0.03, 4.0, 13.01, 39.9, 40.0, 9999.0])
def test_an_axis_ends_at_a_round_number(value: float) -> None:
    assert value <= rounded_up(value) <= max(4.0, 1.6 * value)
    assert float(f"{rounded_up(value) / 4:.2g}") == pytest.approx(rounded_up(value) / 4)


def test_labels_do_not_stand_on_each_other() -> None:
    placed = spaced([50.0, 50.0, 20.0, 55.0, 249.0, 248.0], 18, 250)
    assert all(after - before >= LINE - 1e-9 for before, after in itertools.pairwise(sorted(placed)))
    assert placed[2] == min(placed) == 20.0
    assert max(placed) <= 250


def text_width(text: str, size: float) -> float:
    """Width in DejaVu Sans, bold, in pixels: a wide font, so that what fits in it fits in others."""
    ft2font: Any = pytest.importorskip("matplotlib.ft2font")
    font_manager: Any = pytest.importorskip("matplotlib.font_manager")
    font = ft2font.FT2Font(font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight="bold")))
    font.set_size(size, 72)
    font.set_text(text, 0)
    return float(font.get_width_height()[0]) / 64


@pytest.mark.parametrize("several", [True, False])
def test_nothing_overflows_on_the_page(reports: list[Report], trained: Report, several: bool) -> None:
    seen = Page(page(reports[:2] if several else [trained], "fedsea audit"))
    for place, text in seen.drawn:
        if "x" in place and place.get("text-anchor") is None:  # a curve's name, at the right
            assert float(place["x"] or 0) + text_width(text, 11) <= WIDTH
    assert bool(seen.drawn) == several
    # A table is as wide as the longest words of its columns need; below 56 rem it is a list instead.
    room = 56 * 16 - 2 * 1.25 * 16
    tables = [list(rows) for _, rows in itertools.groupby(seen.rows, key=len)]
    assert tables
    for rows in tables:
        columns = [
            [text_width(word, 0.9 * 16) for cell in column for word in unbroken(cell)]
            for column in zip(*rows, strict=True)
        ]
        assert sum(max(column, default=0.0) + 0.6 * 16 for column in columns) <= room


def unbroken(cell: str) -> list[str]:
    """What is never broken of a cell: figures are in one piece, names break at spaces and hyphens."""
    stripped = " ".join(cell.split())
    return [stripped] if re.fullmatch(r"[\d.… %–]*", stripped) else re.split(r"[ -]", stripped)


def test_the_command_writes_page_and_json(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "texts.txt", tmp_path / "report.html"
    data.write_text("Mr. Voss pays at once.\n")
    options = ["--data", str(data), "--levels", "0,3", "--attack", "search", "--input-layers", "0", "--threads", "1"]
    arguments = ["audit", small, *options, "--report", str(out), "--json", str(tmp_path / "report.json")]
    assert command(arguments) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("relative:level=0", "most", "Decision: "))
    assert f"fedsea {' '.join(arguments)}" in Page(out.read_text()).texts
    found = json.loads((tmp_path / "report.json").read_text())
    assert [one["spec"] for one in found] == ["relative:level=0.0", "relative:level=3.0"]
