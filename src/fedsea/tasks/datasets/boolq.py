"""BoolQ: is the answer to a question about a passage yes? (Clark et al. 2019; SuperGLUE)"""

from collections.abc import Iterable

from fedsea.tasks.base import TRUTH, YES_NO, Example, LabelTask
from fedsea.tasks.reading import Row


class BoolQ(LabelTask):
    """A passage and a question about it, to be answered with yes or no."""

    name = "boolq"
    title = "BoolQ"
    needs = "question, passage, label (true or false)"
    verbalisers = YES_NO

    def examples(self, row: Row) -> Iterable[Example]:
        question = row.text("question").rstrip("?")
        asked = f"\nQuestion: {question}? Yes or No?"
        yield self.example(row, row.label("label", TRUTH), asked, context=row.text("passage"))
