"""How much of a text an attack has recovered. All scores run from 0 to 1, each text has one of its own."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fedsea.audit.observation import Recovery
from fedsea.audit.similarity import similarity
from fedsea.errors import UsageError
from fedsea.tasks.metrics import rouge

RESAMPLES = 2000
_WORD = re.compile(r"\w+|[^\w\s]")
_NUMBER = re.compile(r"\d[\d.,:/]*\d|\d")
_NAME = re.compile(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*")
_TITLE = re.compile(r"\b(Mrs?|Ms|Dr|Prof|St)\.$")
_SENTENCE_ENDS = set('.!?:\n"“”')


@dataclass(frozen=True)
class Score:
    """A score over texts: its mean, and the 95 % interval of the mean by resampling texts (percentile bootstrap)."""

    mean: float
    low: float
    high: float
    values: tuple[float | None, ...]  # of each text; None where it has nothing to score (no names and numbers in it)

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Self | None:
        """The score of texts; None if none of them has one."""
        known = np.array([value for value in values if value is not None])
        if not len(known):
            return None
        # Seeded: the same report twice has the same intervals.
        drawn = np.random.default_rng(0).integers(len(known), size=(RESAMPLES, len(known)))
        low, high = np.quantile(known[drawn].mean(1), [0.025, 0.975])
        return cls(float(known.mean()), float(low), float(high), tuple(values))


def score(
    truths: Sequence[Sequence[int]],
    recoveries: Sequence[Recovery],
    tokenizer: Any = None,
    masks: Sequence[Sequence[bool]] | None = None,
) -> dict[str, Score]:
    """Compare what was recovered with the texts' tokens: scores by name, each 0 to 1; one that no text has is left out.

    `tokens` is the share of right tokens, `exact` whether all are right. With a tokenizer also `rouge1`, `rouge2`,
    `rougeL`, `bleu4`, `details` (`details_recall`), and `similarity` if the package with the embedding model is
    installed. Only positions whose mask is true count: not what is public, such as a chat template.
    """
    rows = []
    for place, (truth, recovery) in enumerate(zip(truths, recoveries, strict=True)):
        mask = masks[place] if masks is not None else [True] * len(truth)
        if not len(truth) == len(recovery.tokens) == len(mask):
            raise UsageError(f"a text of {len(truth)} tokens was recovered as {len(recovery.tokens)}")
        pairs = [(right, guess) for right, guess, counts in zip(truth, recovery.tokens, mask, strict=True) if counts]
        rows.append(_of_text(pairs, tokenizer))
    return _over_texts(rows)


def label_scores(truths: Sequence[Sequence[int]], recoveries: Sequence[Recovery]) -> dict[str, Score]:
    """Compare what an attack says was learnt with what was: -100 in a truth is not learnt, and the first never counts.

    `labels` is the share of the learnt tokens that are named; `class` whether all of a text's are, which in a
    classification names the class; `learnt` the share of positions of which it is rightly said whether a token was
    learnt there. Empty if the attack says nothing of it.
    """
    rows = []
    for truth, recovery in zip(truths, recoveries, strict=True):
        pairs = list(zip(truth, recovery.labels, strict=True))[1:] if truth and recovery.labels else []
        hits = [label == guess for label, guess in pairs if label >= 0]
        learnt = _share([(label >= 0) == (guess is not None) for label, guess in pairs])
        rows.append({"labels": _share(hits), "class": float(all(hits)) if hits else None, "learnt": learnt})
    return _over_texts(rows)


def _over_texts(rows: Sequence[Mapping[str, float | None]]) -> dict[str, Score]:
    names = dict.fromkeys(name for row in rows for name in row)
    scores = {name: Score.of([row.get(name) for row in rows]) for name in names}
    return {name: found for name, found in scores.items() if found is not None}


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def _of_text(pairs: Sequence[tuple[int, int | None]], tokenizer: Any) -> Mapping[str, float | None]:
    hits = [right == guess for right, guess in pairs]
    values = {"tokens": _share(hits), "exact": float(all(hits)) if hits else None}
    if tokenizer is None:
        return values
    truth = tokenizer.decode([right for right, _ in pairs], skip_special_tokens=True)
    guess = tokenizer.decode([guess for _, guess in pairs if guess is not None], skip_special_tokens=True)
    if not truth.strip():
        return values
    return {
        **values,
        **rouge([truth], [guess]),
        "bleu4": bleu4(truth, guess),
        "details": details_recall(truth, guess),
        "similarity": similarity(truth, guess),
    }


def bleu4(truth: str, guess: str) -> float:
    """BLEU-4 of one text (Papineni et al. 2002), of words and punctuation marks as they are written.

    One text often has no four words in a row that are right, which would make the product 0: counts of two and more
    words get one added, above and below the line (Lin and Och 2004, BLEU+1).
    """
    right, words = _WORD.findall(truth), _WORD.findall(guess)
    logs = []
    for size in range(1, 5):
        wanted, given = _grams(right, size), _grams(words, size)
        hits, total = sum((wanted & given).values()), max(1, sum(given.values()))
        if size > 1:
            hits, total = hits + 1, total + 1
        if not hits:
            return 0.0
        logs.append(math.log(hits / total))
    brevity = min(0.0, 1 - len(right) / len(words))
    return math.exp(brevity + sum(logs) / 4)


def details(text: str) -> Counter[str]:
    """Names and numbers in a text: numbers, and words with a capital that no sentence begins with."""
    found = Counter(_NUMBER.findall(text))
    for match in _NAME.finditer(text):
        before = text[: match.start()].rstrip(" \t'‘(")
        word = match[0]
        begins = not before or (before[-1] in _SENTENCE_ENDS and not _TITLE.search(before))
        if word[0].isupper() and word != "I" and not begins:
            found[word] += 1
    return found


def details_recall(truth: str, guess: str) -> float | None:
    """Share of a text's names and numbers that stand in what was recovered, as often; None if it has none.

    Where in it they stand makes no difference.
    """
    wanted = details(truth)
    if not wanted:
        return None
    given = Counter(_NUMBER.findall(guess)) + Counter(_NAME.findall(guess))
    return sum((wanted & given).values()) / sum(wanted.values())


def _grams(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[at : at + size]) for at in range(len(words) - size + 1))
