"""The terminal: standard output and errors, notices, progress, tables, and what Ctrl-C and SIGTERM do.

What is written arrives, or one line says why it does not; a notice has a line of its own.
"""

import codecs
import io
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from fedsea.errors import FedSEAError
from fedsea.files import write_text
from fedsea.text import json_text, one_line, printable

if TYPE_CHECKING:  # rich takes a while to import
    from rich.console import Console
    from rich.table import Table

LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal

_open_line = False  # whether an answer has been written to standard output up to the middle of a line
_status = ""  # the status line that a terminal shows now


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
    """The same for standard error, but a failure is dropped: there is nowhere left to report it."""

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


def write_json(value: Any, file: Path) -> None:
    """Write a JSON file, or into a pipe; UsageError if it cannot be written."""
    write_text(file, json_text(value, indent=2) + "\n")


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
    """A notice on standard error: wrapped at words in a terminal, one line in a file or pipe.

    A `command` to be pasted is never broken; in a terminal it has a line of its own, between the message and `after`.
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
    """Where answer and notices share a terminal, end the answer's line, and remove the status line."""
    if _open_line and sys.stdout.isatty() and sys.stderr.isatty():
        end_line()
    _show_status("")


@contextmanager
def working(what: str, *, logged: bool = False) -> Iterator[None]:
    """Within the block a terminal shows what goes on; a log gets one line if `logged`, else nothing."""
    if sys.stderr.isatty():
        _break_line()
        _show_status(f"… {printable(what)}"[: shutil.get_terminal_size().columns - 1])
    elif logged:
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


class Progress(Protocol):
    """Shows how far a piece of work is: what is done, how much of it, how much there is, and figures about it."""

    def __call__(self, doing: str, done: int, total: int, figures: str = "") -> None: ...


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Progress]:
    """A bar on standard error if that is a terminal; in a log a line for each new thing, then one every ten seconds.

    Shows nothing if `quiet`.
    """
    if quiet:
        yield lambda doing, done, total, figures="": None
    elif not sys.stderr.isatty():
        yield _ProgressLines()
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        words = (TextColumn("{task.description}", markup=False), TextColumn("{task.fields[figures]}", markup=False))
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(compact=True))
        with Bars(words[0], *columns, words[1], console=Console(stderr=True), transient=True) as bars:
            bar = bars.add_task("", total=None, figures="")
            yield lambda doing, done, total, figures="": bars.update(
                bar, description=printable(doing), completed=done, total=total, figures=printable(figures)
            )


class _ProgressLines:
    """Progress in a log. Work with figures has a line for its first and last step as well."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._began = self._last = time.monotonic()
        self._first = 0

    def __call__(self, doing: str, done: int, total: int, figures: str = "") -> None:
        now, new = time.monotonic(), doing not in self._seen
        self._seen.add(doing)
        if new and not figures:
            tell(f"… {doing}", prefix="")
        elif new or now - self._last >= LINE_SECONDS or (figures and done == total):
            self._first = done - 1 if new else self._first
            left = (now - self._began) / max(1, done - self._first) * (total - done)
            more = f", {figures}, {left:.0f} s left" if figures else ""
            tell(f"… {doing}: {done:,} of {total:,}{more}", prefix="")
            self._last = now


@contextmanager
def stop_on_interrupt(notice: str = "") -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C is only noted, with a notice; a second one interrupts.

    Yields what says whether there was one.
    """
    interrupts = 0

    def note(_number: int, _frame: Any) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            raise KeyboardInterrupt
        if notice:
            # In a thread: the main one may be in the middle of writing to the very stream, which takes no second call.
            threading.Thread(target=tell, args=(notice,)).start()

    with _handled(note, signal.SIGINT):
        yield lambda: interrupts > 0


@contextmanager
def interrupt_on(*signals: signal.Signals) -> Iterator[None]:
    """Within the block, these signals stop what runs as Ctrl-C does."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    with _handled(interrupt, *signals):
        yield


@contextmanager
def _handled(handler: Callable[[int, Any], None], *signals: signal.Signals) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def table(*columns: str, title: str = "", caption: str = "", boxed: bool = False) -> "Table":
    """An empty table with these headings; a column whose heading begins with `>` is right-aligned.

    Where no heading has text, none is shown. A `boxed` table has lines between its cells and the console's width.
    """
    from rich import box
    from rich.table import Table

    style: dict[str, Any] = {"expand": True, "box": box.HEAVY_HEAD} if boxed else {"box": None, "pad_edge": False}
    made = Table(title=title or None, caption=caption or None, show_header=any(columns), title_style="bold", **style)
    made.title_justify = made.caption_justify = "left"
    for name in columns:
        made.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return made


def show_commands(console: "Console", heading: str, *commands: str) -> None:
    """Commands to be pasted, each on a line that is not broken, under a heading whose first words are bold."""
    console.print(f"\n[bold]{heading}")
    for command in commands:
        console.print(f"  {escape(command)}", soft_wrap=True)
