"""What a task is: how it reads a data set, what it asks, which answers it takes, and how it scores them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fedsea.errors import UsageError
from fedsea.tasks import metrics
from fedsea.tasks.reading import Row, read_rows

Split = Literal["train", "validation"]

TRUTH: dict[Any, str] = {True: "true", False: "false", "True": "true", "False": "false"}
"""How official files (true, false, 1, 0) and hub data sets (True, False by name) write a truth value."""

YES_NO = {"true": "Yes", "false": "No"}


@dataclass(frozen=True)
class Question:
    """A question and its answer. The first message is `before + context + after` and the first question asked."""

    answer: str  # what the model is to say
    question: str  # never cut
    before: str = ""  # stands before the context; never cut
    context: str = ""  # what the question is about; truncation shortens it from its end
    after: str = ""  # stands after the context; never cut
    history: tuple[tuple[str, str], ...] = ()  # earlier questions and answers; the oldest are dropped after the context


@dataclass(frozen=True)
class Dialogue:
    """Messages of a chat, each a (role, content); the answers are those of the role "assistant".

    Truncation drops the oldest exchanges; a system message and the last exchange stay.
    """

    messages: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Document:
    """A text that is learnt as it stands. Truncation shortens it from its end."""

    text: str


Content = Question | Dialogue | Document


@dataclass(frozen=True)
class Example:
    """One example of a task."""

    id: str  # which one this is in its file
    content: Content
    golds: tuple[str, ...] = ()  # every answer that counts as right: the label of a LabelTask, texts of a WrittenTask
    group: str = ""  # what belongs together in a metric: MultiRC's question
    check: str = ""  # the program that an answer has to pass: HumanEval's tests


class Task(ABC):
    """One data set's task. A subclass is one file: its columns, its prompt, its answers, its metrics.

    Attributes
    ----------
    name
        What the command line calls it.
    title
        What its authors call it; errors name it so.
    needs
        The columns of its file, as errors name them.
    metrics
        The figures that `score` gives; the first is the main one.
    cue
        Stands before an answer where a tokenizer has no chat template. None if the answer continues the question's own
        text, character by character: no chat template is used then.
    files
        The names under which a folder may hold each split, in the order in which they are looked for.
    hub_splits
        What the hub's data set calls each split.
    runs_code
        Whether `score` runs what the model has written.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    cue: ClassVar[str | None] = "Answer:"
    files: ClassVar[Mapping[Split, tuple[str, ...]]] = {
        "train": ("train.jsonl",),
        "validation": ("val.jsonl", "validation.jsonl", "dev.jsonl"),
    }
    hub_splits: ClassVar[Mapping[Split, str]] = {"train": "train", "validation": "validation"}
    runs_code: ClassVar[bool] = False

    def read(self, path: str, split: Split = "train") -> list[Example]:
        """The examples of one split.

        Parameters
        ----------
        path
            A file, which is read whatever the split; a folder that holds the split under one of its usual names; or
            `hub:NAME` or `hub:NAME:CONFIG`, a data set of the Hugging Face hub.

        Raises
        ------
        UsageError
            If there is no such file, or its content is not as the task needs it; it names the line.
        """
        if split not in self.files:
            raise UsageError(f"the split must be train or validation; got {split!r}")
        examples = [example for row in self.rows(path, split) for example in self.examples(row)]
        if not examples:
            raise UsageError(f"{path} is empty; {self.title} needs {self.needs}")
        return examples

    def rows(self, path: str, split: Split) -> Iterator[Row]:
        """The rows of one split as they stand; path and errors are those of `read`."""
        return read_rows(path, self.hub_splits[split], self.files[split], f"{self.title} needs {self.needs}")

    @abstractmethod
    def examples(self, row: Row) -> Iterable[Example]:
        """The examples of one row: a line of the official file, or a row of the hub data set."""

    def check_packages(self) -> None:  # noqa: B027 - most need none
        """Raise a UsageError if a package that `score` needs is not installed."""

    @abstractmethod
    def score(self, examples: Sequence[Example], predictions: Sequence[str | None]) -> dict[str, float]:
        """The task's official metrics, each from 0 to 1; a prediction of None, which could not be read, is wrong."""


class LabelTask(Task):
    """A task whose answer is one of a few labels.

    Each label has one word, its *verbaliser*. The label whose word has the likeliest first token is the answer: nothing
    is generated.
    """

    verbalisers: ClassVar[Mapping[str, str]]  # from label to word
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def score(self, examples: Sequence[Example], predictions: Sequence[str | None]) -> dict[str, float]:
        return {"accuracy": metrics.accuracy([example.golds[0] for example in examples], predictions)}

    def example(self, row: Row, label: str, question: str, *, before: str = "", context: str = "") -> Example:
        """An example of this label, whose first (and only) message is `before + context + question`."""
        return Example(row.id, Question(self.verbalisers[label], question, before, context), (label,))


class WrittenTask(Task):
    """A task whose answer the model writes."""

    max_new_tokens: ClassVar[int]  # of the longest answer
    one_line: ClassVar[bool] = True  # whether an answer ends with its first line
    stops: ClassVar[tuple[str, ...]] = ()  # what ends an answer too, and is no part of it

    def parse(self, text: str) -> str | None:
        """The answer in what the model has written; None if there is none."""
        return " ".join(text.split()) or None


class LossTask(Task):
    """A task without a right answer to compare with: what counts is how likely the model finds the text."""

    metrics: ClassVar[tuple[str, ...]] = ("perplexity",)

    def score(self, examples: Sequence[Example], predictions: Sequence[str | None]) -> dict[str, float]:
        """Nothing: `evaluate` measures the loss itself."""
        return {}
