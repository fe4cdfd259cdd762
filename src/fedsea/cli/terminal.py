"""Standard output and errors: what is written there arrives or is told about; notices have lines of their own."""

import codecs
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from fedsea.errors import FedSEAError
from fedsea.text import json_text, one_line, printable

_open_line = False  # whether an answer has been written to standard output up to the middle of a line
_status = ""  # what a terminal shows, in a line that will be taken away, of work that goes on


class _Output(io.FileIO):
    """A descriptor whose failures have one line for a person: a full disk, a stream that the shell has closed."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            # What is still in the buffer, and would fail again when Python flushes it at exit, goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            raise FedSEAError(f"cannot write to standard output: {error.strerror}") from None


class _Errors(_Output):
    """The same for standard error: whom could one tell that it cannot be written?"""

    def write(self, data: Any) -> int:
        with suppress(OSError, FedSEAError):
            super().write(data)
        return len(data)


def open_streams() -> None:
    """Put checked streams in the place of standard output and errors, which may be closed, full or no UTF-8.

    Characters that the stream's encoding does not have are written out (`\\xe9`).
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # Closed by the shell: the next file or connection would get its number. Writing to 1 has to fail, still.
            os.open(os.devnull, mode)
    sys.stdout = _stream(_Output(1), sys.stdout)
    sys.stderr = _stream(_Errors(2), sys.stderr)


def _stream(raw: _Output, before: TextIO | None) -> TextIO:
    encoding, at_once = "utf-8", raw.isatty()
    if isinstance(before, io.TextIOWrapper):
        encoding, at_once = before.encoding, before.line_buffering or before.write_through
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=at_once
    )


def escape(text: str) -> str:
    """Text as rich prints it: none of it is markup, and nothing in it commands the terminal."""
    from rich import markup

    return markup.escape(printable(text))


def print_json(value: Any, default: Callable[[Any], Any] | None = None) -> None:
    """One JSON object on a line of standard output, in the characters that its encoding has."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(json_text(value, ascii_only=codecs.lookup(encoding).name != "utf-8", default=default), flush=True)


def write_piece(text: str) -> None:
    """A piece of an answer, whose line may go on."""
    global _open_line
    print(printable(text), end="", flush=True)
    _open_line = not text.endswith("\n") if text else _open_line


def end_line() -> None:
    """What ends an answer."""
    global _open_line
    print(flush=True)
    _open_line = False


def tell(message: str, command: str = "", after: str = "", *, prefix: str = "fedsea: ") -> None:
    """A notice on standard error, on lines of its own.

    Parameters
    ----------
    message
        A terminal gets it wrapped at words; a file or pipe gets one line.
    command
        What may be pasted. It is never broken, and stands on a line of its own in a terminal.
    after
        What is to be said after the command.
    prefix
        Who speaks.
    """
    _break_line()
    message, command = f"{prefix}{one_line(message)}", printable(command)
    if sys.stderr.isatty():
        lines = [*_wrapped(message), *([f"  {command}"] if command else []), *_wrapped(after)]
    else:
        lines = [" ".join(filter(None, [f"{message}: {command}" if command else message, after]))]
    print("\n".join(lines), file=sys.stderr, flush=True)


def _wrapped(text: str) -> list[str]:
    width = shutil.get_terminal_size().columns
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def tell_error(message: str) -> None:
    """One line on standard error that says what has failed."""
    _break_line()
    print(f"fedsea: error: {one_line(message)}", file=sys.stderr, flush=True)


def _break_line() -> None:
    """Where answer and notices share a terminal, end the answer's line; take away what says that something goes on."""
    if _open_line and sys.stdout.isatty() and sys.stderr.isatty():
        end_line()
    _show_status("")


@contextmanager
def working(what: str, *, told: bool = False) -> Iterator[None]:
    """Within the block a terminal shows what goes on; elsewhere nothing does, or one line if `told`."""
    if sys.stderr.isatty():
        _break_line()
        _show_status(f"… {printable(what)}"[: shutil.get_terminal_size().columns - 1])
    elif told:
        print(f"… {one_line(what)}", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        _show_status("")


def _show_status(text: str) -> None:
    """Put a text in the place of what this has written last, at the beginning of a terminal's line."""
    global _status
    if text or _status:
        print(f"\r{' ' * len(_status)}\r{text}", end="", file=sys.stderr, flush=True)
    _status = text
