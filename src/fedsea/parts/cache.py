"""Memory for keys and values: a pool of blocks, taken as tokens come and given back at once.

A row's tokens are in blocks of `BLOCK` tokens of a slab, one behind the other wherever there is room, so that attention
reads them where they are: nothing is padded, nothing is copied when a row grows. Rows that begin as copies share blocks
until one of them writes. A cache's rows belong to one client, and so do the blocks that they share.
"""

import copy
import inspect
import re
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache as remembered
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin

from fedsea.parts.rows import Rows

BLOCK = 16  # tokens
SLAB = 256  # blocks at least
Piece = tuple[Tensor, Tensor]
"""Keys and values of some of a row's tokens in a layer, `[heads, tokens, head_dim]` each."""


@remembered
def cache_argument(callee: Callable[..., Any]) -> str:
    """What one of transformers' functions calls a cache: `cache` from release 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(callee).parameters else "past_key_values"


CACHE = cache_argument(GenerationMixin.prepare_inputs_for_generation)  # as whole models and their outputs call it


class _Slab:
    """Blocks that lie one behind the other: `[heads, blocks * BLOCK, head_dim]` a layer, made when it is first used."""

    def __init__(self, blocks: int) -> None:
        self.taken = bytearray(blocks)
        self.holders = [0] * blocks  # rows that hold each block
        self.layers: dict[int, Piece] = {}

    def layer(self, number: int, keys: Tensor, values: Tensor) -> Piece:
        """Of keys and values like these."""
        found = self.layers.get(number)
        if found is None:
            tokens = len(self.holders) * BLOCK
            with torch.inference_mode(False):  # or else only steps in that mode could write here
                found = (
                    keys.new_empty(keys.shape[0], tokens, keys.shape[2]),
                    values.new_empty(values.shape[0], tokens, values.shape[2]),
                )
            found = self.layers.setdefault(number, found)  # another thread may have made it meanwhile
        return found


Block = tuple[_Slab, int]


class Pool:
    """The blocks of all caches of a part. Slabs are made when no block is free, and dropped when all are.

    Threads may use it at the same time. Rows come back from wherever they are collected, also from within a call here.
    """

    def __init__(self) -> None:
        self._slabs: list[_Slab] = []
        self._lock = threading.Lock()
        self._back: deque[list[Block]] = deque()  # of rows that are gone

    @property
    def taken(self) -> int:
        """Blocks that rows hold, each counted once."""
        return sum(map(sum, (slab.taken for slab in self._slabs)))

    @property
    def held(self) -> int:
        """Blocks that there is memory for."""
        return sum(len(slab.taken) for slab in self._slabs)

    def take(self, count: int, after: Block | None) -> list[Block]:
        """Blocks, as many of them as can be one behind the other, and behind `after`."""
        taken: list[Block] = []
        with self._lock:
            while len(taken) < count:
                slab, first, room = self._room(count - len(taken), taken[-1] if taken else after)
                for number in range(first, first + min(room, count - len(taken))):
                    slab.taken[number] = slab.holders[number] = 1
                    taken.append((slab, number))
        self._take_back()
        return taken

    def share(self, blocks: Sequence[Block]) -> None:
        """One more row holds these."""
        with self._lock:
            for slab, number in blocks:
                slab.holders[number] += 1
        self._take_back()

    def _room(self, count: int, after: Block | None) -> tuple[_Slab, int, int]:
        """Where the next blocks begin, and how many are free there."""
        if after is not None:
            slab, number = after
            found = _FREE.match(slab.taken, number + 1)
            if found is not None:
                return slab, number + 1, len(found[0])
        gaps = [(len(gap[0]), gap.start(), slab) for slab in self._slabs for gap in _FREE.finditer(slab.taken)]
        if not gaps:
            self._slabs.append(_Slab(max(SLAB, count)))
            return self._slabs[-1], 0, len(self._slabs[-1].holders)
        room, first, slab = max(gaps, key=lambda gap: gap[0])
        # In the middle of what is free, both the row before it and this one can go on where they are.
        skipped = (room - count) // 2 if first and room > count else 0
        return slab, first + skipped, room - skipped

    def give(self, blocks: list[Block]) -> None:
        """A row holds these no more."""
        self._back.append(blocks)
        self._take_back()

    def _take_back(self) -> None:
        # Whoever has the lock looks again when it has let it go, so nothing that is in line stays there.
        while self._back and self._lock.acquire(blocking=False):
            try:
                while self._back:
                    for slab, number in self._back.popleft():
                        slab.holders[number] -= 1
                        slab.taken[number] = bool(slab.holders[number])
                self._slabs = [slab for slab in self._slabs if any(slab.taken)]
            finally:
                self._lock.release()


class CachedRow:
    """A row's keys and values in all layers; its blocks are given back when it is dropped."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self.length = pool, 0
        self.room = 0  # up to which token it may be written as it is
        self.blocks: list[Block] = []
        self._runs: list[tuple[_Slab, int, int]] = []
        weakref.finalize(self, pool.give, self.blocks)

    def begin(self, start: int, end: int) -> None:
        """Make room for the tokens from `start` to `end`; what is held from `start` on is dropped."""
        self.length = start
        needed = -(-end // BLOCK)
        changed = len(self.blocks) > needed
        if changed:
            self._pool.give(self.blocks[needed:])
            del self.blocks[needed:]
        if end > start:
            for index in range(start // BLOCK, len(self.blocks)):
                slab, number = self.blocks[index]
                if slab.holders[number] > 1:
                    self._own(index, start - index * BLOCK)
                    changed = True
        if needed > len(self.blocks):
            self.blocks += self._pool.take(needed - len(self.blocks), self.blocks[-1] if self.blocks else None)
            changed = True
        if changed:
            self._runs = _runs(self.blocks)
        self.room = len(self.blocks) * BLOCK if end > start else 0

    def _own(self, index: int, tokens: int) -> None:
        """A block of its own in place of one that other rows hold, with the first of its tokens."""
        shared, number = self.blocks[index]
        slab, own = self._pool.take(1, self.blocks[index - 1] if index else None)[0]
        for layer, pair in shared.layers.items():
            for old, new in zip(pair, slab.layer(layer, *pair), strict=True):
                new[:, own * BLOCK :][:, : max(0, tokens)] = old[:, number * BLOCK :][:, : max(0, tokens)]
        self._pool.give([self.blocks[index]])
        self.blocks[index] = slab, own

    def extended(self, layer: int, keys: Tensor, values: Tensor, window: int | None) -> list[Piece]:
        """Write new tokens' keys and values `[heads, new, head_dim]`; what they may look at, in pieces, in order.

        With a window, that is what the first of them may look at.
        """
        start, end, at = self.length, self.length + keys.shape[1], 0
        oldest = 0 if window is None else max(0, start + 1 - window)
        pieces = []
        for slab, first, tokens in self._runs:
            upto = min(at + tokens, end)
            if upto > oldest:
                held = slab.layers.get(layer) or slab.layer(layer, keys, values)
                if upto > start:
                    since = max(at, start)
                    into, of = slice(first + since - at, first + upto - at), slice(since - start, upto - start)
                    held[0][:, into], held[1][:, into] = keys[:, of], values[:, of]
                seen = slice(first + max(oldest - at, 0), first + upto - at)
                pieces.append((held[0][:, seen], held[1][:, seen]))
            at += tokens
        return pieces

    def pieces(self, layer: int, oldest: int, end: int) -> list[Piece]:
        """Keys and values of the tokens from `oldest` to `end`, in pieces, in order."""
        pieces, at = [], 0
        for slab, first, tokens in self._runs:
            since, upto = max(at, oldest), min(at + tokens, end)
            if since < upto:
                keys, values = slab.layers[layer]
                seen = slice(first + since - at, first + upto - at)
                pieces.append((keys[:, seen], values[:, seen]))
            at += tokens
        return pieces

    def copy(self) -> "CachedRow":
        """Another row that holds the same, in the same memory as long as neither writes there."""
        other = CachedRow(self._pool)
        self._pool.share(self.blocks)
        other.blocks += self.blocks
        other.length, other._runs, self.room = self.length, self._runs, 0
        return other


_FREE = re.compile(rb"\0+")


def _runs(blocks: Sequence[Block]) -> list[tuple[_Slab, int, int]]:
    """Blocks that lie one behind the other, together: slab, first token there, tokens."""
    runs: list[tuple[_Slab, int, int]] = []
    for slab, number in blocks:
        if runs and runs[-1][0] is slab and runs[-1][1] + runs[-1][2] == number * BLOCK:
            runs[-1] = slab, runs[-1][1], runs[-1][2] + BLOCK
        else:
            runs.append((slab, number * BLOCK, BLOCK))
    return runs


class RowCache(Cache):
    """Keys and values of the rows of one text, or of several that go on together, in some decoder layers.

    Parameters
    ----------
    pool
        Where its blocks are.
    rotaries
        The model's rotary embeddings that change with the length of the text (dynamic NTK, longrope), by name: the
        cache keeps copies, as one text must not change another's.
    """

    def __init__(self, pool: Pool, rotaries: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__(layers=[])
        self._pool, self.rotaries = pool, copy.deepcopy(dict(rotaries or {}))
        self.rows: list[CachedRow] = []

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds; empty before the first step."""
        return [row.length for row in self.rows]

    def begin(self, rows: Rows) -> None:
        """Make room for a step; what a row holds from its start position on is dropped.

        An IndexError if a row starts behind its end, or the number of rows is another than the cache holds.
        """
        if not self.rows:
            self.rows = [CachedRow(self._pool) for _ in rows.starts]
        if len(rows.starts) != len(self.rows):
            raise IndexError(f"the cache holds {len(self.rows)} rows, the step has {len(rows)}")
        for row, start, end in zip(self.rows, rows.starts, rows.ends, strict=True):
            if start > row.length:
                raise IndexError(f"the cache holds {row.length} tokens of a row that is to go on at {start}")
            if start != row.length or end > row.room:
                row.begin(start, end)

    def blocks_for(self, rows: Rows, chosen: Sequence[int] | None = None) -> int:
        """Blocks that the rows will hold after a step, each counted once.

        `chosen` are the rows that they become copies of before it; copies share the whole blocks of their text.
        """
        rows_before = self.rows if chosen is None else [self.rows[row] for row in chosen]
        kept = set[tuple[int, int]]()
        for row, start in zip(rows_before, rows.starts, strict=False):
            kept.update((id(slab), number) for slab, number in row.blocks[: start // BLOCK])
        return len(kept) + sum(
            -(-end // BLOCK) - start // BLOCK for start, end in zip(rows.starts, rows.ends, strict=True)
        )

    def select(self, chosen: Sequence[int]) -> None:
        """Row `i` becomes a copy of what row `chosen[i]` was; an IndexError if that is not there."""
        if not self.rows:
            return
        if any(not 0 <= row < len(self.rows) for row in chosen):
            raise IndexError(f"the cache holds {len(self.rows)} rows, row {max(chosen)} is not among them")
        before, kept = self.rows, set[int]()
        self.rows = []
        for row in chosen:
            self.rows.append(before[row].copy() if row in kept else before[row])
            kept.add(row)

    def fork(self) -> "RowCache":
        """Another cache that goes on by itself from the same."""
        other = RowCache(self._pool, self.rotaries)
        other.rows = [row.copy() for row in self.rows]
        return other

    def crop_rows(self, lengths: Sequence[int]) -> None:
        """Drop what each row holds behind the given length."""
        for row, length in zip(self.rows, lengths, strict=False):
            if length < row.length:
                row.begin(length, length)

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self.rows = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row, whichever layer is asked."""
        return max(self.lengths, default=0)


class JoinedRows(RowCache):
    """What layers call that attend by themselves: all rows' keys and values, one behind the other."""

    def __init__(self, rows: Sequence[CachedRow], counts: Sequence[int]) -> None:
        super().__init__(Pool())
        self.rows, self._counts = list(rows), list(counts)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any) -> Piece:
        new = zip(key_states[0].split(self._counts, 1), value_states[0].split(self._counts, 1), strict=True)
        found = [row.extended(layer_idx, *pair, None) for row, pair in zip(self.rows, new, strict=True)]
        pieces = [piece for of_row in found for piece in of_row]
        keys, values = zip(*pieces, strict=True)
        return torch.cat(keys, 1).unsqueeze(0), torch.cat(values, 1).unsqueeze(0)
