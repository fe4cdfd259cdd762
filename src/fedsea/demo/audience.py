"""Who watches a demonstration."""

from contextlib import AbstractContextManager
from typing import Protocol


class Audience(Protocol):
    """Who watches the demonstration."""

    def step(self, title: str) -> AbstractContextManager[None]:
        """Something begins that may take seconds; it ends with the context."""

    def ask(self, question: str) -> None:
        """The question is asked; pieces of the answer follow."""

    def piece(self, text: str) -> None:
        """A piece of the answer."""
