"""The cache that `generate` sees: the client's own KV caches, and the session that holds the middle's.

transformers works on it as on its own caches (crop, reorder, select); what concerns the middle is remembered and sent
with the next step, as its start positions and row map.
"""

import weakref
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from fedsea.client.session import Session
from fedsea.errors import UsageError
from fedsea.parts import RowCache
from fedsea.parts.rows import gather_rows


class SplitCache(Cache):
    """State of one generation or conversation, at the client.

    Attributes
    ----------
    session
        The conversation with the middle; None if the middle is empty.
    columns
        Columns of the batch that have been computed, padding included, as transformers counts.
    lengths
        Tokens of each row, without padding; empty before the first step.
    mask
        Which columns are tokens and not padding: bool, `[rows, columns]`; None while there is no padding.
    offsets
        Of each row, by how much the positions of its tokens are more than their number in the row.
    digests
        Of each row, what the noise of each of its tokens is keyed by; nothing for those that left without.
    repeats
        Whether the next step may send again what left before, in this session or in another.
    row_map
        What rows became of which since the last step, not yet sent to the middle; None if they stayed.
    """

    # What transformers asks of a cache: everything can be cropped, to any length, and steps have their own shapes.
    is_compileable = False
    is_croppable = True
    is_linear: list[bool] = [False]  # noqa: RUF012 - transformers' own attribute

    def __init__(self, input_cache: RowCache, output_cache: RowCache, session: Session | None) -> None:
        super().__init__(layers=[])
        self.input_cache, self.output_cache, self.session = input_cache, output_cache, session
        self.columns = 0
        self.lengths: list[int] = []
        self.mask: Tensor | None = None
        self.offsets: list[int] = []
        self.digests: list[list[bytes]] = []
        self.repeats = True
        self.row_map: list[int] | None = None
        if session is not None:
            # The caches that `generate` makes by itself are not closed otherwise.
            self._finalizer = weakref.finalize(self, session.close)

    def append(self, lengths: Sequence[int], columns: int, mask: Tensor | None) -> None:
        """Count a step: the rows' new lengths, its columns, and which of them are tokens (None for all)."""
        if mask is not None or self.mask is not None:
            self.mask = mask_with(self, columns, mask)
        self.columns += columns
        self.lengths = list(lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the older name

    def crop(self, tokens_to_remove: int) -> None:
        """Drop columns at the end: `-n` drops n of them; a positive number is the number of columns to keep."""
        keep = tokens_to_remove if tokens_to_remove > 0 else self.columns + tokens_to_remove
        if tokens_to_remove == 0 or keep >= self.columns:
            return
        self.columns, self.repeats = max(keep, 0), True
        if self.mask is None:
            self.lengths = [self.columns] * len(self.lengths)
        else:
            self.mask = self.mask[:, : self.columns]
            self.lengths = [int(count) for count in self.mask.sum(1).tolist()]
        self.input_cache.crop_rows(self.lengths)
        self.output_cache.crop_rows(self.lengths)
        if self.digests:
            self.digests = [digests[:length] for digests, length in zip(self.digests, self.lengths, strict=True)]

    def select(self, chosen: Sequence[int]) -> None:
        """Row `i` becomes a copy of what row `chosen[i]` was."""
        if list(chosen) == list(range(len(self.lengths))):
            return
        self.input_cache.select(chosen)
        self.output_cache.select(chosen)
        self.lengths = gather_rows(self.lengths, chosen)
        self.offsets = gather_rows(self.offsets, chosen) if self.offsets else []
        if self.digests:
            self.digests = [list(self.digests[row]) for row in chosen]
        if self.mask is not None:
            self.mask = self.mask[list(chosen)]
        self.row_map = gather_rows(self.row_map, chosen) if self.row_map is not None else list(chosen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row `i` goes on from what row `beam_idx[i]` was."""
        self.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(torch.arange(len(self.lengths))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select([row for row in range(len(self.lengths)) for _ in range(repeats)])

    def reset(self) -> None:
        """Forget the text. The session goes on from position 0."""
        self.crop(-self.columns)

    def activate_past_recording(self) -> None:
        """Nothing to do: everything can be cropped."""

    @property
    def is_initialized(self) -> bool:
        return bool(self.lengths)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        raise UsageError(
            "a split model's cache holds a session at the block server, so it cannot be copied or pickled; begin "
            "another one with model.new_cache()"
        )

    def close(self) -> None:
        if self.session is not None:
            self.session.close()

    def __repr__(self) -> str:
        return f"SplitCache(rows={self.batch_size}, columns={self.columns})"

    def __len__(self) -> int:
        return 1

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not used: the parts update their own caches."""
        raise NotImplementedError("a split cache is updated by the model's parts")


def mask_with(cache: SplitCache | None, columns: int, mask: Tensor | None) -> Tensor | None:
    """Which columns are tokens: those that the cache holds, and some new ones. None stands for all, here and there."""
    known, before = (cache.mask, cache.columns) if cache is not None else (None, 0)
    if known is None and mask is None:
        return None
    some = mask if mask is not None else known
    assert some is not None
    old = known.to(some.device) if known is not None else some.new_ones(len(some), before)
    new = mask if mask is not None else some.new_ones(len(some), columns)
    return torch.cat([old, new], dim=1)
