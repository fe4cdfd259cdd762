"""ReCoRD: which name of a news passage is missing in a statement about it? (Zhang et al. 2018; SuperGLUE)"""

from collections.abc import Iterable, Sequence

from fedsea.tasks import metrics
from fedsea.tasks.base import Example, Question, WrittenTask
from fedsea.tasks.reading import Row

PLACEHOLDER = "@placeholder"
HIGHLIGHT = "@highlight"


class ReCoRD(WrittenTask):
    """A passage, and a statement in which one name is replaced by @placeholder. One example a statement."""

    name = "record"
    title = "ReCoRD"
    needs = "passage (text), qas (query with @placeholder, answers with text)"
    metrics = ("f1", "em")
    max_new_tokens = 32

    def examples(self, row: Row) -> Iterable[Example]:
        if row.has("qas"):
            passage = row.row("passage").text("text")
            for number, query in enumerate(row.rows("qas")):
                golds = [answer.text("text") for answer in query.rows("answers")]
                yield self._statement(query, f"{row.id}/{number}", passage, golds)
        else:
            # A hub data set has a row a statement, and the answers as a list of texts.
            name = row.row("idx") if isinstance(row.fields.get("idx"), dict) else None
            where = f"{name.value('passage')}/{name.value('query')}" if name is not None else row.id
            if not row.has("query"):
                raise row.wrong("the column 'qas' is missing")
            yield self._statement(row, where, row.text("passage"), row.texts("answers"))

    def _statement(self, query: Row, name: str, passage: str, golds: list[str]) -> Example:
        statement = query.text("query")
        if PLACEHOLDER not in statement:
            raise query.wrong(f"the query has no {PLACEHOLDER}")
        golds = [gold for gold in dict.fromkeys(golds) if gold]
        if not golds:
            raise query.wrong("the query has no answer")
        content = Question(
            answer=golds[0],
            before=f'You need to predict what {PLACEHOLDER} represents in the query, based on the passage. Passage: "',
            # Highlights are the article's summary, as sentences of their own.
            context=" ".join(passage.replace(HIGHLIGHT, " ").split()),
            question=f'". Query: "{statement}" Which name does {PLACEHOLDER} represent? Answer with the name only.',
        )
        return Example(name, content, tuple(golds))

    def score(self, examples: Sequence[Example], predictions: Sequence[str | None]) -> dict[str, float]:
        return metrics.best_of_answers([example.golds for example in examples], predictions)
