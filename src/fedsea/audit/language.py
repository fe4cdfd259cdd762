"""The public language model as an attacker uses it: what is likely to come next."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fedsea.audit.attack import Recovery
from fedsea.audit.observation import Knowledge
from fedsea.parts.cache import CACHE


class Continuation:
    """Log probabilities of the next token after several texts of one length, as they grow.

    Parameters
    ----------
    model
        A causal language model of transformers.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)

    def extend(self, tokens: Sequence[Sequence[int]], parents: Sequence[int] | None = None) -> Tensor:
        """Go on with tokens, and give what may come then.

        Parameters
        ----------
        tokens
            New tokens of each text, as many for one as for another.
        parents
            Of each text, which of those before it continues; None for each itself.

        Returns
        -------
        Tensor
            Log probabilities, float32, `[texts, vocabulary]`.
        """
        if parents is not None:
            self._cache.reorder_cache(torch.LongTensor(list(parents)))
        ids = torch.tensor([list(row) for row in tokens])
        logits = self._model(ids, **{CACHE: self._cache}, use_cache=True, logits_to_keep=1).logits
        likely: Tensor = logits[:, -1].float().log_softmax(-1)
        return likely


@torch.inference_mode()
def free_running(knowledge: Knowledge, length: int) -> list[int]:
    """What the model itself writes, greedily, after what texts begin with: `length` tokens with that."""
    tokens = list(knowledge.start)
    model = Continuation(knowledge.whole)
    new = tokens or [_first_token(knowledge)]
    while len(tokens) < length:
        new = [int(model.extend([new])[0].argmax())]
        tokens += new
    return tokens[:length]


def next_token_reference(knowledge: Knowledge, text: Sequence[int]) -> Recovery:
    """What the model guesses at each position if it is told everything before it: no attack, for it needs the truth.

    A generous floor: an attack that does not do better has learnt nothing from what crosses the wire. Nothing is
    guessed at the first position.
    """
    return told_before(knowledge, text)[0]


@torch.inference_mode()
def told_before(knowledge: Knowledge, text: Sequence[int]) -> tuple[Recovery, Tensor]:
    """What `next_token_reference` gives, and the cross entropy of each token but the first, nats, `[tokens - 1]`."""
    ids = torch.tensor([list(text)])
    logits = knowledge.whole(ids).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    return Recovery((None, *logits.argmax(-1).tolist())), losses


def _first_token(knowledge: Knowledge) -> int:
    for name in ("bos_token_id", "eos_token_id"):
        token: int | None = getattr(knowledge.tokenizer, name, None)
        if token is not None:
            return token
    return 0
