"""What a provider can read, told to whoever sends: a chat's live view, the warning at the start, the demonstration."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from fedsea import GaussianNoise, Partition
from fedsea.audit.live import LiveLeakage, Tap
from fedsea.audit.samples import public_start, question_span
from fedsea.checkpoints import load_tokenizer, open_checkpoint
from fedsea.cli import run
from fedsea.cli.options import tell_notice
from fedsea.client.conversation import Conversation, chat_tokens
from fedsea.errors import UsageError
from fedsea.parts import Rows
from fedsea.privacy import Magnitude, RelativeGaussianNoise, clipped_gaussian
from fedsea.privacy.warning import leak_warning
from fedsea.wire.credential_files import create_credentials
from fedsea.wire.credentials import Credentials
from tests.conftest import RunningServer, connect

QUESTION = "Does Mr. Voss owe 40 euros?"


def test_a_chat_shows_what_is_read_of_each_turn(
    small: str, there: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n/reset\nAnd\nthen?\n"))
    options = ["--max-new-tokens", "6", "--guesses", "2", "--threads", "1", "--show-leakage"]
    assert run(["chat", small, *there, *options]) == 0
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if "the provider reads" in line]
    assert len(lines) == 9
    tokens = len(load_tokenizer(small)(QUESTION).input_ids)
    assert lines[0] == f"the provider reads 100% of the question's {tokens} tokens (search): {QUESTION}"
    assert all(line.startswith("the provider reads 100% of the answer's 5 tokens (search): ") for line in lines[1::3])
    assert all(line.startswith("the provider reads 100% of the answer's 5 tokens (read-out): ") for line in lines[2::3])
    assert lines[3].endswith(": And")
    assert lines[6].endswith(": then?")


@pytest.mark.usefixtures("same_draws")
def test_noise_hides_the_question_and_not_the_answer(small: str, small_server: RunningServer) -> None:
    with connect(small_server, small, noise=GaussianNoise(3.0), partition=Partition(0, 1)) as model:
        conversation = Conversation(model, load_tokenizer(small), max_new_tokens=8)
        view = LiveLeakage(conversation, open_checkpoint(small))
        view.prepare()
        for _ in conversation.ask(QUESTION):
            pass
        question, _answer, read_out = view.turn()
    assert question.right < question.tokens / 2
    assert (read_out.right, read_out.tokens) == (7, 7)


def test_a_tap_keeps_the_text_as_it_stands() -> None:
    tap = Tap()
    states = torch.arange(12.0).view(6, 2)
    tap(Rows((0,), (4,)), states[:4], -states[:4])
    tap.first = 4
    tap(Rows((2,), (2,)), states[4:], -states[4:])  # two were rolled back
    assert len(tap) == 4
    assert tap.first == 2
    seen = tap.observation(3)
    assert torch.equal(seen.sent, states[[0, 1, 4]])
    assert seen.returned is not None
    assert torch.equal(seen.returned, -states[[0, 1, 4]])
    with pytest.raises(UsageError, match="one text at a time"):
        tap(Rows((0, 0), (1, 1)), states[:2], states[:2])


@pytest.mark.parametrize("content", [QUESTION, "A", "7 and b", "A 7 and b", "What?\nAnd then"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_question_is_what_the_template_is_not(content: str, system: str | None) -> None:
    tokenizer = load_tokenizer("smollm2-135m")
    opening = [] if system is None else [{"role": "system", "content": system}]
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for before in (opening, [*opening, *earlier]):
        messages = [*before, {"role": "user", "content": content}]
        tokens = chat_tokens(tokenizer, messages)
        span = question_span(tokenizer, messages)
        assert tokenizer.decode(tokens[span.start : span.stop]) == content
        start = public_start(tokenizer, messages)
        assert list(start) == tokens[: len(start)]
        assert 3 <= len(start) <= span.start
        assert system is None or system not in tokenizer.decode(start)


def test_nothing_is_read_of_what_does_not_leave(small: str, small_server: RunningServer) -> None:
    with connect(small_server, small, partition=Partition(2, 2)) as model:
        conversation = Conversation(model, load_tokenizer(small))
        with pytest.raises(UsageError, match="nothing leaves"):
            LiveLeakage(conversation, open_checkpoint(small))


def test_what_is_known_to_leak_is_told() -> None:
    one = Partition(1, 1)

    def warned(noise: object, partition: Partition = one, hidden: int = 576) -> str:
        return leak_warning(noise, partition, hidden, lambda: Magnitude(1.0, 24.0))  # type: ignore[arg-type]

    assert "without noise" in warned(GaussianNoise(0.0))
    assert "without noise" in warned(clipped_gaussian(3.0, 0.0))
    assert "no input layer" in warned(GaussianNoise(50.0), Partition(0, 1))
    assert "noise of 9 x the mean |h_A| is weak" in warned(GaussianNoise(9.0))
    assert "hides no answer" in warned(GaussianNoise(11.0))
    assert "weak" in warned(GaussianNoise(11.0), hidden=4096)  # a search has more to go by
    assert "weak" in warned(clipped_gaussian(24.0, 9.0))
    assert "hides no answer" in warned(clipped_gaussian(2.4, 9.0))  # clipped to a tenth, so ten times as strong


def test_the_warning_is_one_line_with_a_command_and_can_be_hidden(
    small: str,
    start_server: Callable[..., RunningServer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create_credentials(tmp_path, clients=["client-a"])
    secure = start_server(small, credentials=Credentials.load(tmp_path, "server"))
    near = ["--server", secure.address, "--credentials", str(tmp_path / "client-a")]
    ask = ["generate", small, *near, "--prompt", "x", "--max-new-tokens", "1", "--threads", "1"]
    assert run([*ask, "--noise", "relative:1.5"]) == 0
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("fedsea: noise of 1.5 x the mean |h_A| is weak")
    audits = f"fedsea audit {small} --input-layers 1 --output-layers 1 --noise "
    assert f"{audits}relative:level=1.5 --answer-tokens 32 " in first
    assert run([*ask, "--noise", "relative:1000"]) == 0
    assert "hides no answer" in capsys.readouterr().err
    said: list[str] = []
    with connect(
        secure, small, credentials=tmp_path / "client-a", noise=RelativeGaussianNoise(1.5), notice=said.append
    ) as model:
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    assert [("weak" in line, "gradients" in line) for line in said] == [(True, False), (False, True)]
    assert f"{audits}relative:level=1.5 --train-steps 4 --task TASK --data PATH " in said[1]
    tell_notice(said[1], ("cb", "my data (1)"))
    assert "--train-steps 4 --task cb --data 'my data (1)' (FEDSEA_LEAK_WARNING" in capsys.readouterr().err
    monkeypatch.setenv("FEDSEA_LEAK_WARNING", "off")
    assert run(ask) == 0
    assert "fedsea:" not in capsys.readouterr().err
    secure.stop()


def test_the_demonstration_reads_all_without_protection(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--audit", "--model", small, "--threads", "1", "--json"]) == 0
    printed = capsys.readouterr()
    first, *others = json.loads(printed.out)
    found = {finding["attack"]: finding for finding in first["findings"]}
    assert found["search"]["prompt"]["tokens"]["mean"] == 1.0
    assert [round(one["noise_level"], 6) for one in others] == [5.0, 15.0]
    for report in (first, *others):
        (read_out,) = (one for one in report["findings"] if one["attack"] == "read-out")
        assert read_out["answer"]["tokens"]["mean"] == 1.0
    assert first["texts"][0][:30] in printed.err
    assert run(["demo", "--audit", "--finetune"]) == 2
