"""What a provider sees of a text, and what an attack makes of it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """What the provider has of one text that was sent once, in float32 on the CPU. The text itself is not in it.

    Attributes
    ----------
    sent
        `h_A` as it came over the wire, `[tokens, hidden]`.
    returned
        `h_B` as it went back, `[tokens, hidden]`; None if it did not (a replay).
    gradient
        At `h_B`, `[tokens, hidden]`; None in inference.
    """

    sent: Tensor
    returned: Tensor | None = None
    gradient: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens of the text."""
        return len(self.sent)


@dataclass(frozen=True)
class Subject:
    """A text under attack: every observation of it, and the truth, which attacks are not given.

    Attributes
    ----------
    observations
        One for each time that the whole text was sent, the first one first. More than one in training (epochs), or
        where a text is sent again.
    tokens
        The text.
    prompt
        How many of its tokens were given to the model; what comes after is the answer.
    labels
        The tokens again where they were learnt, -100 elsewhere; None in inference.
    """

    observations: tuple[Observation, ...]
    tokens: tuple[int, ...]
    prompt: int
    labels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Recovery:
    """What an attack makes of one text.

    Attributes
    ----------
    tokens
        Its guess for each position; None where it has none (`read-out` does not say what the first token was).
    labels
        For attacks on gradients: which tokens it believes were learnt, each at its own position (the one after that
        where it was predicted), None elsewhere; else empty.
    """

    tokens: tuple[int | None, ...]
    labels: tuple[int | None, ...] = ()
