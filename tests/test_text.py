"""Text comes in and goes out through one door each: what is no UTF-8, and what could command a terminal."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fedsea.chats import chat_tokens, require_chat_template, write_chat
from fedsea.cli import run
from fedsea.cli.generate import read_prompt
from fedsea.cli.terminal import print_json, write_json
from fedsea.errors import BY_CODE, LimitExceededError, UsageError
from fedsea.text import one_line, printable
from fedsea.wire.contract import ERROR_KEY, error_from


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"What?\n", "What?"),
        (b"What?\r\n", "What?"),
        (b"What?\n\n", "What?\n"),
        (b"\n What? ", "\n What? "),
        (b"\xef\xbb\xbfWhat?", "What?"),
        ("one\u2028two\r\nthree\n".encode(), "one\u2028two\nthree"),
    ],
)
def test_a_prompt_file_has_no_byte_order_mark_and_not_its_final_newline(
    content: bytes, text: str, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_bytes(content)
    assert read_prompt(None, tmp_path / "prompt") == text


def test_a_prompt_that_is_no_text_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"one\ntwo caf\xe9")
    with pytest.raises(UsageError, match="prompt line 2: this is no text in UTF-8"):
        read_prompt(None, tmp_path / "prompt")
    with pytest.raises(UsageError, match=r"--prompt: there is half a character .* or a byte that is no UTF-8"):
        read_prompt(os.fsdecode(b"caf\xe9"), None)
    with pytest.raises(UsageError, match="cannot read"):
        read_prompt(None, tmp_path)


def test_what_could_command_a_terminal_is_written_out() -> None:
    assert printable("\x1b[31mred\x1b[0m \x9b2J \x07\r\x00") == "\\x1b[31mred\\x1b[0m \\x9b2J \\x07\\x0d\\x00"
    assert printable("a\u202eb\u2066c\u2028d\ud83d") == "a\\u202eb\\u2066c\\u2028d\\ud83d"
    kept = "tab\tline\nnaïve 日本 👩‍🚀 مرحبا\u200f می\u200cخواهم"
    assert printable(kept) == kept
    assert "".join(map(printable, "\x1b]0;owned\x07")) == printable("\x1b]0;owned\x07")
    assert one_line(" a\n\x1b[2Kfedsea:  all is well\x85") == "a \\x1b[2Kfedsea: all is well"


def test_json_is_read_as_it_was_and_commands_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"text": "\x1b]52;c;aGk=\x07\x9b2J\x7f\u202eb\u2028naïve 日本\ttab\nline"}
    print_json(said)
    write_json([said], tmp_path / "report.json")
    for written in (capsys.readouterr().out, (tmp_path / "report.json").read_text(encoding="utf-8")):
        assert printable(written) == written
        assert "naïve 日本" in written
        assert json.loads(written) in (said, [said])
    assert (tmp_path / "report.json").stat().st_mode & 0o077 == 0
    with pytest.raises(UsageError, match="cannot write"):
        write_json([said], tmp_path)


def test_an_error_of_a_server_cannot_command_a_terminal() -> None:
    error = error_from("full\x1b]52;c;aGk=\x07\nfedsea: done", [(ERROR_KEY, LimitExceededError.code)])
    assert type(error) is BY_CODE["limit"]
    assert str(error) == "full\\x1b]52;c;aGk=\\x07 fedsea: done"


def test_an_error_line_cannot_command_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", "m", "--whole", "--task", "\x1b[2J", "--data", "x"]) == 2
    told = capsys.readouterr().err
    assert "\x1b" not in told
    assert "\\x1b[2J" in told


@pytest.fixture(scope="module")
def tokenizer(small: str) -> Any:
    from fedsea import load_tokenizer

    return load_tokenizer(small)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "has no chat template"),
        ("{% if %}", "refuses these messages: .*[Ee]xpected"),
        ("{{ messages[0].missing.more }}", "refuses these messages: .*missing"),
        ("{{ messages + 1 }}", "refuses these messages: TypeError: "),
        ("{{ raise_exception('turn\x1b[31m by turn') }}", r"refuses these messages: turn\\x1b\[31m by"),
        ({"tool_use": "x"}, "refuses these messages: ValueError: "),
    ],
)
def test_a_template_that_is_missing_or_broken_is_one_line(
    tokenizer: Any, template: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    for write in (write_chat, chat_tokens):
        with pytest.raises(UsageError, match=says):
            write(tokenizer, [{"role": "user", "content": "hi"}])
    with pytest.raises(UsageError, match=says):
        require_chat_template(tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro go(n) %}{% for a in range(9) %}{{ go(n + 1) if n < 99 }}{% endfor %}{% endmacro %}{{ go(0) }}",
        "{{ range(99999) | map('string') | list | length }}",
    ],
    ids=["loops", "macros", "filters"],
)
def test_a_template_that_does_not_end_is_stopped(
    tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsea.chats.MOST_STEPS", 50_000)
    long = [{"role": role, "content": "hi"} for role in ["user", "assistant"] * 500]
    assert write_chat(tokenizer, long).count("hi") == 1000
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UsageError, match="does not end"):
        write_chat(tokenizer, long)


def test_a_template_without_a_system_message_says_so(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", refusing + "{{ messages[0].content }}")
    require_chat_template(tokenizer)
    with pytest.raises(UsageError, match="System role not supported; it takes no system message, so leave that"):
        require_chat_template(tokenizer, "be brief")


def test_a_chat_is_tokenised_as_transformers_does_it(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Grüße 👋"}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat_tokens(tokenizer, messages) == theirs
