"""XSum: a BBC article in one sentence (Narayan et al. 2018)."""

from collections.abc import Iterable, Sequence

from fedsea.tasks import metrics
from fedsea.tasks.base import Example, Question, WrittenTask
from fedsea.tasks.reading import Row


class XSum(WrittenTask):
    """An article, to be summarised in one sentence."""

    name = "xsum"
    title = "XSum"
    needs = "document, summary"
    metrics = ("rouge1", "rouge2", "rougeL")
    cue = "Summary:"
    max_new_tokens = 64
    one_line = False

    def examples(self, row: Row) -> Iterable[Example]:
        summary = row.text("summary")
        content = Question(
            answer=summary,
            before='You need to summarise the passage in one sentence. The passage is "',
            context=row.text("document"),
            question='".',
        )
        yield Example(row.id, content, (summary,))

    def check_packages(self) -> None:
        metrics.require_rouge()

    def score(self, examples: Sequence[Example], predictions: Sequence[str | None]) -> dict[str, float]:
        return metrics.rouge([example.golds[0] for example in examples], predictions)
