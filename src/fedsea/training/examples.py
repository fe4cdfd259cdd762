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
        As many: the token ids again where something is learnt, -100 elsewhere (the prompt, unless that is learnt too).
        Not shifted: label i belongs to token i, as transformers takes them.
    cut
        Number of tokens that truncation removed; 0 if the text is whole.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    cut: int
