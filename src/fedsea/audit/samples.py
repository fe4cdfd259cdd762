"""Texts to audit with: a user's own, or a few that are made up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedsea.chats import chat_tokens, has_chat_template
from fedsea.errors import UsageError
from fedsea.tasks import Example, Task, get_task
from fedsea.tasks.encoding import common_prefix
from fedsea.tasks.encoding import encode as encode_example
from fedsea.tasks.reading import Row, read_rows
from fedsea.text import read_text
from fedsea.training.examples import IGNORED, Encoded


class Question(NamedTuple):
    """A prompt and its answer, as they stand in a text: white space between them belongs to one of them."""

    prompt: str
    answer: str


class TaskText(NamedTuple):
    """An example of a task, written as a training on the task writes it."""

    task: Task
    example: Example


Text = str | Question | TaskText
PROBES = ("A", "7 and b")  # what a chat has in common with either in its place belongs to the chat template

# Of the kind that must not leave a house; people, places and firms are invented.
SAMPLES = (
    "Discharge note: Mrs. Ilse Varga, born 7 October 1951, was treated at the Hollenbach clinic for pneumonia from 3 "
    "to 11 February. She goes home with amoxicillin 500 mg three times a day and returns to Dr. Okonjo on the 18th.",
    "Please move 24,750 euros from the savings account of Tobias Renard to the notary Falk & Sohn before Thursday, and "
    "do not tell his brother Emil, who still believes that the house in Sankt Veit will be sold at auction.",
    "Our client, Marisol Quintero, admits that she signed the lease with Brightwater Estates on 29 August but says "
    "that the clause on early notice, worth $8,300, was added by their agent Mr. Dunmore after she had gone home.",
    "The biopsy of Rowan Ashdown shows a tumour of 14 mm in the left lung; the family has not been told yet. Surgery "
    "is planned at Saint Aldhelm hospital for the morning of 6 May, under Professor Lindqvist.",
    "Loan 40-7713 of the bakery Petrov Brothers is two payments behind. Their accountant Nadia Ferreira offers 1,900 a "
    "month from June; the branch in Kestrel Bay should refuse unless the father, Anton, signs as well.",
    "In the matter of the will of Harriet Combe, the witness Jonas Tveit now remembers that the second page was blank "
    "when he put his name under it in the kitchen at 12 Quarry Lane on Christmas Eve of 2016.",
)


def read_texts(file: Path) -> list[Text]:
    """The texts of a file.

    Of each object of a `.jsonl` the column `messages` (a conversation, as a training on it takes it), `text`, or
    `prompt` and `answer`; else of each line that is not blank.

    Raises
    ------
    UsageError
        If it cannot be read, or has none.
    """
    texts: list[Text]
    if file.suffix == ".jsonl":
        rows = read_rows(str(file), "validation", (), "an audit needs messages, text, or prompt and answer")
        texts = [text for row in rows for text in _texts_of(row)]
    else:
        texts = [line.strip() for line in read_text(file).split("\n") if line.strip()]
    if not texts:
        raise UsageError(f"there is no text in {file}")
    return texts


def read_task(name: str, path: str) -> list[Text]:
    """The examples of a task that a training on its data learns.

    Raises
    ------
    UsageError
        If there is no such task, or its data cannot be read.
    """
    task = get_task(name)
    return [TaskText(task, example) for example in task.read(path, "train")]


def _texts_of(row: Row) -> list[Text]:
    if row.has("messages"):
        chat = get_task("chat")
        return [TaskText(chat, example) for example in chat.examples(row)]
    # An answer goes on behind a space, as it would be written.
    return [Question(row.text("prompt"), f" {row.text('answer')}") if row.has("prompt") else row.text("text")]


def encode(text: Text, tokenizer: Any, tokens: int, *, answers: bool) -> tuple[Encoded, int]:
    """A text in at most `tokens` tokens, and how many of these are its prompt; a UsageError if nothing is left of it.

    With `answers` a question goes with its answer, which alone is learnt then; of other texts, everything is.
    """
    if isinstance(text, TaskText):
        return _encode_example(text, tokenizer, tokens, answers=answers)
    prompt = text.prompt if isinstance(text, Question) else text
    ids = list(tokenizer(prompt).input_ids)
    whole, first = ids, 0
    if isinstance(text, Question) and answers:
        whole, first = [*ids, *tokenizer(text.answer, add_special_tokens=False).input_ids], len(ids)
        if first >= min(tokens, len(whole)):
            raise UsageError(f"within {tokens} tokens there is no answer to {prompt!r}; take more tokens")
    kept = whole[:tokens]
    if not kept:
        raise UsageError(f"the text {prompt!r} has no tokens")
    labels = [IGNORED if place < first else token for place, token in enumerate(kept)]
    return Encoded(tuple(kept), tuple(labels), len(whole) - len(kept)), first or len(kept)


def _encode_example(text: TaskText, tokenizer: Any, tokens: int, *, answers: bool) -> tuple[Encoded, int]:
    """As `encode`: in training what the task learns, in a session all before the last answer."""
    encoded = encode_example(text.task, text.example, tokenizer, tokens)
    learnt = [label != IGNORED for label in encoded.labels]
    if answers:
        return encoded, learnt.index(True) or len(learnt)
    prompt = len(learnt)
    while prompt and learnt[prompt - 1]:
        prompt -= 1
    kept = encoded.input_ids[: prompt or len(learnt)]
    return Encoded(kept, (*[IGNORED] * len(kept),) if prompt else kept, encoded.cut), len(kept)


def known_start(texts: Sequence[Text], prompts: Sequence[Sequence[int]], tokenizer: Any) -> tuple[int, ...]:
    """What every prompt begins with that is public: the chat template's own start, or the begin-of-text token."""
    if all(isinstance(text, TaskText) for text in texts) and has_chat_template(tokenizer):
        public = public_start(tokenizer, [{"role": "user", "content": "?"}])
        return tuple(common_prefix([list(public), *map(list, prompts)]))
    first = {ids[0] for ids in prompts}
    return tuple(first) if first == {tokenizer.bos_token_id} else ()


def public_start(tokenizer: Any, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
    """What every chat of this model begins with: the template's tokens up to where a user's own words begin."""
    written = [chat_tokens(tokenizer, [{**message, "content": probe} for message in messages[:1]]) for probe in PROBES]
    return tuple(common_prefix(written))


def question_span(tokenizer: Any, messages: Sequence[dict[str, str]]) -> range:
    """Where in a chat's tokens the last message stands, without what the template puts around it."""
    tokens = chat_tokens(tokenizer, messages)
    others = [chat_tokens(tokenizer, [*messages[:-1], {**messages[-1], "content": probe}]) for probe in PROBES]
    before = min(len(common_prefix([tokens, other])) for other in others)
    after = min(len(common_prefix([tokens[::-1], other[::-1]])) for other in others)
    return range(before, max(before, len(tokens) - after))
