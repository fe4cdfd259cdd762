"""What benches save, and the pages of the docs that show it: no figure there is typed."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedsea
from fedsea.errors import UsageError
from fedsea_bench.command import app
from fedsea_bench.quality_plan import Plan
from fedsea_bench.results import Line
from fedsea_bench.saved import Saved, command, filled, read_saved
from fedsea_bench.topics import TOPICS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))


def kept(*lines: Line) -> Saved:
    return Saved("fedsea bench inference --only kv-cache", "0.3.0", "2026-11-28", "2 cores", lines)


def figure(name: str, measured: float = 2.0) -> Line:
    return Line.of(name, measured, "x", conditions="here")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_the_saved_results_give(page: str) -> None:
    text = (DOCS / page).read_text()
    assert filled(text, read_saved(DOCS / "results")) == text, "run: fedsea bench figures docs"


def test_a_saved_result_says_how_it_was_measured_and_not_where() -> None:
    for name, one in read_saved(DOCS / "results").items():
        assert one.lines, name
        assert re.fullmatch(r"\d+\.\d+\.\d+", one.version), name
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", one.date), name
        assert one.command.startswith("fedsea bench "), name
        assert not re.search(r"/(home|root|tmp|work|Users)\b", (DOCS / "results" / f"{name}.json").read_text()), name


def test_the_papers_commands_are_topics_that_there_are() -> None:
    for bench, rest in re.findall(r"`?fedsea bench (\w+)([^`\n]*)", (DOCS / "paper.md").read_text()):
        assert bench in {*TOPICS, "quality", "figures"}
        assert set(re.findall(r"--only (\S+)", rest)) <= TOPICS.get(bench, {}).keys(), rest


def test_a_topic_is_saved_and_fills_its_marks(tmp_path: Path) -> None:
    arguments = ["inference", "--only", "client-weights", "--threads", "1", "--save", str(tmp_path / "results")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    (one,) = read_saved(tmp_path / "results").values()
    assert one.command == "fedsea bench inference --threads 1 --only client-weights"
    assert one.version == fedsea.__version__
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- figure inference-client-weights: LLaMA-2-7B -->1 %<!-- end --> <!-- files all --><!-- end -->"
    )
    for expected in (["page.md has new figures"], []):
        done = CliRunner().invoke(app, ["figures", str(tmp_path)])
        assert [line.rpartition("/")[2] for line in done.output.splitlines()] == expected
    assert "LLaMA-2-7B -->9.897 %<!-- end -->" in page.read_text()
    assert f"`{one.command}`" in page.read_text()


def test_a_command_names_what_differs_from_the_defaults_and_no_path() -> None:
    plan = Plan(Path("/home/me/data"), tasks="multirc", noise=["clip:norm=1", "0.5"], steps=20)
    expected = "fedsea bench quality --data DIR --tasks multirc --noise clip:norm=1 --noise 0.5 --steps 20"
    assert command("quality", plan) == expected


def test_a_mark_takes_the_one_line_that_has_its_words() -> None:
    saved = {"inference-kv-cache": kept(figure("KV cache: split"), figure("KV cache: split-at-2", 3.0))}
    page = (
        "<!-- figure inference-kv-cache: split -->9<!-- end --> <!-- spread inference-kv-cache: at-2 -->1<!-- end -->"
    )
    expected = page.replace("9<", "2 x<").replace("1<", "<")
    assert filled(page, saved) == filled(expected, saved) == expected


def test_what_is_not_saved_stays_and_an_empty_place_says_so() -> None:
    for page in ("<!-- figure training-speed: step -->9<!-- end -->", "<!-- lines inference -->\n9\n<!-- end -->"):
        assert filled(page, {"inference-kv-cache": kept(figure("KV cache"))}) == page
    assert "-->not measured yet<!--" in filled("<!-- figure training-speed: step --><!-- end -->", {})
    saved = {f"inference-{topic}": kept(figure(f"of {topic}")) for topic in TOPICS["inference"]}
    for marks, rows in (("inference", len(saved)), ("inference: kv-cache gpu", 2)):
        assert filled(f"<!-- lines {marks} --><!-- end -->", saved).count("| 2 x |") == rows


def test_the_papers_page_has_no_typed_figure() -> None:
    saved = read_saved(DOCS / "results")
    for name, text in re.findall(r"<!-- figure ([\w-]+): .+? -->(.*?)<!-- end -->", (DOCS / "paper.md").read_text()):
        assert name in saved or text == "not measured yet", name


@pytest.mark.parametrize("mark", ["inference-kv-cache: cache", "inference-kv-cache: whole", "inference-cache: split"])
def test_a_mark_of_no_figure_or_of_several_is_refused(mark: str) -> None:
    with pytest.raises(UsageError, match="a mark asks for"):
        filled(
            f"<!-- figure {mark} --><!-- end -->", {"inference-kv-cache": kept(figure("cache a"), figure("cache b"))}
        )


@pytest.mark.parametrize("text", ["{", "[]", '{"lines": []}', '{"lines": [{}]}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "inference-exactness.json").write_text(text)
    with pytest.raises(UsageError, match=r"inference-exactness\.json is not what --save writes"):
        read_saved(tmp_path)


def test_the_papers_page_names_files_that_there_are() -> None:
    named = set(re.findall(r"`((?:bench/…/|[a-z_]+/)*[a-z_]+(?:/|\.py))`", (DOCS / "paper.md").read_text()))
    paths = {name: name.replace("bench/…", "../../bench/src/fedsea_bench") for name in named}
    assert [name for name, path in paths.items() if not (DOCS.parent / "src" / "fedsea" / path).exists()] == []
    assert len(named) > 20
