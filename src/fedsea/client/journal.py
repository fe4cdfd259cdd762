"""What a session has sent, kept so that a server that lost it can be given it again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsea.parts import Rows
from fedsea.parts.rows import gather_rows


class Journal:
    """The states that a session has sent, `[rows, positions, width]` in the wire dtype, exactly as they left."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self._states = torch.empty(0, 0, width, dtype=dtype)
        self.lengths: list[int] = []

    def select(self, chosen: Sequence[int]) -> None:
        """Row `i` becomes a copy of what row `chosen[i]` was."""
        self._states = self._states[list(chosen)]
        self.lengths = gather_rows(self.lengths, chosen)

    def write(self, rows: Rows, states: Tensor) -> None:
        """Keep a step's states `[rows.total, width]`; what a row held from its start position on is dropped."""
        if not self.lengths:
            self._states = self._states.new_empty(len(rows), 0, self._states.shape[2])
        if self._states.shape[1] < rows.reach:
            capacity = max(rows.reach, min(2 * self._states.shape[1], self._states.shape[1] + 4096))
            grown = self._states.new_empty(len(rows), capacity, self._states.shape[2])
            grown[:, : self._states.shape[1]] = self._states
            self._states = grown
        padded = rows.unpack(states)
        for row, (start, count) in enumerate(zip(rows.starts, rows.counts, strict=True)):
            self._states[row, start : start + count] = padded[row, :count]
        self.lengths = list(rows.ends)

    def read(self, rows: Rows) -> Tensor:
        """The states at these places, `[rows.total, width]`."""
        return torch.cat(
            [
                self._states[row, start : start + count]
                for row, (start, count) in enumerate(zip(rows.starts, rows.counts, strict=True))
            ]
        )
