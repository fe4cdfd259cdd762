"""What a demonstration shows while it runs: its steps with their times, a question, and the answer as it comes."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console

from fedsea.text import printable


class Screen:
    """A console on which a demonstration runs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._mid_line = False

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Show that this goes on within the block, and then how long it took."""
        started = time.perf_counter()
        if self._mid_line:
            self._console.print("\n")
            self._mid_line = False
        with self._console.status(title):
            yield
        self._console.print(f"[green]done[/green] {time.perf_counter() - started:5.1f} s  {title}")

    def answer(self, question: str, pieces: Iterable[str]) -> None:
        """Show a question, and its answer piece by piece."""
        self._console.print(f"\n[bold]Question[/bold]  {question}\n[bold]Answer[/bold]    ", end="")
        for piece in pieces:
            self._console.print(printable(piece), end="", soft_wrap=True, markup=False)
            self._mid_line = True
