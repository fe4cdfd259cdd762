"""Guesses of what comes next, taken from the text itself (prompt lookup).

Text repeats itself: names, quotations, code, what was asked and is answered. Where the last few tokens have stood
before, what followed them then may follow now. The model checks several guesses in one step, and each that is right
saves a round trip (Saxena, "Prompt Lookup Decoding", 2023).
"""

from collections.abc import Iterable
from dataclasses import dataclass

LENGTHS = (3, 2)  # of the last tokens that must have stood before: the longer say more, so they are looked for first

# How many tokens to guess. On two CPU cores a guess adds some 15 % to a step (SmolLM2-135M: 48 ms with one token, 54
# with two, 74 with four, 93 with eight), so it pays if it is right once in seven times. A slow link makes it cheaper.
GUESSES = 8  # at a time, unless the user says otherwise: where all are right, 2 to 4 times the speed
FIRST = 2
MISSES = 3  # steps without a right guess before guessing pauses
LONGEST_PAUSE = 16  # occasions to guess that are let pass


@dataclass
class GuessCount:
    """How well guessing went: tokens that were guessed and sent, and those of them that were right, and were given."""

    guessed: int = 0
    accepted: int = 0


class PromptLookup:
    """Guesses the next tokens of one text, at most `most` at a time, more of them while they are right."""

    def __init__(self, text: Iterable[int], most: int, count: GuessCount | None = None) -> None:
        # One character a token: strings are searched fast, and a vocabulary is smaller than Unicode.
        self._text = "".join(map(chr, text))
        self._most, self._count = most, count or GuessCount()
        self._wanted = min(FIRST, most)
        self._misses = 0  # steps in a row of whose guesses none was right
        self._pause = 0

    def append(self, token: int) -> None:
        self._text += chr(token)

    def guess(self, room: int) -> list[int]:
        """What may come next, at most `room` tokens; empty if nothing suggests itself or guessing pauses."""
        if min(room, self._most) < 1 or (place := self._place()) is None:
            return []
        if self._pause:
            self._pause -= 1
            return []
        # Where what followed then runs into the end of the text, it goes round: the text has begun to repeat itself.
        followed = self._text[place:]
        return [ord(followed[index % len(followed)]) for index in range(min(self._wanted, room))]

    def judge(self, guessed: int, accepted: int) -> None:
        """Count how many of the last guesses were right, and learn from it."""
        self._count.guessed += guessed
        self._count.accepted += accepted
        self._wanted = min(2 * self._wanted if accepted == guessed else accepted + 1, self._most)
        self._misses = 0 if accepted else self._misses + 1
        if self._misses > MISSES:
            self._pause = min(2 ** (self._misses - MISSES), LONGEST_PAUSE)

    def _place(self) -> int | None:
        """Where the text went on when its last tokens stood there before, the latest time; None if never."""
        text = self._text
        for length in LENGTHS:
            found = text.rfind(text[-length:], 0, len(text) - 1) if len(text) > length else -1
            if found >= 0:
                return found + length
        return None
