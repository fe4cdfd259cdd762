"""Guesses: where they come from, and how many are made."""

import pytest

from fedsea.client.lookup import LONGEST_PAUSE, MISSES, PromptLookup


def test_the_longest_and_then_the_latest_repetition_is_taken() -> None:
    assert PromptLookup([1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3], 8).guess(1) == [50]
    assert PromptLookup([1, 2, 3, 50, 9, 1, 2, 3, 60, 1, 2, 3], 8).guess(1) == [60]
    assert PromptLookup([1, 2, 3, 50, 9, 2, 3, 60, 4, 2, 3], 8).guess(1) == [60]


@pytest.mark.parametrize("text", [[1], [1, 2], [1, 1], [1, 2, 3, 4], [5, 1, 6, 1]])
def test_without_a_repetition_nothing_is_guessed(text: list[int]) -> None:
    assert PromptLookup(text, 8).guess(5) == []


def test_a_text_that_goes_round_is_guessed_to_go_on() -> None:
    lookup = PromptLookup([4, 1, 2, 3, 1, 2, 3], 8)
    lookup.judge(2, 2)
    assert lookup.guess(9) == [1, 2, 3, 1]
    assert PromptLookup([0xD800, 300_000, 0xD800, 300_000], 8).guess(9) == [0xD800, 300_000]


def test_guesses_grow_while_they_are_right_and_are_never_more_than_allowed() -> None:
    lookup = PromptLookup([1, 1, 1, 1], 6)
    sizes = []
    for right in (2, 4, 3, 4, 0, 1):
        sizes.append(len(lookup.guess(9)))
        lookup.judge(sizes[-1], right)
    assert sizes == [2, 4, 6, 4, 6, 1]
    assert len(lookup.guess(1)) == 1
    assert lookup.guess(0) == lookup.guess(-1) == []
    assert len(PromptLookup([1, 1, 1, 1], 1).guess(9)) == 1


def test_guessing_pauses_after_misses_and_begins_again() -> None:
    lookup = PromptLookup([1, 1, 1, 1], 8)
    silent = []
    for _ in range(MISSES + 6):
        pause = 0
        while not (guess := lookup.guess(9)):
            pause += 1
        silent.append(pause)
        lookup.judge(len(guess), 0)
    assert silent == [0] * (MISSES + 1) + [2, 4, 8, LONGEST_PAUSE, LONGEST_PAUSE]
    while not lookup.guess(9):
        pass
    lookup.judge(1, 1)
    assert len(lookup.guess(9)) == 2
