"""`fedsea audit` on the default model, from texts to a verdict."""

import json
from pathlib import Path

import pytest

from fedsea.audit import SAMPLES, Auditor, Plan, read_texts
from fedsea.cli import run as command
from fedsea.errors import UsageError
from fedsea.partition import Partition
from fedsea.privacy import RelativeGaussianNoise

NAME = "smollm2-135m"
TEXT = "Mr. Adeyemi came to the Larkfield clinic on 14 May; his account at Norwick Bank holds $12,400."


def test_without_noise_a_provider_reads_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "texts.txt", tmp_path / "report.json"
    data.write_text(f"{TEXT}\n\nA second line that is not looked at.\n")
    options = ["--data", str(data), "--texts", "1", "--answer-tokens", "4", "--json", str(out)]
    attacks = ["--attack", "prior", "--attack", "search", "--attack", "read-out"]
    assert command(["audit", NAME, *options, *attacks]) == 0
    printed = capsys.readouterr()
    verdict = (
        "With this configuration a provider who knows the public weights reads 100 % of the text's tokens (search)"
    )
    assert " ".join(printed.out.split()).startswith(verdict)
    assert TEXT in " ".join(printed.out.split())
    assert "… search" in printed.err
    report = json.loads(out.read_text())
    found = {finding["attack"]: finding for finding in report["findings"]}
    assert found["search"]["prompt"]["tokens"]["mean"] == 1.0
    assert found["search"]["prompt"]["details"]["mean"] == 1.0
    assert found["search"]["answer"]["tokens"]["mean"] == 1.0
    assert found["search"]["texts"][0] == report["texts"][0] + report["answers"][0]
    assert found["read-out"]["answer"]["tokens"]["mean"] == 1.0
    assert found["prior"]["prompt"]["tokens"]["mean"] < 0.2
    assert report["texts"] == [TEXT]
    assert report["verdict"].startswith(verdict)


@pytest.mark.usefixtures("same_draws")
def test_an_audit_of_a_small_model_with_noise_and_observations(small: str) -> None:
    """A call does what the command does; noise hides texts from one observation, and not from the mean of many."""
    doing: list[str] = []
    plan = Plan(SAMPLES[:2], Partition(0, 1), tokens=12, observations=30)
    report = Auditor(small, plan, lambda what, _done, _all: doing.append(what)).report(RelativeGaussianNoise(4.0))
    found = {finding.attack: finding.prompt["tokens"].mean for finding in report.findings}
    assert list(found) == ["prior", "nearest", "search", "search-map", "read-out", "average"]
    assert found["search"] < 0.5 < found["average"]
    assert report.best() == report.finding("average")
    assert report.answers == ("", "")
    assert report.tokens == 24
    assert json.loads(json.dumps(report.to_json()))["partition"] == {"input_layers": 0, "output_layers": 1}
    assert {"sending the texts", "search", "average"} <= set(doing)


def test_texts_are_lines_or_objects(tmp_path: Path) -> None:
    lines, objects, empty = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "empty.txt"
    lines.write_text("one\n\n  two \n")
    objects.write_text('{"text": "one"}\n{"text": "two"}\n')
    empty.write_text("\n")
    assert read_texts(lines) == read_texts(objects) == ["one", "two"]
    with pytest.raises(UsageError, match="no text in"):
        read_texts(empty)


def test_a_partition_without_a_middle_leaves_nothing_to_attack(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["audit", NAME, "--input-layers", "15", "--output-layers", "15"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "leaves no middle" in line
