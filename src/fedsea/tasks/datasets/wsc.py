"""WSC, the Winograd schema challenge: does a pronoun mean a certain noun phrase? (Levesque et al. 2012; SuperGLUE)"""

import re
from collections.abc import Iterable

from fedsea.tasks.base import TRUTH, YES_NO, Example, LabelTask
from fedsea.tasks.reading import Row

_EDGES = re.compile(r"^\W+|('s)?\W*$")


class WSC(LabelTask):
    """A text, a noun phrase in it (span 1), and a pronoun (span 2), which the prompt marks with asterisks."""

    name = "wsc"
    title = "WSC"
    needs = "text, target (span1_text, span1_index, span2_text, span2_index), label (true or false)"
    verbalisers = YES_NO

    def examples(self, row: Row) -> Iterable[Example]:
        target = row.row("target") if row.has("target") else row  # hub data sets have the spans as columns
        words = row.text("text").split()
        noun = " ".join(target.text("span1_text").split())
        pronoun = target.text("span2_text")
        find_span(target, words, "span1")
        place = find_span(target, words, "span2")
        end = place + len(pronoun.split())
        words[place:end] = [f"*{' '.join(words[place:end])}*"]
        asked = f'In "{" ".join(words)}", does the pronoun *{pronoun}* refer to "{noun}"? Yes or No?'
        yield self.example(row, row.label("label", TRUTH), asked)


def find_span(target: Row, words: list[str], span: str) -> int:
    """At which word a span begins.

    The official files count words between white space, but their spans differ from the words there in casing, in
    punctuation at the ends, in a possessive 's, in white space, and a few stand some words beside their index. So
    words are compared without all that, and of the places where the span fits, the one nearest to its index counts; if
    there is none, that is a UsageError.
    """
    wanted = [_bare(word) for word in target.text(f"{span}_text").split()]
    index = target.number_of(f"{span}_index")
    bare = [_bare(word) for word in words]
    places = [place for place in range(len(words)) if bare[place : place + len(wanted)] == wanted]
    if not places:
        raise target.wrong(f"the {span}_text {target.text(f'{span}_text')!r} does not occur in the text")
    return min(places, key=lambda place: abs(place - index))


def _bare(word: str) -> str:
    return _EDGES.sub("", word.lower())
