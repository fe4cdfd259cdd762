"""Odd terminals, pipes and disks: what a command writes arrives, or one line says why not."""

import contextlib
import io
import json
import logging
import os
import pty
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsea.cli import run
from fedsea.cli.serve import log_to_stderr
from fedsea.cli.terminal import end_line, tell, working, write_piece
from tests.conftest import RunningServer
from tests.support.ports import held_address

FEDSEA = f"{sys.executable} -m fedsea"


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (f"{FEDSEA} credentials > /dev/full", 1, "cannot write to standard output: No space left on device"),
        (f"{FEDSEA} --version >&-", 1, "cannot write to standard output: Bad file descriptor"),
        (f"{FEDSEA} --version 2>&- > /dev/full", 1, None),
        (f"{FEDSEA} nonsense 2>&-", 2, None),
        (f"PYTHONIOENCODING=ascii {FEDSEA} no\u00f1sense", 2, "No such command 'no\\xf1sense'"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line(command: str, code: int, says: str | None) -> None:
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.splitlines() == ([] if says is None else done.stderr.splitlines()[:1])
    assert (says or "") in done.stderr


class Terminal:
    """A terminal of this process: its standard streams, with somebody at the other end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> None:
        self._master, slave = pty.openpty()
        settings = termios.tcgetattr(slave)
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, settings)
        for name in ("stdin", "stdout", "stderr"):
            mode = "r" if name == "stdin" else "w"
            monkeypatch.setattr(sys, name, os.fdopen(os.dup(slave), mode, encoding="utf-8"))
        os.close(slave)
        monkeypatch.setenv("COLUMNS", str(columns))
        self._seen = bytearray()
        self._more = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # nobody has the terminal open any more
            while data := os.read(self._master, 4096):
                with self._more:
                    self._seen += data
                    self._more.notify_all()

    def after(self, place: int, words: str) -> int:
        """Where some words end that are shown after a place, once they are."""
        with self._more:
            assert self._more.wait_for(lambda: words.encode() in self._seen[place:], 60), self.text
            return self._seen.index(words.encode(), place) + len(words.encode())

    def type(self, line: str) -> None:
        os.write(self._master, line.encode() + b"\n")

    @property
    def text(self) -> str:
        return self._seen.decode().replace("\r\n", "\n")


def test_notices_have_lines_of_their_own_that_break_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    write_piece("an answer that is")
    words = " ".join(f"--option-{number}" for number in range(20))
    command = "fedsea audit " + " ".join(f"--option-{number}" for number in range(20))
    tell(f"look: {words}", command, "(and this)")
    write_piece(" going on")
    end_line()
    with working("loading"):
        tell("a notice meanwhile")
    terminal.after(0, "meanwhile\n".replace("\n", "\r\n"))
    answer, *notice = terminal.text.splitlines()
    assert answer == "an answer that is"
    told = notice[: notice.index(" going on")]
    assert told[-1] == "(and this)"
    assert told[-2] == f"  {command}"
    assert " ".join(told[:-2]) == f"fedsea: look: {words}"
    assert max(map(len, told[:-2])) <= 80
    assert "\x1b" not in terminal.text


def test_a_notice_in_a_log_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    tell("two\nlines \x1b[2J", "fedsea audit x", "(and this)")
    with working("loading"):
        pass
    assert capsys.readouterr().err == "fedsea: two lines \\x1b[2J: fedsea audit x (and this)\n"


def test_a_line_of_the_servers_log_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("fedsea")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        log_to_stderr()
        logger.info("refused client=a\x1b[2J\ntime=0 level=error")
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith('event="refused" client=a\\x1b[2J time=0 level=error')


@pytest.fixture
def cursing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the model says, it says with a sequence that commands a terminal, split over two pieces."""
    from fedsea.client.answer import TextPieces

    add = TextPieces.add

    def cursed(self: TextPieces, token: int) -> str:
        piece = add(self, token)
        return "\x1b" if len(piece) % 2 else f"]0;owned\x07{piece}"

    monkeypatch.setattr(TextPieces, "add", cursed)


@pytest.mark.usefixtures("cursing")
def test_an_answer_cannot_command_the_terminal_and_json_has_it_as_it_is(
    small: str, there: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["generate", small, *there, "--prompt", "hi", "--max-new-tokens", "6"]
    assert run(ask) == 0
    printed = capsys.readouterr()
    assert not set(printed.out) & {"\x1b", "\x07"}
    assert "(the answer was cut at 6 tokens" in printed.err
    assert run([*ask, "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert "\x1b" in text or "\x07" in text
    assert printed.out == text.replace("\x1b", "\\x1b").replace("\x07", "\\x07") + "\n"


def piped(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that conversations are asked."""
    from fedsea.client.conversation import Conversation

    seen: list[str] = []
    ask = Conversation.ask

    def note(self: Conversation, text: str) -> Any:
        seen.append(text)
        return ask(self, text)

    monkeypatch.setattr(Conversation, "ask", note)
    return seen


def test_a_pipe_holds_a_question_on_each_line_or_one_message(
    small: str,
    there: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = asked(monkeypatch)
    command = ["chat", small, *there, "--max-new-tokens", "3"]
    document = "\ufeffFirst é\n\nsecond\n".encode()
    piped(document, monkeypatch)
    assert run(command) == 0
    assert seen == ["First é", "second"]
    assert "each line of standard input is a question" in capsys.readouterr().err
    piped(document + b"caf\xe9\nthird", monkeypatch)
    assert run(command) == 0
    assert seen[2:] == ["First é", "second", "third"]
    assert "fedsea: error: standard input line 4: this is no text in UTF-8" in capsys.readouterr().err
    kept = tmp_path / "kept.jsonl"
    piped(document, monkeypatch)
    assert run([*command, "--input", "whole", "--conversation", str(kept)]) == 0
    assert seen[5:] == ["First é\n\nsecond"]
    assert kept.stat().st_mode & 0o777 == 0o600
    piped(b"and then?", monkeypatch)
    assert run([*command, "--conversation", str(kept)]) == 0
    messages = json.loads(kept.read_text())["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == [*seen[5:6], "and then?"]
    piped(b"caf\xe9", monkeypatch)
    capsys.readouterr()
    assert run([*command, "--input", "whole"]) == 2
    assert run([*command, "--conversation", str(kept), "--system", "x"]) == 2
    assert "has a conversation already, so leave --system out" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)
    assert run(command) == 2
    assert "standard input is closed" in capsys.readouterr().err


def test_a_chat_outlives_its_server(
    small: str, start_server: Callable[..., RunningServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(monkeypatch)  # here: pytest takes the streams back between a fixture and its test
    address = held_address()
    server = start_server(small, listen=address)
    failures: list[BaseException] = []

    def person() -> None:
        nonlocal server
        try:
            at = terminal.after(0, "/help lists the commands.")
            for line, answer in (
                ("Hello", "(the answer was cut at 3 tokens"),
                ("/nonsense", "There is no command /nonsense."),
                (f"/save {tmp_path / 'talk'}", "The conversation is saved in"),
            ):
                at = terminal.after(at, "\n> ")
                terminal.type(line)
                at = terminal.after(at, answer)
            at = terminal.after(at, "\n> ")
            server.stop()
            terminal.type("And now?")
            at = terminal.after(at, "fedsea: error: ")
            at = terminal.after(at, "saves it")
            at = terminal.after(at, "\n> ")
            server = start_server(small, listen=address)
            for line, answer in (
                ("/retry", "(the answer was cut at 3 tokens"),
                ("/retry", "There is no question without an answer."),
                (f"/save {tmp_path / 'again'}", "The conversation is saved in"),
                (f"/load {tmp_path / 'talk'}", "Continuing after 3 messages."),
                (f"/save {tmp_path / 'again'}", "is there already; take another name"),
            ):
                terminal.type(line)
                at = terminal.after(at, answer)
                at = terminal.after(at, "\n> ")
        except BaseException as error:
            failures.append(error)
        finally:
            terminal.type("/quit")

    thread = threading.Thread(target=person)
    thread.start()
    command = ["chat", small, "--server", address, "--insecure", "--max-new-tokens", "3", "--reconnect-seconds", "0"]
    assert run([*command, "--system", "Be brief."]) == 0
    thread.join(60)
    assert not failures, terminal.text
    talk, again = (json.loads((tmp_path / name).read_text())["messages"] for name in ("talk", "again"))
    assert [one["content"] for one in again if one["role"] == "user"] == ["Hello", "And now?"]
    assert again[:3] == talk
    assert talk[0] == {"role": "system", "content": "Be brief."}
    assert "… loading" in terminal.text
    server.stop()
