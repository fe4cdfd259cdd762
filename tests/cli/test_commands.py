"""The commands: what they print, and that every failure is one line that says what to do."""

import dataclasses
import io
import json
import signal
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import fedsea
from fedsea import SplitModelForCausalLM
from fedsea.cli import run
from fedsea.errors import ServerUnavailableError
from fedsea.server import Limits, ServerOptions
from tests.conftest import RunningServer

NAME = "smollm2-135m"
THERE = ["--server", "ADDRESS", "--insecure"]
SERVE = ["serve", "random:tiny", "--listen", "127.0.0.1:0", "--insecure"]


@pytest.fixture(scope="module")
def address(start_server: Callable[..., RunningServer]) -> Iterator[str]:
    """A server of the default model."""
    server = start_server(NAME)
    yield server.address
    server.stop()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["generate"], 2, "Missing argument 'MODEL'"),
        (["serve", "random:tiny", "--threads", "0", "--insecure"], 2, "--threads"),
        ([*SERVE, "--device", "abacus"], 2, "no device 'abacus'"),
        (["generate", "random:tiny", *THERE, "--prompt", "x"], 1, "tokenizer"),
        (["chat", "random:tiny", *THERE], 1, "tokenizer"),
        (["demo", "--model", "random:tiny"], 1, "tokenizer"),
    ],
)
def test_an_error_is_one_line_that_says_what_is_wrong(
    arguments: list[str], code: int, says: str, tiny_server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([tiny_server.address if word == "ADDRESS" else word for word in arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedsea: error: ")
    assert says in line


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (RuntimeError("the sky\nfell"), 1, "unexpected RuntimeError: the sky fell; FEDSEA_DEBUG=1 shows where\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_unexpected_error_is_one_line_and_ctrl_c_none(
    raised: BaseException, code: int, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_name: str) -> None:
        raise raised

    monkeypatch.setattr("fedsea.checkpoints.names.check_model", broken)
    assert run(["demo"]) == code
    assert capsys.readouterr().err == (f"fedsea: error: {says}" if says else "")
    monkeypatch.setenv("FEDSEA_DEBUG", "1")
    assert run(["demo"]) == code
    assert ("Traceback" in capsys.readouterr().err) is (code == 1)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"fedsea {fedsea.__version__}\n"
    assert run([]) == 0
    assert "serve" in capsys.readouterr().out
    assert run(["serve", "--help"]) == 0
    assert "smollm2-135m (a Python package" in capsys.readouterr().out


def test_each_limit_has_a_flag_in_the_unit_of_its_help(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Limits] = []

    class Server:
        def __init__(self, _checkpoint: object, options: ServerOptions) -> None:
            seen.append(options.limits)
            raise KeyboardInterrupt

    monkeypatch.setattr("fedsea.server.BlockServer", Server)
    flags = {
        field.name: typing.get_type_hints(Limits, include_extras=True)[field.name].__metadata__[0]
        for field in dataclasses.fields(Limits)
    }
    names = {name: flag.name or f"--{name.replace('_', '-')}" for name, flag in flags.items()}
    assert run(SERVE) == 130
    assert run([*SERVE, *(word for flag in names.values() for word in (flag, "1"))]) == 130
    assert seen == [Limits(), Limits(**{name: 1 << 20 if flag.endswith("-mib") else 1 for name, flag in names.items()})]


def test_sigterm_tells_the_sessions_and_exits_with_0() -> None:
    command = [sys.executable, "-m", "fedsea", *SERVE, "--json", "--layers", "1:5", "--cache-mib", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline())
        assert ready["model"] == "random:tiny"
        assert ready["layers"] == [1, 5]
        assert ready["cache_bytes"] == 64 << 20
        assert ready["weight_bytes"] > 0
        model = SplitModelForCausalLM.from_pretrained(
            "random:tiny", server=ready["address"], insecure=True, reconnect_seconds=0.0, notice=lambda _line: None
        )
        cache = model.new_cache()
        model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
        server.send_signal(signal.SIGTERM)
        _out, log = server.communicate(timeout=30)
        assert server.returncode == 0
        with pytest.raises(ServerUnavailableError):
            model(torch.tensor([[4]]), past_key_values=cache)
    lines = [line for line in log.splitlines() if "the block server is stopping" in line]
    assert len(lines) == 1
    assert lines[0].startswith("time=")
    assert "session=" in lines[0]
    assert "Traceback" not in log


def test_generate_prints_json_for_programs(address: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("What is the capital of France?", encoding="utf-8")
    command = ["generate", NAME, "--server", address, "--insecure", "--prompt-file", str(prompt), "--json"]
    assert run([*command, "--max-new-tokens", "20"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == "The capital of France is Paris."
    assert answer["ended"] is True
    assert answer["tokens"] == answer["round_trips"] + answer["accepted_tokens"] == 8
    assert answer["sent_tokens"] == answer["prompt_tokens"] > 30
    assert answer["bytes_up"] > (answer["sent_tokens"] + 7) * 576 * 2
    assert answer["tokens_per_second"] > 0


def test_generate_raw_continues_the_text(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("1, 2, 3, 4,"))
    options = ["--insecure", "--prompt-file", "-", "--raw", "--max-new-tokens", "4"]
    assert run(["generate", NAME, "--server", address, *options]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(" 5,")
    assert "tokens/s" in printed.err


def test_chat_over_a_pipe(address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["/stats", "What is the capital of France?", "", "And of Spain?", "/stats", "/reset", "/nonsense", "/help"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert run(["chat", NAME, "--server", address, "--insecure", "--max-new-tokens", "12"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == ["There is no answer yet.", "The capital of France is Paris.", "The capital of Spain is Madrid."]
    assert "15 of 59 prompt tokens sent" in said[3]
    assert said[4] == "A new conversation begins."
    assert said[5] == "There is no command /nonsense."
    assert any(line.startswith("/quit") for line in said[6:])


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Count from one to fifty.\n/stats"))
    next_logits = SplitModelForCausalLM.next_logits
    steps = 0

    def interrupted(*arguments: object, **options: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 3:
            signal.raise_signal(signal.SIGINT)
        return next_logits(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(SplitModelForCausalLM, "next_logits", interrupted)
    assert run(["chat", NAME, "--server", address, "--insecure"]) == 0
    said = capsys.readouterr().out
    assert "(stopped)" in said
    assert "3 tokens" in said
