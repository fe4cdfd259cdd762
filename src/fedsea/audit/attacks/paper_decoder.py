"""`paper-decoder`: the decoder as the paper trains it."""

from fedsea.audit.attacks.decoder import STEPS, Decoder

LEARNING_RATE = 2e-3  # nothing to spoil: what it starts from is not what it is trained for


class PaperDecoder(Decoder):
    """`decoder`, trained as the paper's attack is (arXiv 2505.15683): each state for the token after it.

    That is the shift of a language model's labels, and no attack: what stands there is not in the state yet. Kept to
    compare with the paper's figures, which say little of what a decoder reads.
    """

    name = "paper-decoder"

    def __init__(self, steps: int = STEPS) -> None:
        super().__init__(steps, ahead=1, learning_rate=LEARNING_RATE)
