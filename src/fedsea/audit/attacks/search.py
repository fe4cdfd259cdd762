"""`search`: one position after another, each with the context that was recovered before it."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from fedsea.audit.attack import Attack, Reads
from fedsea.audit.knowledge import Knowledge
from fedsea.audit.observation import Observation, Recovery
from fedsea.audit.shortlist import Shortlist

LIMIT = 2048


class Search(Attack):
    """The token whose state, after what has been recovered, is nearest to what was sent.

    A's output at a position depends on the text up to there and on nothing else, so a text is read from left to right
    (as SipIt does, arXiv 2510.15511): exact without noise, and a matched filter under it. At most `limit`
    candidates are run at a position, out of those that could be nearest; None runs the whole vocabulary.
    """

    name = "search"
    knows = "the public weights of the input blocks, and the mechanism"
    reads: ClassVar[Reads] = "sent"

    def __init__(self, limit: int | None = LIMIT) -> None:
        self._limit = limit

    def prepare(self, knowledge: Knowledge) -> None:
        _ = knowledge.candidates.alone
        if self._limit is not None:
            _ = knowledge.candidates.squares

    def read(self, observations: Sequence[Observation], knowledge: Knowledge) -> Recovery:
        return self.search(observations[0].sent, knowledge.noise_variance, knowledge)

    def search(self, observed: Tensor, variance: float, knowledge: Knowledge) -> Recovery:
        """The tokens nearest to states `[tokens, hidden]`, whose noise has this variance."""
        shortlist = Shortlist(knowledge.candidates, self._limit, variance)
        tokens = list(knowledge.start[: len(observed)])
        prefix = knowledge.candidates.prefix(tokens)
        shift = None
        for state in observed[len(tokens) :]:
            (best,), _costs, shift = shortlist.best(prefix, state, shift)
            prefix.extend([best])
            tokens.append(best)
        return Recovery(tuple(tokens))
