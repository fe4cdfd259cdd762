"""A KV cache whose rows have lengths of their own.

transformers' dynamic cache pads the short rows, and copies everything to append one token. Here position `i` of a row
is at column `i`: nothing is padded, rows crop and move independently, and appending writes in place.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import cache as remembered
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin

from fedsea.parts.rows import Rows, gather_rows

GROWTH = 256  # tokens by which buffers grow at least: few copies early, little waste late


@remembered
def cache_argument(callee: Callable[..., Any]) -> str:
    """What one of transformers' functions calls a cache: `cache` from release 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(callee).parameters else "past_key_values"


CACHE = cache_argument(GenerationMixin.prepare_inputs_for_generation)  # as whole models and their outputs call it


class RowCache(Cache):
    """Keys and values of some decoder layers, `[rows, heads, capacity, head_dim]` each, found by absolute layer number.

    Parameters
    ----------
    rotary
        The family's rotary embedding. The cache keeps a copy: some variants (dynamic NTK, longrope) change with the
        length of the text, and one text must not change another's.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__(layers=[])
        self.rotary = copy.deepcopy(rotary)
        self.lengths: list[int] = []  # tokens that each row holds
        self.capacity = 0
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._rows: Rows | None = None
        self._index: tuple[Tensor, Tensor] | None = None

    def begin(self, rows: Rows) -> None:
        """Make room for a step; what a row holds from its start position on is dropped.

        An IndexError if a row starts behind its end, or the number of rows is another than the cache holds.
        """
        if not self.lengths:
            self.lengths = [0] * len(rows.starts)
        if len(rows.starts) != len(self.lengths):
            raise IndexError(f"the cache holds {len(self.lengths)} rows, the step has {len(rows)}")
        for start, length in zip(rows.starts, self.lengths, strict=True):
            if start > length:
                raise IndexError(f"the cache holds {length} tokens of a row that is to go on at {start}")
        if rows.reach > self.capacity:
            self.capacity = self.capacity_for(rows)
        self._rows = rows
        self._index = None

    def capacity_for(self, rows: Rows) -> int:
        """Columns that the buffers will have after a step with these rows."""
        if rows.reach <= self.capacity:
            return self.capacity
        return max(rows.reach, min(self.capacity * 2, self.capacity + 16 * GROWTH), GROWTH)

    def finish(self) -> None:
        """Count the step's tokens, once all layers have them."""
        assert self._rows is not None
        self.lengths = list(self._rows.ends)
        self._rows = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values `[rows, heads, width, head_dim]`; return all, up to the furthest end."""
        rows = self._rows
        assert rows is not None, "begin() comes first"
        keys, values = self._keys.get(layer_idx), self._values.get(layer_idx)
        if keys is None or values is None or keys.shape[2] != self.capacity:
            keys = self._keys[layer_idx] = self._grown(keys, key_states)
            values = self._values[layer_idx] = self._grown(values, value_states)
        if rows.same_start:
            start, end = rows.starts[0], rows.starts[0] + rows.width
            keys[:, :, start:end] = key_states
            values[:, :, start:end] = value_states
        else:
            # A padded place lands behind its row's end, where the row's next token will overwrite it.
            if self._index is None:
                which = torch.arange(len(rows), device=keys.device).unsqueeze(1)
                self._index = (which, rows.positions(keys.device))
            which, columns = self._index
            keys[which, :, columns] = key_states.transpose(1, 2)
            values[which, :, columns] = value_states.transpose(1, 2)
        return keys[:, :, : rows.reach], values[:, :, : rows.reach]

    def _grown(self, buffer: Tensor | None, states: Tensor) -> Tensor:
        # Zeros, not whatever memory held: a masked column has weight 0, and 0 times NaN would still be NaN.
        grown = states.new_zeros(len(self.lengths), states.shape[1], self.capacity, states.shape[3])
        if buffer is not None:
            used = max(self.lengths)
            grown[:, :, :used] = buffer[:, :, :used]
        return grown

    def select(self, chosen: Sequence[int]) -> None:
        """Row `i` becomes a copy of what row `chosen[i]` was; an IndexError if that is not there."""
        if not self.lengths:
            return
        if any(not 0 <= row < len(self.lengths) for row in chosen):
            raise IndexError(f"the cache holds {len(self.lengths)} rows, row {max(chosen)} is not among them")
        for buffers in (self._keys, self._values):
            for layer, buffer in buffers.items():
                buffers[layer] = buffer.index_select(0, torch.tensor(chosen, device=buffer.device))
        self.lengths = gather_rows(self.lengths, chosen)

    def crop_rows(self, lengths: Sequence[int]) -> None:
        """Drop what each row holds behind the given length."""
        if not self.lengths:
            return
        self.lengths = [min(old, new) for old, new in zip(self.lengths, lengths, strict=True)]

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self.lengths, self.capacity = [], 0
        self._keys, self._values = {}, {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)
