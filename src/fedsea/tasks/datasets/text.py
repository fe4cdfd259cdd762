"""`text`: a user's own texts, learnt as they stand."""

from collections.abc import Iterable

from fedsea.tasks.base import Document, Example, LossTask
from fedsea.tasks.reading import Row


class Text(LossTask):
    """Lines of `{"text": ...}`. Every token is learnt; no chat template is involved."""

    name = "text"
    title = "text"
    needs = "text"

    def examples(self, row: Row) -> Iterable[Example]:
        yield Example(row.id, Document(row.text("text")))
