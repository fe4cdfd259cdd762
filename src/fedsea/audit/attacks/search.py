"""`search` and `average`: one position after another, each with the context that was recovered before it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsea.audit.attack import Attack, Progress, Recovery, no_progress
from fedsea.audit.observation import Knowledge, Observation
from fedsea.audit.shortlist import Shortlist

LIMIT = 2048


class Search(Attack):
    """The token whose state, after what has been recovered, is nearest to what was sent.

    A's output at a position depends on the text up to there and on nothing else, so a text is read from left to right
    (as SipIt does, arXiv 2510.15511): exact without noise, and a matched filter under it.

    Parameters
    ----------
    limit
        Candidates that are run at a position at most, out of those that could be nearest; None runs the whole
        vocabulary.
    """

    name = "search"
    knows = "the public weights of the input blocks, and the mechanism"

    def __init__(self, limit: int | None = LIMIT) -> None:
        self._limit = limit

    @torch.inference_mode()
    def prepare(self, knowledge: Knowledge) -> None:
        _ = knowledge.candidates.alone
        if self._limit is not None:
            _ = knowledge.candidates.squares

    @torch.inference_mode()
    def run(
        self, texts: Sequence[Sequence[Observation]], knowledge: Knowledge, progress: Progress = no_progress
    ) -> list[Recovery]:
        found = []
        for done, looks in enumerate(texts, 1):
            observed, variance = self._observed(looks, knowledge.noise_variance)
            shortlist = Shortlist(knowledge.candidates, self._limit, variance)
            found.append(Recovery(tuple(_read(observed, knowledge, shortlist))))
            progress(done, len(texts))
        return found

    def _observed(self, looks: Sequence[Observation], variance: float) -> tuple[Tensor, float]:
        """What is searched with, `[tokens, hidden]`, and the variance of the noise on it."""
        return looks[0].sent, variance


class Average(Search):
    """The same on the mean of all looks: what is left of noise that is drawn anew each time a text is sent."""

    name = "average"
    knows = "the public weights of the input blocks, the mechanism, and which of its looks are at one text"

    def _observed(self, looks: Sequence[Observation], variance: float) -> tuple[Tensor, float]:
        return torch.stack([look.sent for look in looks]).mean(0), variance / len(looks)


def _read(observed: Tensor, knowledge: Knowledge, shortlist: Shortlist) -> list[int]:
    tokens = list(knowledge.start[: len(observed)])
    prefix = knowledge.candidates.prefix(tokens)
    shift = None
    for state in observed[len(tokens) :]:
        (best,), _costs, shift = shortlist.best(prefix, state, shift)
        prefix.extend([best])
        tokens.append(best)
    return tokens
