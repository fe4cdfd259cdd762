"""How far a long piece of work is, on standard error."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error if that is a terminal, else a line for each thing that is done."""
    if not sys.stderr.isatty():
        told: set[str] = set()

        def tell(doing: str, _done: int, _all: int) -> None:
            if doing not in told:
                told.add(doing)
                print(f"… {doing}", file=sys.stderr, flush=True)

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("", total=None)
        yield lambda doing, done, every: bars.update(bar, description=doing, completed=done, total=every)
