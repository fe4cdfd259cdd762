"""One text as training takes it."""

from dataclasses import dataclass

IGNORED = -100
"""The label of a token that is not learnt, as PyTorch's cross entropy has it."""


@dataclass(frozen=True)
class Encoded:
    """One text, tokenised, with what is to be learnt of it.

    Attributes
    ----------
    input_ids
        Token ids of the whole text, the answer included.
    labels
        Of each token (not shifted, as transformers takes them): its id where it is learnt, else `IGNORED`.
    cut
        Number of tokens that truncation removed.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    cut: int
