"""`average`: a search of the mean of all observations of a text."""

from collections.abc import Sequence

import torch

from fedsea.audit.attacks.search import Search
from fedsea.audit.knowledge import Knowledge
from fedsea.audit.observation import Observation, Recovery


class Average(Search):
    """`search` on what is left of the noise, where a text is sent several times with other draws each time."""

    name = "average"
    knows = "the public weights of the input blocks, the mechanism, and which of its observations are of one text"
    reads = "several"

    def read(self, observations: Sequence[Observation], knowledge: Knowledge) -> Recovery:
        mean = torch.stack([one.sent for one in observations]).mean(0)
        return self.search(mean, knowledge.noise_variance / len(observations), knowledge)
