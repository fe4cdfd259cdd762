"""`search-map`: the likeliest text, given what was sent and what the language model expects."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedsea.audit.attack import Attack
from fedsea.audit.attacks.search import LIMIT
from fedsea.audit.candidates import Prefix
from fedsea.audit.knowledge import Knowledge
from fedsea.audit.language import Continuation
from fedsea.audit.observation import Observation, Recovery
from fedsea.audit.shortlist import Shortlist


@dataclass(frozen=True)
class _Beam:
    tokens: tuple[int, ...]
    cost: float
    prefix: Prefix
    shift: Tensor | None


class SearchMap(Attack):
    """Maximum a posteriori: the text with the largest log p(observation | text) + log p(text), by beam search.

    Under independent Gaussian noise of variance v the first is -|observation - state|² / 2v, up to a constant; the
    second is the public language model's. What is minimised is their sum times -2v, so that no noise needs no case of
    its own: the language model then decides between what rounding leaves equal. At each position `beams` texts are
    kept.
    """

    name = "search-map"
    knows = "all public weights, the mechanism and its strength"
    reads = "sent"

    def __init__(self, beams: int = 4, limit: int | None = LIMIT) -> None:
        self._beams, self._limit = beams, limit

    def prepare(self, knowledge: Knowledge) -> None:
        _ = knowledge.candidates.alone, knowledge.shared.whole, knowledge.noise_variance
        if self._limit is not None:
            _ = knowledge.candidates.squares

    def read(self, observations: Sequence[Observation], knowledge: Knowledge) -> Recovery:
        observed = observations[0].sent
        shortlist = Shortlist(knowledge.candidates, self._limit, knowledge.noise_variance)
        start = knowledge.start[: len(observed)]
        model = Continuation(knowledge.shared.whole)
        unit = 2 * knowledge.noise_variance
        beams = [_Beam(start, 0.0, knowledge.candidates.prefix(start), None)]
        # Nothing is known of a text's first token: all are equally likely.
        penalties = [None] if not start else list(-unit * model.extend([start]))
        for place, state in enumerate(observed[len(start) :], len(start) + 1):
            grown: list[tuple[float, int, int, Tensor]] = []
            for parent, (beam, penalty) in enumerate(zip(beams, penalties, strict=True)):
                tokens, costs, shift = shortlist.best(
                    beam.prefix, state, beam.shift, penalty=penalty, keep=self._beams, doubt=parent == 0
                )
                grown += [(beam.cost + cost, parent, token, shift) for token, cost in zip(tokens, costs, strict=True)]
            grown = sorted(grown, key=lambda one: one[0])[: self._beams]
            before, beams = beams, []
            for cost, parent, token, shift in grown:
                prefix = before[parent].prefix.copy()
                prefix.extend([token])
                beams.append(_Beam((*before[parent].tokens, token), cost, prefix, shift))
            if place < len(observed):
                parents = [parent for _cost, parent, _token, _shift in grown]
                first = place == 1  # the cache is empty: there is nothing to reorder
                penalties = list(-unit * model.extend([beam.tokens[-1:] for beam in beams], None if first else parents))
        return Recovery(beams[0].tokens)
