"""`prior`: no look at all."""

from collections.abc import Sequence

from fedsea.audit.attack import Attack, Progress, Recovery, no_progress
from fedsea.audit.language import free_running
from fedsea.audit.observation import Knowledge, Observation


class Prior(Attack):
    """The language model guesses, greedily, without looking: the floor that anybody reaches."""

    name = "prior"
    knows = "the public model and each text's length; looks at nothing that crosses the wire"

    def prepare(self, knowledge: Knowledge) -> None:
        _ = knowledge.whole

    def run(
        self, texts: Sequence[Sequence[Observation]], knowledge: Knowledge, progress: Progress = no_progress
    ) -> list[Recovery]:
        lengths = [looks[0].length for looks in texts]
        guess = free_running(knowledge, max(lengths, default=0))
        progress(len(texts), len(texts))
        return [Recovery(tuple(guess[:length])) for length in lengths]
