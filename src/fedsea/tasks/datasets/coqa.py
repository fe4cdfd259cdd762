"""CoQA: a conversation about a story, question by question (Reddy et al. 2019)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedsea.tasks import metrics
from fedsea.tasks.base import Example, Question, WrittenTask
from fedsea.tasks.reading import Row


class CoQA(WrittenTask):
    """A story, the conversation so far with its gold answers, and the next question. One example a question."""

    name = "coqa"
    title = "CoQA"
    needs = "story, questions and answers (each a list with input_text and turn_id)"
    metrics = ("f1", "em")
    max_new_tokens = 48
    files = {  # noqa: RUF012 - never changed
        "train": ("train.json", "coqa-train.json", "coqa-train-v1.0.json"),
        "validation": ("dev.json", "coqa-dev.json", "coqa-dev-v1.0.json", "val.json"),
    }

    def examples(self, row: Row) -> Iterable[Example]:
        story = row.text("story")
        questions, answers, others = _file_turns(row) if _has_turns(row) else _hub_turns(row)
        if len(questions) != len(answers):
            raise row.wrong(f"there are {len(questions)} questions and {len(answers)} answers")
        for turn, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            content = Question(
                answer=answer,
                before='You need to answer my questions based on the story, in a few words. The story is "',
                context=story,
                after='". My question is: ',
                question=question,
                history=tuple(zip(questions[:turn], answers[:turn], strict=True)),
            )
            golds = (answer, *(other[turn] for other in others))
            yield Example(f"{row.id}/{turn + 1}", content, golds)

    def score(self, examples: Sequence[Example], predictions: Sequence[str | None]) -> dict[str, float]:
        return metrics.leave_one_out([example.golds for example in examples], predictions)


_Turns = tuple[list[str], list[str], list[list[str]]]


def _has_turns(row: Row) -> bool:
    """Whether a question is an object, as in the official file, and not a text, as at the hub."""
    items = row.items("questions")
    return not items or isinstance(items[0], Mapping)


def _file_turns(row: Row) -> _Turns:
    """Questions, answers, and other people's answers, of an official dialogue; each list has an item a turn."""
    questions = _in_order(row.rows("questions"))
    answers = _in_order(row.rows("answers"))
    others: list[list[str]] = []
    if row.has("additional_answers"):
        extra = row.row("additional_answers")
        others = [_in_order(extra.rows(person)) for person in extra.fields]
    for other in others:
        if len(other) != len(questions):
            raise row.wrong(f"there are {len(questions)} questions and {len(other)} additional answers of one person")
    return questions, answers, others


def _in_order(turns: Sequence[Row]) -> list[str]:
    for number, turn in enumerate(turns, 1):
        if turn.value("turn_id") != number:
            raise turn.wrong(f"the turn_id is {turn.value('turn_id')}, where turn {number} should be")
    return [turn.text("input_text") for turn in turns]


def _hub_turns(row: Row) -> _Turns:
    answers: Any = row.row("answers").texts("input_text")
    return row.texts("questions"), answers, []
