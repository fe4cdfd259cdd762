"""Batches of token ids: rows of like length together, padded at the left."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def by_length(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indexes of rows in batches, so that a batch needs little padding. The longest come first.

    Memory that is enough for the first batch is then enough for all.
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad_left(rows: Sequence[Sequence[int]], padding: int, device: Any) -> tuple[Tensor, Tensor]:
    """Rows as one batch: token ids and attention mask, both int64, `[rows, tokens]`; the mask is 0 at padding."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :] = torch.tensor(row)
        mask[place, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def padding_token(tokenizer: Any) -> int:
    """A token to pad with; which one does not matter, as it is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
