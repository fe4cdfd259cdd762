"""Batches of token ids: rows of like length together, padded at the left."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def padded(
    rows: Sequence[Sequence[int]], batch_size: int, padding: int, device: Any
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Of each batch the indexes of its rows, their token ids and attention mask, both int64 `[rows, tokens]`.

    The longest come first: memory that is enough for the first batch is then enough for all.
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids = torch.full((len(batch), len(rows[batch[0]])), padding, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows[index] for index in batch):
            ids[place, ids.shape[1] - len(row) :] = torch.tensor(row)
            mask[place, ids.shape[1] - len(row) :] = 1
        yield batch, ids.to(device), mask.to(device)


def padding_token(tokenizer: Any) -> int:
    """A token to pad with; which one does not matter, as it is masked."""
    named = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in named if token is not None))
