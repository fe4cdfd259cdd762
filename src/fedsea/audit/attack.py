"""What an attack is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedsea.audit.observation import Knowledge, Observation

Progress = Callable[[int, int], None]
"""Called with how many texts are done, and how many there are."""


def no_progress(_done: int, _all: int) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class Recovery:
    """What an attack makes of one text.

    Attributes
    ----------
    tokens
        Its guess for each position; None where it has none (a read-out does not say what the first token was).
    labels
        For attacks on gradients: which tokens it believes were learnt, each at its own position (the one after that
        where it was predicted), None elsewhere; else empty.
    """

    tokens: tuple[int | None, ...]
    labels: tuple[int | None, ...] = ()


class Attack(ABC):
    """A way to read texts from what a provider sees.

    Attributes
    ----------
    name
        What it is called by.
    knows
        What its attacker knows beside what crosses the wire, in words.
    """

    name: ClassVar[str]
    knows: ClassVar[str]

    def prepare(self, knowledge: Knowledge) -> None:  # noqa: B027 - most have nothing to make
        """Make what serves all texts, such as tables, so that `run` only has to read."""

    @abstractmethod
    def run(
        self,
        texts: Sequence[Sequence[Observation]],
        knowledge: Knowledge,
        progress: Progress = no_progress,
    ) -> list[Recovery]:
        """Attack texts.

        Parameters
        ----------
        texts
            For each text, every look that the provider had at it, the first one first.
        knowledge
            What the attacker knows.

        Returns
        -------
        list
            A recovery for each text, with as many tokens as its looks have.

        Raises
        ------
        UsageError
            If what it needs (gradients, a colluder's texts) is not there.
        """
