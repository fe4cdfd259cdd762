"""How far a long piece of work is, on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedsea.cli.terminal import tell
from fedsea.text import printable

LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


class NowAndThen:
    """Says when it is time for another line of progress in a log, where no bar can be drawn."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self) -> bool:
        """Whether it is; it is not again for a while, then."""
        if time.monotonic() - self._last < LINE_SECONDS:
            return False
        self._last = time.monotonic()
        return True


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error if that is a terminal, else a line for each thing that is done, and then now and then.

    Told what is done, how much of it, and how much there is. Says nothing if `quiet`.
    """
    if quiet:
        yield lambda _doing, _done, _all: None
        return
    if not sys.stderr.isatty():
        told: set[str] = set()
        due = NowAndThen()

        def line(doing: str, done: int, every: int) -> None:
            if doing not in told:
                told.add(doing)
                tell(f"… {doing}", prefix="")
            elif due():
                tell(f"… {doing}: {done:,} of {every:,}", prefix="")

        yield line
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(compact=True))
    words = TextColumn("{task.description}", markup=False)
    with Progress(words, *columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("", total=None)
        yield lambda doing, done, every: bars.update(bar, description=printable(doing), completed=done, total=every)
