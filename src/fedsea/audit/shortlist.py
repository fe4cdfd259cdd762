"""The candidates that explain an observation best, without running A on the whole vocabulary.

A cheap distance to every token comes from a table of what tokens are after some public text, moved by the shift that
the text at hand causes. The shift, and how far cheap and exact distances differ, are measured on the candidates that
have been run exactly; more are run until none is left that could still be better, and, as long as the best of them is
further away than noise explains, until there are too many. The noisier the observation, the more cheap and exact
distances differ, and the longer the list becomes by itself.
"""

import torch
from torch import Tensor

from fedsea.audit.candidates import Candidates, Prefix

FIRST = 256  # candidates in the first round
STEP = 512  # and in each further one
SPREADS = 6.0  # standard deviations by which a cheap cost may be too high
DOUBTS = 6.0  # standard deviations by which a distance may be longer than noise makes it


class Shortlist:
    """Finds the best candidates of one position after another.

    At most `limit` are run exactly at a position (None: always the whole vocabulary); `variance` is that of the noise
    on an element, which says how far from what was observed the right candidate should be.
    """

    def __init__(self, candidates: Candidates, limit: int | None, variance: float) -> None:
        self._candidates, self._limit, self._variance = candidates, limit, variance
        self.run = 0  # candidates that were run exactly, at all positions together

    def best(
        self,
        prefix: Prefix,
        observed: Tensor,
        shift: Tensor | None = None,
        *,
        penalty: Tensor | None = None,
        keep: int = 1,
        doubt: bool = True,
    ) -> tuple[list[int], list[float], Tensor]:
        """The `keep` tokens that explain a state `[hidden]` best after a prefix, the best first; costs; the shift here.

        A token's cost is the squared distance of its expected state to the observed one, and its penalty
        (`[vocabulary]`). `shift` is what this gave for the position before. Without `doubt` it does not look further
        where noise does not explain the best distance: that is pointless after a prefix that is wrong already.
        """
        every = torch.zeros(self._candidates.vocabulary) if penalty is None else penalty
        nothing = observed.new_zeros(observed.shape)
        if prefix.length == 0:
            costs = (self._candidates.alone - observed).square().sum(1) + every
            return *_lowest(torch.arange(len(costs)), costs, keep), nothing
        if self._limit is None:
            costs = torch.cat(
                [
                    (self._candidates.expected(prefix, some) - observed).square().sum(1)
                    for some in torch.arange(len(every)).split(4096)
                ]
            )
            self.run += len(every)
            return *_lowest(torch.arange(len(costs)), costs + every, keep), nothing
        return self._rounds(prefix, observed, nothing if shift is None else shift, every, keep, doubt)

    def _rounds(
        self, prefix: Prefix, observed: Tensor, shift: Tensor, penalty: Tensor, keep: int, doubt: bool
    ) -> tuple[list[int], list[float], Tensor]:
        assert self._limit is not None
        table = self._candidates.typical
        cheap = self._cheap(observed - shift) + penalty
        chosen = cheap.topk(min(max(FIRST, keep), len(cheap)), largest=False).indices
        tokens, costs = chosen.new_empty(0), observed.new_empty(0)
        moved = observed.new_zeros(observed.shape)
        size = len(observed)
        explained = self._variance * (size + DOUBTS * (2 * size) ** 0.5)  # chi-squared's mean and deviations
        found = not doubt
        while True:
            states = self._candidates.expected(prefix, chosen)
            moved += (states - table[chosen]).sum(0)
            tokens = torch.cat([tokens, chosen])
            distances = (states - observed).square().sum(1)
            costs = torch.cat([costs, distances + penalty[chosen]])
            found = found or float(distances.min()) <= explained
            shift = moved / len(tokens)
            cheap = self._cheap(observed - shift) + penalty
            error = costs - cheap[tokens]
            bound = costs.topk(keep, largest=False).values[-1]
            hopeful = (cheap + error.mean() - SPREADS * error.std() < bound) | (not found)
            hopeful[tokens] = False
            count = min(int(hopeful.sum()), STEP, self._limit - len(tokens))
            if count <= 0:
                break
            chosen = torch.where(hopeful, cheap, torch.inf).topk(count, largest=False).indices
        self.run += len(tokens)
        return *_lowest(tokens, costs, keep), shift

    def _cheap(self, target: Tensor) -> Tensor:
        """Squared distance of `target` to each row of the table, `[vocabulary]`."""
        return self._candidates.squares - 2 * (self._candidates.typical @ target) + target.square().sum()


def _lowest(tokens: Tensor, costs: Tensor, keep: int) -> tuple[list[int], list[float]]:
    lowest = costs.topk(min(keep, len(costs)), largest=False)
    return tokens[lowest.indices].tolist(), lowest.values.tolist()
