"""What a session has sent, kept so that a server that lost it can be given it again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsea.parts import Rows
from fedsea.parts.rows import gather_rows


class SentStates:
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
            self._states = self._states.new_empty(len(rows.starts), 0, self._states.shape[2])
        capacity = self._states.shape[1]
        if capacity < rows.reach:
            more = max(rows.reach, min(2 * capacity, capacity + 4096)) - capacity
            self._states = torch.cat([self._states, self._states.new_empty(len(rows.starts), more, states.shape[1])], 1)
        first = 0
        for row, (start, count) in enumerate(zip(rows.starts, rows.counts, strict=True)):
            self._states[row, start : start + count] = states[first : first + count]
            first += count
        self.lengths = list(rows.ends)

    def read(self, rows: Rows) -> Tensor:
        """The states at these places, `[rows.total, width]`."""
        places = zip(rows.starts, rows.counts, strict=True)
        return torch.cat([self._states[row, start : start + count] for row, (start, count) in enumerate(places)])
