"""MultiRC: which of several answers to a question about a paragraph are right? (Khashabi et al. 2018; SuperGLUE)"""

from collections.abc import Iterable, Sequence

from fedsea.tasks import metrics
from fedsea.tasks.base import TRUTH, YES_NO, Example, LabelTask, Question
from fedsea.tasks.reading import Row


class MultiRC(LabelTask):
    """A paragraph, a question, and an answer that may be right. One example an answer; any number may be right."""

    name = "multirc"
    title = "MultiRC"
    needs = "passage (text, questions with question and answers, each with text and label 0 or 1)"
    metrics = ("f1a", "f1m", "em")
    verbalisers = YES_NO

    def examples(self, row: Row) -> Iterable[Example]:
        if not row.has("passage"):
            return self._hub_examples(row)
        return self._file_examples(row)

    def _file_examples(self, row: Row) -> Iterable[Example]:
        passage = row.row("passage")
        paragraph = passage.text("text")
        for number, question in enumerate(passage.rows("questions")):
            group = f"{row.id}/{number}"
            for place, answer in enumerate(question.rows("answers")):
                label = answer.label("label", TRUTH)
                text = answer.text("text", may_be_blank=True)  # one answer of the official file is
                yield self._candidate(f"{group}/{place}", group, paragraph, question.text("question"), text, label)

    def _hub_examples(self, row: Row) -> Iterable[Example]:
        if not row.has("paragraph"):
            raise row.wrong("the column 'passage' is missing")
        index = row.row("idx")
        group = f"{index.number_of('paragraph')}/{index.number_of('question')}"
        yield self._candidate(
            f"{group}/{index.number_of('answer')}",
            group,
            row.text("paragraph"),
            row.text("question"),
            row.text("answer", may_be_blank=True),
            row.label("label", TRUTH),
        )

    def _candidate(self, name: str, group: str, paragraph: str, question: str, answer: str, label: str) -> Example:
        asked = f'". Question: "{question}" The possible answer is "{answer}". Is it correct? Yes or No?'
        content = Question(self.verbalisers[label], asked, 'The passage is "', paragraph)
        return Example(name, content, (label,), group)

    def score(self, examples: Sequence[Example], predictions: Sequence[str | None]) -> dict[str, float]:
        groups, golds = [example.group for example in examples], [example.golds[0] for example in examples]
        return metrics.multirc(groups, golds, predictions, right="true")
