"""The metrics against independent implementations, on many random predictions, and on cases worked out by hand."""

import random
import re
import string

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from fedsea.tasks import Example, LabelTask, get_task
from fedsea.tasks.base import Document
from fedsea.tasks.metrics import (
    accuracy,
    best_of_answers,
    exact_match,
    leave_one_out,
    macro_f1,
    multirc,
    normalise,
    rouge,
    word_f1,
)

WORDS = ["the", "a", "an", "The", "barn,", "red!", "white;", "cat's", "dog", "42", "-", "(old)", "AN", "über", "it"]


def texts(random_: random.Random, longest: int = 6) -> str:
    return " ".join(random_.choices(WORDS, k=random_.randint(0, longest)))


@pytest.mark.parametrize("seed", range(30))
def test_accuracy_and_macro_f1_are_those_of_scikit_learn(seed: int) -> None:
    drawn = random.Random(seed)
    labels = ["entailment", "contradiction", "neutral"]
    golds = drawn.choices(labels, weights=[5, 4, 1], k=drawn.randint(1, 40))
    predictions: list[str | None] = list(drawn.choices([*labels, "unreadable"], weights=[4, 4, 2, 1], k=len(golds)))
    shown = [None if prediction == "unreadable" else prediction for prediction in predictions]
    assert accuracy(golds, shown) == pytest.approx(accuracy_score(golds, predictions))
    occurring = sorted({*golds, *predictions} - {"unreadable"}, key=str)
    wanted = f1_score(golds, predictions, labels=occurring, average="macro", zero_division=0)
    assert macro_f1(golds, shown) == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["boolq", "sst2"])
def test_tasks_of_two_labels_have_the_accuracy_of_scikit_learn(name: str) -> None:
    drawn, task = random.Random(0), get_task(name)
    assert isinstance(task, LabelTask)
    golds, predictions = (drawn.choices(list(task.verbalisers), k=50) for _ in range(2))
    examples = [Example(str(place), Document(""), (gold,)) for place, gold in enumerate(golds)]
    assert task.score(examples, predictions) == {"accuracy": pytest.approx(accuracy_score(golds, predictions))}


@pytest.mark.parametrize("seed", range(30))
def test_multirc_is_that_of_scikit_learn(seed: int) -> None:
    drawn = random.Random(seed)
    groups = [str(question) for question in range(drawn.randint(1, 12)) for _ in range(drawn.randint(1, 6))]
    golds = [drawn.random() < 0.4 for _ in groups]
    predicted = [drawn.random() < 0.5 for _ in groups]
    scores = multirc(groups, [str(gold) for gold in golds], [str(guess) for guess in predicted], right="True")

    # The official script takes a precision of 1 where nothing is predicted, so with no gold either F1 is 1.
    assert scores["f1a"] == pytest.approx(f1_score(golds, predicted, zero_division=1))
    precisions, recalls, matches = [], [], []
    for group in sorted(set(groups)):
        places = [place for place, other in enumerate(groups) if other == group]
        of, guessed = [golds[place] for place in places], [predicted[place] for place in places]
        precisions.append(precision_score(of, guessed, zero_division=1))
        recalls.append(recall_score(of, guessed, zero_division=1))
        matches.append(of == guessed)
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    f1m = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    assert scores["f1m"] == pytest.approx(f1m)
    assert scores["em"] == pytest.approx(sum(matches) / len(matches))


def test_multirc_by_hand() -> None:
    # Question a: one hit, one miss, one false alarm. Question b: both labelled right.
    groups, golds = ["a", "a", "a", "b", "b"], ["1", "1", "0", "1", "0"]
    scores = multirc(groups, golds, ["1", "0", "1", "1", "0"], right="1")
    assert scores["f1a"] == pytest.approx(2 / 3)  # precision 2/3, recall 2/3
    assert scores["f1m"] == pytest.approx(3 / 4)  # precisions 1/2 and 1, recalls 1/2 and 1
    assert scores["em"] == 0.5
    # An unreadable answer is wrong even where "not right" would be correct.
    assert multirc(groups, golds, ["1", "1", None, "1", "0"], right="1")["em"] == 0.5
    assert multirc(groups, golds, [None] * 5, right="1") == {"f1a": 0.0, "f1m": 0.0, "em": 0.0}


def reference_words(text: str) -> list[str]:
    """SQuAD's normalisation, written word by word."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return [word for word in re.sub(r"\b(?:a|an|the)\b", " ", text).split() if word]


def reference_f1(gold: str, prediction: str) -> float:
    wanted, given = reference_words(gold), reference_words(prediction)
    if not wanted or not given:
        return 1.0 if wanted == given else 0.0
    common = sum(min(wanted.count(word), given.count(word)) for word in set(wanted))
    return 2 * common / (len(wanted) + len(given))  # F1 as the Dice coefficient of two bags


def test_normalisation_by_hand() -> None:
    assert normalise("  The Barn's  an OLD, red (barn)! ") == "barns old red barn"
    assert normalise("another theatre a.m.") == "another theatre am"
    assert exact_match("The white cat.", "white CAT") == 1.0
    assert exact_match("white cat", "white cats") == 0.0
    assert word_f1("in a barn", "a big barn in the north") == pytest.approx(2 * (2 / 4) * 1 / (2 / 4 + 1))
    assert word_f1("no no yes", "no yes yes") == pytest.approx(2 / 3)
    assert word_f1("the", "a") == 1.0
    assert word_f1("the", "cat") == word_f1("cat", "the") == 0.0


@pytest.mark.parametrize("seed", range(30))
def test_f1_and_em_over_all_answers_are_those_of_a_second_implementation(seed: int) -> None:
    drawn = random.Random(seed)
    golds = [[texts(drawn) for _ in range(drawn.randint(1, 4))] for _ in range(12)]
    # Often a gold answer in another guise, so that there is something to match.
    given = [drawn.choice([texts(drawn), drawn.choice(of).upper() + "."]) for of in golds]
    best, left_out = [], []
    for of, prediction in zip(golds, given, strict=True):
        best.append(max(reference_f1(gold, prediction) for gold in of))
        rounds = [of[:k] + of[k + 1 :] for k in range(len(of))] if len(of) > 1 else [of]
        left_out.append(sum(max(reference_f1(gold, prediction) for gold in rest) for rest in rounds) / len(rounds))
    assert best_of_answers(golds, given)["f1"] == pytest.approx(sum(best) / len(best))
    assert leave_one_out(golds, given)["f1"] == pytest.approx(sum(left_out) / len(left_out))
    pairs = zip(golds, given, strict=True)
    matches = [reference_words(prediction) in [reference_words(gold) for gold in of] for of, prediction in pairs]
    assert best_of_answers(golds, given)["em"] == pytest.approx(sum(matches) / len(matches))


def test_coqa_leaves_one_answer_out_by_hand() -> None:
    # Right by one person of three: with that answer left out 0, else 1: (0 + 1 + 1) / 3.
    assert leave_one_out([["white", "grey", "black"]], ["White."])["em"] == pytest.approx(2 / 3)
    # Two say so: whichever is left out, the other is there.
    assert leave_one_out([["white", "white", "black"]], ["white"]) == {"f1": 1.0, "em": 1.0}
    # One answer only, as in the training file: compared with it.
    assert leave_one_out([["white"]], ["white"])["em"] == 1.0
    # F1: "big white" against white 2/3, grey 0: the better of the others, (0 + 2/3) / 2.
    assert leave_one_out([["white", "grey"]], ["big white"])["f1"] == pytest.approx(1 / 3)


def test_record_takes_the_best_of_all_answers_by_hand() -> None:
    assert best_of_answers([["Simon Bolivar", "Bolivar"]], ["bolivar"]) == {"f1": 1.0, "em": 1.0}
    scores = best_of_answers([["Simon Bolivar"], ["Nuria"]], ["Bolivar", None])
    assert scores == {"f1": pytest.approx(1 / 3), "em": 0.0}


def test_an_unreadable_answer_is_wrong_even_where_gold_normalises_to_nothing() -> None:
    assert best_of_answers([["the"]], [None]) == leave_one_out([["the"]], [None]) == {"f1": 0.0, "em": 0.0}


def test_rouge_is_the_mean_of_rouge_score() -> None:
    drawn = random.Random(0)
    golds = [texts(drawn, 15) + " running quickly" for _ in range(20)]
    given: list[str | None] = [texts(drawn, 15) + " runs quickly" for _ in range(19)]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = rouge(golds, [*given, None])
    for name in scorer.rouge_types:
        single = [scorer.score(gold, str(one))[name].fmeasure for gold, one in zip(golds[:19], given, strict=True)]
        assert scores[name] == pytest.approx(sum(single) / 20)


@pytest.mark.parametrize("name", ["cb", "multirc", "record", "coqa", "xsum", "boolq", "sst2"])
def test_a_task_gives_the_metrics_that_it_names(name: str) -> None:
    task = get_task(name)
    examples = [Example("1", Document(""), ("true",), "q"), Example("2", Document(""), ("true", "yes"), "q")]
    assert tuple(task.score(examples, ["true", None])) == task.metrics
