"""What follows from an audit: the decision, and that all of it is legible on a narrow terminal."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fedsea.audit import Report, decide, read_texts
from fedsea.audit.samples import TaskText, encode
from fedsea.audit.scores import Score
from fedsea.checkpoints import load_tokenizer
from fedsea.cli import run as command
from fedsea.tasks import get_task
from fedsea.tasks.encoding import encode as encode_example

MESSAGES = [
    {"role": "user", "content": "Where is Mr. Voss?"},
    {"role": "assistant", "content": "In ward 3."},
    {"role": "user", "content": "Since when?"},
    {"role": "assistant", "content": "Since 14 May."},
]


def unread(report: Report, *, answers: bool = True) -> Report:
    """The report as if no attack had read anything of texts and answers, and the model were of use."""

    def nothing(scores: dict[str, Score]) -> dict[str, Score]:
        return {name: replace(score, mean=0.0) for name, score in scores.items()}

    findings = tuple(replace(one, prompt=nothing(one.prompt), answer=nothing(one.answer)) for one in report.findings)
    kept = report.answers if answers else ("",) * len(report.answers)
    return replace(report, findings=findings, answers=kept, loss=3.0, public_loss=2.5)


def test_what_is_read_is_not_to_be_sent(reports: list[Report], trained: Report) -> None:
    found = decide(reports[:1])
    assert found.action == "do not send"
    assert "100 % of the text's tokens" in found.why
    assert len(found.options) == 3
    assert "tokens that are learnt" in decide([trained]).why


def test_an_answer_that_is_read_is_enough(reports: list[Report]) -> None:
    """No noise on the way in hides what the provider computes itself."""
    found = decide(reports[2:3])
    assert found.action == "do not send"
    assert "of the answer's tokens" in found.why
    assert "of the text's" not in found.why


def test_a_model_that_guesses_blindly_is_of_no_use(reports: list[Report]) -> None:
    blind = reports[0].blind_loss
    found = decide([replace(unread(reports[2]), loss=blind + 0.8)])
    assert found.action == "do not send"
    assert f"{blind + 0.8:.2f}" in found.why
    assert "of no use" in found.why


def test_an_answer_that_nobody_attacked_decides_nothing(reports: list[Report]) -> None:
    found = decide([unread(reports[2], answers=False)])
    assert found.action == "audit first"
    assert "--answer-tokens" in " ".join(found.options)
    alone = [one for one in reports[2].findings if one.attack == "prior"]
    assert decide([replace(reports[2], findings=tuple(alone))]).action == "audit first"


def test_of_what_may_be_sent_the_cheapest_is_named(reports: list[Report]) -> None:
    cheap, dear = unread(reports[3]), replace(unread(reports[2]), loss=4.0)
    found = decide([reports[0], dear, cheap])
    assert (found.action, found.mechanism) == ("send", cheap.spec)
    assert found.sentence.startswith(f"Send with --noise {cheap.spec}. ")
    assert "A better attack may exist" in found.why
    assert decide(reports).action == "do not send"


def test_a_conversation_is_audited_as_a_training_reads_it(small: str, tmp_path: Path) -> None:
    data = tmp_path / "my.jsonl"
    data.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    (text,) = read_texts(data)
    assert isinstance(text, TaskText)
    tokenizer, chat = load_tokenizer(small), get_task("chat")
    learnt = encode_example(chat, chat.read(str(data))[0], tokenizer, 512)
    found, prompt = encode(text, tokenizer, 512, answers=True)
    assert found == learnt
    assert [label == -100 for label in learnt.labels].index(False) == prompt
    asked, length = encode(text, tokenizer, 512, answers=False)
    assert len(asked.input_ids) == length
    said = tokenizer.decode(asked.input_ids)
    assert "In ward 3." in said
    assert "14 May" not in said


@pytest.mark.parametrize("more", [[], ["--task", "chat"]])
def test_the_file_that_is_trained_on_can_be_audited(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    data, out = tmp_path / "my.jsonl", tmp_path / "found.json"
    data.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    options = ["--data", str(data), *more, "--train-steps", "1", "--tokens", "128", "--input-layers", "0"]
    attacks = ["--attack", "nearest", "--attack", "gradient"]
    assert command(["audit", small, *options, *attacks, "--threads", "1", "--json", str(out)]) == 0
    assert "Decision: Do not send." in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["decision"]["action"] == "do not send"
    assert found["known"] > 5  # the chat template's own start is nobody's secret
    assert "Mr. Voss" in found["texts"][0]


def test_a_task_needs_its_data(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["audit", small, "--task", "chat"]) == 2
    assert "give --data PATH as well" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_on_a_terminal(
    reports: list[Report], trained: Report, width: int, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from fedsea.cli.audit import compare_reports, conclude, show_report

    monkeypatch.setenv("COLUMNS", str(width))
    for report in (reports[0], trained):
        show_report(report)
        conclude(decide([report]))
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= width
        assert all(re.search(rf"^{re.escape(one.attack)} ", printed, re.MULTILINE) for one in report.findings)
        assert not re.search(r"\w…", printed)  # an ellipsis stands for what was cut; an interval has spaces around
    compare_reports([*reports, replace(reports[3], spec="clip:norm=1.0+gaussian:std=123456.789012345")])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    assert not re.search(r"\w…", printed)
    assert "clip:norm=1+gaussian:std=1.235e+05" in printed
