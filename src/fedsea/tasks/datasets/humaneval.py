"""HumanEval: the body of a Python function, from its head and its description (Chen et al. 2021)."""

from collections.abc import Iterable, Sequence

from fedsea.tasks.base import Example, Question, WrittenTask
from fedsea.tasks.reading import Row
from fedsea.tasks.sandbox import runs_through


class HumanEval(WrittenTask):
    """The beginning of a program, to be continued; the official tests decide."""

    name = "humaneval"
    title = "HumanEval"
    needs = "task_id, prompt, entry_point, canonical_solution, test"
    metrics = ("pass@1",)
    cue = None
    max_new_tokens = 384
    stops = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # those of the paper, section 2.2
    files = {  # noqa: RUF012 - never changed
        "train": WrittenTask.files["train"],
        "validation": (
            *("HumanEval.jsonl", "HumanEval.jsonl.gz", "problems.jsonl", "test.jsonl"),
            *WrittenTask.files["validation"],
        ),
    }
    hub_splits = {"train": "train", "validation": "test"}  # noqa: RUF012 - never changed
    runs_code = True

    def examples(self, row: Row) -> Iterable[Example]:
        prompt, solution, test = (_as_it_is(row, name) for name in ("prompt", "canonical_solution", "test"))
        function = row.text("entry_point")
        if not function.isidentifier():
            raise row.wrong("the column 'entry_point' is no name of a function")
        # The last line end belongs to the answer: many tokenizers have one token for it and the spaces that follow, so
        # a model that was given the line end alone seldom goes on with an indented line.
        asked = prompt.rstrip()
        answer = prompt[len(asked) :] + solution
        check = f"{test}\ncheck({function})"
        yield Example(row.text("task_id"), Question(answer, question=asked), (answer,), check=check)

    def parse(self, text: str) -> str | None:
        ends = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        written = text[: min(ends, default=len(text))]
        return written if written.strip() else None

    def score(self, examples: Sequence[Example], predictions: Sequence[str | None]) -> dict[str, float]:
        passed = sum(_passes(example, written) for example, written in zip(examples, predictions, strict=True))
        return {"pass@1": passed / len(examples)}


def _passes(example: Example, written: str | None) -> bool:
    assert isinstance(example.content, Question)
    return written is not None and runs_through(f"{example.content.question}{written}\n{example.check}")


def _as_it_is(row: Row, name: str) -> str:
    """A column that is not blank, with all its white space."""
    row.text(name)
    return row.text(name, as_it_is=True)
