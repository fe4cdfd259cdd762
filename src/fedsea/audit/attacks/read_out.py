"""`read-out`: the output blocks on what the provider itself has computed."""

from collections.abc import Sequence

from fedsea.audit.attack import Attack
from fedsea.audit.knowledge import Knowledge
from fedsea.audit.observation import Observation, Recovery
from fedsea.errors import UsageError
from fedsea.parts import Rows


class ReadOut(Attack):
    """The next token, as C with its public weights names it from `h_B`: exactly what the client sees, if it is greedy.

    Noise on what is sent changes `h_B`, but client and provider see the same one. Of a prompt it names what the model
    would have written in the place of each token.
    """

    name = "read-out"
    knows = "the public weights of the output blocks"
    reads = "returned"

    def prepare(self, knowledge: Knowledge) -> None:
        _ = knowledge.output_blocks

    def read(self, observations: Sequence[Observation], knowledge: Knowledge) -> Recovery:
        blocks, returned = knowledge.output_blocks, observations[0].returned
        if returned is None:
            raise UsageError("read-out needs what the provider sent back (h_B), which is not there")
        hidden = blocks(returned, Rows((0,), (len(returned),)), None)
        return Recovery((None, *blocks.logits(hidden)[:-1].argmax(-1).tolist()))
