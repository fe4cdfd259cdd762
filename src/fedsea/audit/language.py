"""The public language model as an attacker uses it: what is likely to come next."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fedsea.parts.cache import CACHE


class Continuation:
    """Log probabilities of the next token after several texts of one length, as they grow."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)

    def extend(self, tokens: Sequence[Sequence[int]], parents: Sequence[int] | None = None) -> Tensor:
        """Go on with tokens, as many for each text: float32 log probabilities of the next, `[texts, vocabulary]`.

        `parents` says of each text which of those before it continues; None for each itself.
        """
        if parents is not None:
            self._cache.reorder_cache(torch.LongTensor(list(parents)))
        ids = torch.tensor([list(row) for row in tokens])
        logits = self._model(ids, **{CACHE: self._cache}, use_cache=True, logits_to_keep=1).logits
        likely: Tensor = logits[:, -1].float().log_softmax(-1)
        return likely
