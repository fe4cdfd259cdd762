"""`prior`: nothing is looked at."""

from collections.abc import Sequence

from fedsea.audit.attack import Attack
from fedsea.audit.knowledge import Knowledge
from fedsea.audit.observation import Observation, Recovery


class Prior(Attack):
    """The language model guesses, greedily, without looking: the floor that every attacker reaches."""

    name = "prior"
    knows = "the public model and each text's length; looks at nothing that crosses the wire"
    reads = "nothing"

    def prepare(self, knowledge: Knowledge) -> None:
        _ = knowledge.shared.whole

    def read(self, observations: Sequence[Observation], knowledge: Knowledge) -> Recovery:
        return Recovery(tuple(knowledge.shared.written(knowledge.start, observations[0].length)))
