"""Which positions of which rows a tensor of hidden states covers.

A batch of texts of different lengths is sent and computed without padding: all tokens of row 0, then all of row 1, and
so on, `[tokens, hidden]`. `Rows` is all that a peer needs to read that and to rebuild attention masks and position ids,
so neither crosses the wire (FedSEA-LLaMA, section on attention-mask compression).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Start position and number of new tokens of each row.

    Parameters
    ----------
    starts
        Position of each row's first new token: the number of tokens of that row that came before.
    counts
        Number of new tokens of each row; not all 0.
    text
        Tokens that the longest row will have after the step that this is a piece of, where that is more than here. Some
        rotary embeddings depend on it.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    text: int = 0
    width: int = field(init=False, repr=False, compare=False)  # tokens of the longest row
    total: int = field(init=False, repr=False, compare=False)  # tokens of all rows together
    ends: tuple[int, ...] = field(init=False, repr=False, compare=False)  # each row's tokens after this step
    furthest: int = field(init=False, repr=False, compare=False)  # tokens of the longest row after the whole step
    reach: int = field(init=False, repr=False, compare=False)  # columns of a padded step: furthest start and width

    def __post_init__(self) -> None:
        # At once: each step asks for all of them, and a property that is kept costs more than its number.
        starts, counts = self.starts, self.counts
        width, ends = max(counts, default=0), tuple(map(add, starts, counts))
        vars(self).update(
            width=width,
            total=sum(counts),
            ends=ends,
            furthest=max(self.text, *ends) if ends else self.text,
            reach=max(starts, default=0) + width,
        )

    @classmethod
    def uniform(cls, rows: int, start: int, count: int) -> "Rows":
        """Rows that all have the same start and count."""
        return cls((start,) * rows, (count,) * rows)

    def __len__(self) -> int:
        return len(self.starts)

    def positions(self, device: torch.device) -> Tensor:
        """Position of every token, int64 `[total]`."""
        if len(self.starts) == 1:
            return torch.arange(self.starts[0], self.ends[0], device=device)
        return torch.cat([torch.arange(*row) for row in zip(self.starts, self.ends, strict=True)]).to(device)

    def of(self, packed: Tensor, chunk: "Rows") -> Tensor:
        """Those of `[total, ...]` that belong to a chunk of these rows."""
        pieces, begin = [], 0
        for start, count, at, size in zip(self.starts, self.counts, chunk.starts, chunk.counts, strict=True):
            pieces.append(packed[begin + at - start : begin + at - start + size])
            begin += count
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def chunks(self, tokens: int, places: int | None = None) -> list["Rows"]:
        """Split into steps of at most `tokens` tokens in all (at least one a row), each continuing the one before.

        All chunks have the same rows; one that has run out of tokens has a count of 0. With `places`, a chunk has at
        most this many once its rows are padded, too.
        """
        limit = tokens
        if self.total <= tokens:
            if places is None or len(self.starts) * self.width <= places:
                return [self]
            limit = places
        size = max(1, limit // len(self))
        return [
            Rows(
                tuple(start + min(done, count) for start, count in zip(self.starts, self.counts, strict=True)),
                tuple(min(max(count - done, 0), size) for count in self.counts),
                self.furthest,
            )
            for done in range(0, self.width, size)
        ]


def gather_rows(items: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """`items[i]` for every i of `chosen`."""
    return [items[index] for index in chosen]
