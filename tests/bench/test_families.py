"""Which families can be split: the command, and the page that it has written."""

import json
import re
from pathlib import Path

import pytest

from fedsea.cli import run

ROOT = Path(__file__).parents[2]


def test_types_are_compared_and_written_as_a_page_and_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, lines = tmp_path / "models.md", tmp_path / "models.json"
    assert run(["bench", "families", "gpt2", "bert", "--output", str(page), "--json", str(lines)]) == 0
    assert "1 of 2 types are equal" in capsys.readouterr().out
    assert [(one["model_type"], bool(one["why_not"])) for one in json.loads(lines.read_text())] == [
        ("gpt2", False),
        ("bert", True),
    ]
    assert "**1 of 2 types are equal.**" in page.read_text()
    assert "| `bert` | no: it is an encoder |" in page.read_text()


def test_an_unknown_type_is_told_with_what_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "families", "gemma3_txt"]) == 2
    assert "gemma3_text" in capsys.readouterr().err


def test_the_page_and_the_readme_have_one_sum() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    equal, known = len(re.findall(r"\| equal \|", page)), len(re.findall(r"^\| `", page, re.MULTILINE))
    assert f"**{equal} of {known} types are equal.**" in page
    assert f"[{equal} of the types that it knows](docs/models.md)" in (ROOT / "README.md").read_text()
