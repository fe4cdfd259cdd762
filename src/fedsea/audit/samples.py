"""Texts to audit with: a user's own, or a few that are made up."""

from pathlib import Path
from typing import Any, NamedTuple

from fedsea.errors import UsageError
from fedsea.tasks.reading import read_rows
from fedsea.text import read_text
from fedsea.training.examples import IGNORED, Encoded


class Question(NamedTuple):
    """A prompt and its answer, as they stand in a text: white space between them belongs to one of them."""

    prompt: str
    answer: str


Text = str | Question

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

    Of each object of a `.jsonl` the column `text`, or `prompt` and `answer`; else of each line that is not blank.

    Raises
    ------
    UsageError
        If it cannot be read, or has none.
    """
    texts: list[Text]
    if file.suffix == ".jsonl":
        rows = read_rows(str(file), "validation", (), "an audit needs text, or prompt and answer")
        texts = [
            # An answer goes on behind a space, as it would be written.
            Question(row.text("prompt"), f" {row.text('answer')}") if row.has("prompt") else row.text("text")
            for row in rows
        ]
    else:
        texts = [line.strip() for line in read_text(file).split("\n") if line.strip()]
    if not texts:
        raise UsageError(f"there is no text in {file}")
    return texts


def encode(text: Text, tokenizer: Any, tokens: int, *, answers: bool) -> tuple[Encoded, int]:
    """A text in tokens, and how many of them are its prompt.

    Parameters
    ----------
    tokens
        At most; what is more is cut off.
    answers
        Whether a question goes with its answer, which alone is learnt then; of other texts, everything is.

    Raises
    ------
    UsageError
        If nothing is left of the text, or of its answer.
    """
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
