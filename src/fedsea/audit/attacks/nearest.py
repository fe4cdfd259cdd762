"""`nearest`: each position by itself."""

from collections.abc import Sequence

import torch

from fedsea.audit.attack import Attack
from fedsea.audit.knowledge import Knowledge
from fedsea.audit.observation import Observation, Recovery

POSITIONS = 64  # compared with the vocabulary at once


class Nearest(Attack):
    """The token whose state without any context is nearest to what was sent.

    With the embedding alone as input blocks that is all there is to know; with more layers it ignores the context.
    """

    name = "nearest"
    knows = "the public weights of the input blocks, and the mechanism"
    reads = "sent"

    def prepare(self, knowledge: Knowledge) -> None:
        _ = knowledge.candidates.alone

    def read(self, observations: Sequence[Observation], knowledge: Knowledge) -> Recovery:
        table = knowledge.candidates.alone
        squares = table.square().sum(1)
        sent = observations[0].sent.split(POSITIONS)
        return Recovery(tuple(torch.cat([(squares - 2 * some @ table.T).argmin(1) for some in sent]).tolist()))
