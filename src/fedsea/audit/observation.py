"""What a provider sees of a text, and what an attack makes of it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """What the provider has of one text that was sent once, in float32 on the CPU. The text itself is not in it."""

    sent: Tensor  # h_A as it came over the wire, [tokens, hidden]
    returned: Tensor | None = None  # h_B as it went back, [tokens, hidden]; None if it did not (a replay)
    gradient: Tensor | None = None  # at h_B, [tokens, hidden]; None in inference

    @property
    def length(self) -> int:
        """Number of tokens of the text."""
        return len(self.sent)


@dataclass(frozen=True)
class Subject:
    """A text under attack: every observation of it, and the truth, which attacks are not given."""

    observations: tuple[Observation, ...]  # each time that it was sent; several in training (epochs), or if repeated
    tokens: tuple[int, ...]
    prompt: int  # how many of the tokens were given to the model; what comes after is the answer
    labels: tuple[int, ...] | None = None  # the tokens where they were learnt, -100 elsewhere; None in inference


@dataclass(frozen=True)
class Recovery:
    """What an attack makes of one text."""

    tokens: tuple[int | None, ...]  # a guess for each position; None where there is none
    labels: tuple[int | None, ...] = ()  # of attacks on gradients: which tokens were learnt, each at its own position
