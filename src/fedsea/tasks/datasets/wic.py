"""WiC: does a word mean the same in two sentences? (Pilehvar and Camacho-Collados 2019; SuperGLUE)"""

from collections.abc import Iterable

from fedsea.tasks.base import TRUTH, YES_NO, Example, LabelTask
from fedsea.tasks.reading import Row


class WiC(LabelTask):
    """Two sentences and a word that both use."""

    name = "wic"
    title = "WiC"
    needs = "word, sentence1, sentence2, label (true or false)"
    verbalisers = YES_NO

    def examples(self, row: Row) -> Iterable[Example]:
        yield self.example(
            row,
            row.label("label", TRUTH),
            f'"{row.text("sentence1")}" / "{row.text("sentence2")}" Similar sense of "{row.text("word")}"? Yes or No?',
        )
