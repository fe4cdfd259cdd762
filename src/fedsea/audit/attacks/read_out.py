"""`read-out`: the output blocks on what the provider itself has computed."""

from collections.abc import Sequence

import torch

from fedsea.audit.attack import Attack, Progress, Recovery, no_progress
from fedsea.audit.observation import Knowledge, Observation
from fedsea.errors import UsageError
from fedsea.parts import Rows


class ReadOut(Attack):
    """The next token, as C with its public weights names it from `h_B`: exactly what the client sees, if it is greedy.

    Noise on what is sent changes `h_B`, but client and provider see the same one. Of a prompt it names what the model
    would have written in the place of each token.
    """

    name = "read-out"
    knows = "the public weights of the output blocks"

    def prepare(self, knowledge: Knowledge) -> None:
        _ = knowledge.output_blocks

    @torch.inference_mode()
    def run(
        self, texts: Sequence[Sequence[Observation]], knowledge: Knowledge, progress: Progress = no_progress
    ) -> list[Recovery]:
        blocks, found = knowledge.output_blocks, []
        for done, looks in enumerate(texts, 1):
            returned = looks[0].returned
            if returned is None:
                raise UsageError("read-out needs what the provider sent back (h_B), which is not there")
            hidden = blocks(returned.unsqueeze(0), Rows.uniform(1, 0, len(returned)), None)
            guesses = blocks.logits(hidden)[0, :-1].argmax(-1).tolist()
            found.append(Recovery((None, *guesses)))
            progress(done, len(texts))
        return found
