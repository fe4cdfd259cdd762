"""The official metrics. All run from 0 to 1; a prediction of None, an answer that could not be read, is wrong."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from fedsea.extras import require

Predictions = Sequence[str | None]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(golds: Sequence[str], predictions: Predictions) -> float:
    """Share of predictions that are the gold label."""
    return _mean([float(gold == prediction) for gold, prediction in zip(golds, predictions, strict=True)])


def macro_f1(golds: Sequence[str], predictions: Predictions) -> float:
    """The F1 of each label against all others, averaged with equal weights; CB's second metric (SuperGLUE, table 1).

    Averaged over the labels that occur among golds or predictions, as scikit-learn does. An unreadable answer is a
    miss of its gold label, and no label of its own.
    """
    labels = sorted({*golds, *(prediction for prediction in predictions if prediction is not None)})
    return _mean([_label_f1(label, golds, predictions) for label in labels])


def multirc(groups: Sequence[str], golds: Sequence[str], predictions: Predictions, right: str) -> dict[str, float]:
    """MultiRC's metrics, as its authors define them (Khashabi et al. 2018, section 5, and their evaluation script).

    Each candidate has a group (its question) and a label, `right` or another. `f1a`: F1 of "right" over all candidates.
    `f1m`: precision and recall of each question's candidates, averaged over questions, and the harmonic mean of the two
    averages; a question without predicted (or without gold) right candidates has a precision (a recall) of 1. `em`:
    share of questions all of whose candidates are labelled right.
    """
    questions: dict[str, list[tuple[bool, bool]]] = {}
    for group, gold, prediction in zip(groups, golds, predictions, strict=True):
        # An unreadable answer must not pass for "not right": it is taken as the opposite of its gold label.
        guess = gold != right if prediction is None else prediction == right
        questions.setdefault(group, []).append((gold == right, guess))
    marks = questions.values()
    every = [mark for question in marks for mark in question]
    precision, recall = _precision_recall(every)
    rates = [_precision_recall(question) for question in marks]
    return {
        "f1a": _harmonic(precision, recall),
        "f1m": _harmonic(_mean([rate[0] for rate in rates]), _mean([rate[1] for rate in rates])),
        "em": _mean([float(all(gold == predicted for gold, predicted in question)) for question in marks]),
    }


def normalise(text: str) -> str:
    """A short answer without casing, punctuation, English articles and extra white space (SQuAD's evaluation)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(gold: str, prediction: str) -> float:
    """1 if both are the same once normalised, else 0."""
    return float(normalise(gold) == normalise(prediction))


def word_f1(gold: str, prediction: str) -> float:
    """F1 of the words that both have in common, once normalised; where one has no words, 1 if neither has (SQuAD)."""
    wanted, given = normalise(gold).split(), normalise(prediction).split()
    if not wanted or not given:
        return float(wanted == given)
    common = sum((Counter(wanted) & Counter(given)).values())
    return _harmonic(common / len(given), common / len(wanted))


def best_of_answers(golds: Sequence[Sequence[str]], predictions: Predictions) -> dict[str, float]:
    """ReCoRD's metrics: of each prediction its best `f1` and `em` over all gold answers, averaged."""
    return _over_answers(max, golds, predictions)


def leave_one_out(golds: Sequence[Sequence[str]], predictions: Predictions) -> dict[str, float]:
    """CoQA's metrics: as `best_of_answers`, but fair to people, who are each compared with the others only.

    Of n > 1 gold answers each is left out in turn, the best over the other n - 1 is taken, and the n values are
    averaged (Reddy et al. 2019, section 6.1, and their evaluation script).
    """

    def over(values: list[float]) -> float:
        if len(values) == 1:
            return values[0]
        return _mean([max(values[:left] + values[left + 1 :]) for left in range(len(values))])

    return _over_answers(over, golds, predictions)


def require_rouge() -> None:
    """Raise a UsageError if the package for ROUGE is not installed."""
    require("ROUGE", "rouge_score")


def rouge(golds: Sequence[str], predictions: Predictions) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L, the F-measure of each, averaged: the package rouge-score, with Porter's stemmer."""
    require_rouge()
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [
        {name: score.fmeasure for name, score in scorer.score(gold, prediction).items()} if prediction else {}
        for gold, prediction in zip(golds, predictions, strict=True)
    ]
    return {name: _mean([score.get(name, 0.0) for score in scores]) for name in names}


def _over_answers(
    over: Callable[[list[float]], float], golds: Sequence[Sequence[str]], predictions: Predictions
) -> dict[str, float]:
    """Means over all predictions; `over` makes one value of those that a prediction has by each gold answer."""
    pairs = list(zip(golds, predictions, strict=True))
    return {
        name: _mean([over([measure(gold, given) for gold in of]) if given is not None else 0.0 for of, given in pairs])
        for name, measure in (("f1", word_f1), ("em", exact_match))
    }


def _label_f1(label: str, golds: Sequence[str], predictions: Predictions) -> float:
    hits = sum(gold == prediction == label for gold, prediction in zip(golds, predictions, strict=True))
    return 2 * hits / (list(golds).count(label) + list(predictions).count(label))


def _precision_recall(marks: Sequence[tuple[bool, bool]]) -> tuple[float, float]:
    """Precision and recall of (gold, predicted) marks."""
    hits = sum(gold and predicted for gold, predicted in marks)
    predicted_right, gold_right = sum(predicted for _, predicted in marks), sum(gold for gold, _ in marks)
    return hits / predicted_right if predicted_right else 1.0, hits / gold_right if gold_right else 1.0


def _harmonic(one: float, other: float) -> float:
    return 2 * one * other / (one + other) if one + other else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
