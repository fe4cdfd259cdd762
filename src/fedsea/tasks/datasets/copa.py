"""COPA: which of two sentences is the cause, or the effect, of a third? (Roemmele et al. 2011; SuperGLUE)"""

from collections.abc import Iterable
from typing import Any

from fedsea.tasks.base import Example, LabelTask
from fedsea.tasks.reading import Row

_LABELS: dict[Any, str] = {0: "choice1", 1: "choice2", "choice1": "choice1", "choice2": "choice2"}


class COPA(LabelTask):
    """A premise and two choices. The choice is named by its letter, as in the paper, not written out."""

    name = "copa"
    title = "COPA"
    needs = "premise, choice1, choice2, question (cause or effect), label (0 or 1)"
    verbalisers = {"choice1": "A", "choice2": "B"}  # noqa: RUF012 - never changed

    def examples(self, row: Row) -> Iterable[Example]:
        wanted = row.label("question", ["cause", "effect"])
        yield self.example(
            row,
            row.label("label", _LABELS),
            f'Choice A: "{row.text("choice1")}" or Choice B: "{row.text("choice2")}" '
            f'Premise: "{row.text("premise")}" Which is the {wanted} of the premise, A or B?',
        )
