"""What an attack is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch

from fedsea.audit.knowledge import Knowledge
from fedsea.audit.observation import Observation, Recovery

Progress = Callable[[int, int], None]
"""Called with how many texts are done, and how many there are."""


# The states that are sent or returned, the gradient of a training, or several observations of one text.
Reads = Literal["nothing", "sent", "returned", "gradient", "several"]


class Attack(ABC):
    """A way to read texts from what a provider sees. A new one is a file in `attacks/`, and nothing else."""

    name: ClassVar[str]  # that of its file, with hyphens
    knows: ClassVar[str]  # what its attacker knows beside what crosses the wire, in words
    reads: ClassVar[Reads]
    slow: ClassVar[bool] = False  # whether it takes minutes, so that an audit makes it only where it is named

    def prepare(self, knowledge: Knowledge) -> None:  # noqa: B027 - most have nothing to make
        """Make what serves all texts, such as tables, so that `read` only has to read."""

    @abstractmethod
    def read(self, observations: Sequence[Observation], knowledge: Knowledge) -> Recovery:
        """Attack one text.

        Parameters
        ----------
        observations
            Every observation of the text, the first one first.

        Returns
        -------
        Recovery
            With as many tokens as the text has.

        Raises
        ------
        UsageError
            If what it needs (gradients, returned states) is not there.
        """

    @torch.no_grad()
    def run(
        self,
        texts: Sequence[Sequence[Observation]],
        knowledge: Knowledge,
        progress: Progress = lambda _done, _all: None,
    ) -> list[Recovery]:
        """Attack texts one after the other: `read` of each."""
        found = []
        for done, observations in enumerate(texts, 1):
            found.append(self.read(observations, knowledge))
            progress(done, len(texts))
        return found
