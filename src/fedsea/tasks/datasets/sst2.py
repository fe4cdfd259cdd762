"""SST-2: is a sentence of a film review positive? (Socher et al. 2013; GLUE)"""

from collections.abc import Iterable

from fedsea.tasks.base import Example, LabelTask
from fedsea.tasks.reading import Row

# As GLUE's file writes them, as numbers in JSON, and as the hub names them.
LABELS = {label: name for place, name in enumerate(("negative", "positive")) for label in (str(place), place, name)}


class SST2(LabelTask):
    """A sentence: positive or negative."""

    name = "sst2"
    title = "SST-2"
    needs = "sentence, label (1 for positive, 0 for negative)"
    verbalisers = {"positive": "Yes", "negative": "No"}  # noqa: RUF012 - never changed
    files = {  # noqa: RUF012 - never changed
        "train": ("train.tsv", *LabelTask.files["train"]),
        "validation": ("dev.tsv", *LabelTask.files["validation"]),
    }

    def examples(self, row: Row) -> Iterable[Example]:
        yield self.example(
            row,
            row.label("label", LABELS),
            '". Is its sentiment positive? Yes or No?',
            before='Sentence: "',
            context=row.text("sentence"),
        )
