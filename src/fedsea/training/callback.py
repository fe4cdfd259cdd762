"""What takes part in a training, and its place in the checkpoints."""

from collections.abc import Mapping
from typing import Any


class Callback:
    """Takes part in a training. This one does nothing; a policy overrides what it needs.

    Epochs are numbered from 0. A step takes texts of one or of several, as a batch may go over from one to the next.
    """

    def begin(self, steps: int, epochs: int) -> str:
        """Before a training of `steps` and `epochs` in all begins or goes on; returns a line to tell, or none."""
        return ""

    def before_step(self, step: int, epochs: range) -> bool:
        """Before the texts of a step, from 0, leave; returns whether a checkpoint has to be written first."""
        return False

    def after_step(self, epochs: range, loss: float) -> None:
        """After a step, with its mean loss."""

    def end(self) -> None:
        """When the training is done, stopped, or has failed."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold of this, as JSON, beside what is there already."""
        return {}

    def load(self, state: Mapping[str, Any], step: int, recorded: int, epochs: int) -> str:
        """Go on from a checkpoint; returns a line for the user if a checkpoint has to be written at once, or none.

        Parameters
        ----------
        state
            All that the checkpoint holds as JSON.
        step
            Steps that it has done.
        recorded
            Steps whose figures were recorded before the training broke off; one more may have begun.
        epochs
            That the recorded steps have begun.
        """
        return ""
