"""RTE: does a hypothesis follow from a text? (Dagan et al. 2006 and later; SuperGLUE)"""

from collections.abc import Iterable

from fedsea.tasks.base import Example, LabelTask
from fedsea.tasks.reading import Row


class RTE(LabelTask):
    """A premise and a hypothesis: entailment or not."""

    name = "rte"
    title = "RTE"
    needs = "premise, hypothesis, label (entailment or not_entailment)"
    verbalisers = {"entailment": "Yes", "not_entailment": "No"}  # noqa: RUF012 - never changed

    def examples(self, row: Row) -> Iterable[Example]:
        yield self.example(
            row,
            row.label("label", list(self.verbalisers)),
            '". Is the hypothesis entailed by the premise? Yes or No?',
            before=f'Hypothesis: "{row.text("hypothesis")}", premise: "',
            context=row.text("premise"),
        )
