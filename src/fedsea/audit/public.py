"""Public text that attackers practise on."""

import pydoc_data.topics

import torch
from torch import Tensor

from fedsea.audit.observation import Knowledge

DRAWS = 1 << 15  # tokens, for a model without a tokenizer


def public_text(knowledge: Knowledge) -> Tensor:
    """A long public text as the model's tokenizer cuts it, int64 `[tokens]`: the help topics that every Python has.

    A model without a tokenizer (the random ones) gets draws from its vocabulary.
    """
    if knowledge.tokenizer is None:
        vocabulary: int = knowledge.checkpoint.config.vocab_size
        return torch.randint(vocabulary, (DRAWS,), generator=torch.Generator().manual_seed(0))
    topics = pydoc_data.topics.topics
    rows = knowledge.tokenizer([topics[name] for name in sorted(topics)], add_special_tokens=False).input_ids
    return torch.tensor([token for row in rows for token in row])
