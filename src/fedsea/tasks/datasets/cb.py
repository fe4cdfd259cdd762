"""CB, CommitmentBank: is a hypothesis entailed by a text, contradicted, or neither? (de Marneffe et al. 2019)"""

from collections.abc import Iterable, Sequence

from fedsea.tasks import metrics
from fedsea.tasks.base import Example, LabelTask
from fedsea.tasks.reading import Row


class CB(LabelTask):
    """A premise and a hypothesis: entailment, contradiction or neutral."""

    name = "cb"
    title = "CB"
    needs = "premise, hypothesis, label (entailment, contradiction or neutral)"
    metrics = ("accuracy", "macro_f1")
    verbalisers = {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"}  # noqa: RUF012 - never changed

    def examples(self, row: Row) -> Iterable[Example]:
        yield self.example(
            row,
            row.label("label", list(self.verbalisers)),
            '". Is the hypothesis entailed by the premise? Yes, No or Maybe?',
            before=f'Hypothesis: "{row.text("hypothesis")}", premise: "',
            context=row.text("premise"),
        )

    def score(self, examples: Sequence[Example], predictions: Sequence[str | None]) -> dict[str, float]:
        golds = [example.golds[0] for example in examples]
        return {"accuracy": metrics.accuracy(golds, predictions), "macro_f1": metrics.macro_f1(golds, predictions)}
