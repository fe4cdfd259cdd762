"""`nearest`: each position by itself."""

from collections.abc import Sequence

import torch

from fedsea.audit.attack import Attack, Progress, Recovery, no_progress
from fedsea.audit.observation import Knowledge, Observation

POSITIONS = 64  # compared with the vocabulary at once


class Nearest(Attack):
    """The token whose state without any context is nearest to what was sent.

    With the embedding alone as input blocks that is all there is to know; with more layers it ignores the context.
    """

    name = "nearest"
    knows = "the public weights of the input blocks, and the mechanism"

    @torch.inference_mode()
    def prepare(self, knowledge: Knowledge) -> None:
        _ = knowledge.candidates.alone

    @torch.inference_mode()
    def run(
        self, texts: Sequence[Sequence[Observation]], knowledge: Knowledge, progress: Progress = no_progress
    ) -> list[Recovery]:
        table = knowledge.candidates.alone
        squares = table.square().sum(1)
        found = []
        for done, looks in enumerate(texts, 1):
            guesses = [(squares - 2 * some @ table.T).argmin(1) for some in looks[0].sent.split(POSITIONS)]
            found.append(Recovery(tuple(torch.cat(guesses).tolist())))
            progress(done, len(texts))
        return found
