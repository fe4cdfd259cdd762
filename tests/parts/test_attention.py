"""Attention over rows, and the memory of their keys and values, against their definitions."""

import gc
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsea.parts import BLOCK, RowCache, Rows
from fedsea.parts.attention import Step, attention
from fedsea.parts.cache import Pool

HEADS, GROUPS, SIZE = 4, 2, 8
LAYER_17: Any = SimpleNamespace(layer_idx=17)


def finish(cache: RowCache, rows: Rows) -> None:
    """As a part does after its layers."""
    for row, end in zip(cache.rows, rows.ends, strict=True):
        row.length = end


def by_definition(query: Tensor, keys: Tensor, values: Tensor, window: int | None, **options: Any) -> Tensor:
    """One token after the other, one head after the other: the last `len(query)` of `len(keys)` tokens."""
    out = torch.empty(query.shape[1], HEADS, SIZE)
    for token in range(query.shape[1]):
        position = keys.shape[1] - query.shape[1] + token
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(HEADS):
            group = head * GROUPS // HEADS
            seen, held = keys[group, first : position + 1], values[group, first : position + 1]
            scores = seen @ query[head, token] * options.get("scaling", SIZE**-0.5)
            if "softcap" in options:
                scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
            if "s_aux" in options:
                scores, held = (
                    torch.cat([scores, options["s_aux"][head].view(1)]),
                    torch.cat([held, torch.zeros(1, SIZE)]),
                )
            out[token, head] = scores.softmax(0) @ held
    return out


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(
    "options", [{}, {"scaling": 0.2}, {"softcap": 0.5}, {"s_aux": torch.linspace(-1, 1, HEADS)}], ids=str
)
def test_rows_attend_to_their_own_tokens_over_random_steps_crops_and_copies(
    window: int | None, options: dict[str, Any]
) -> None:
    draws = torch.Generator().manual_seed(0)
    cache, held = RowCache(Pool()), [(torch.zeros(GROUPS, 0, SIZE),) * 2 for _ in range(3)]

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=draws))

    for _ in range(12):
        starts = tuple(max(0, keys.shape[1] - number(0, 3)) for keys, _ in held)
        rows = Rows(starts, (number(1, 20), *(number(0, 20) for _ in held[1:])))
        query, keys, values = (torch.randn(1, n, rows.total, SIZE, generator=draws) for n in (HEADS, GROUPS, GROUPS))
        cache.begin(rows)
        step = Step(rows.counts, cache.rows)
        found, _ = attention(LAYER_17, query, keys, values, sliding_window=window, fedsea_step=step, **options)
        finish(cache, rows)
        new = zip(
            query[0].split(rows.counts, 1), keys[0].split(rows.counts, 1), values[0].split(rows.counts, 1), strict=True
        )
        right = []
        for row, (asked, key, value) in enumerate(new):
            held[row] = tuple(
                torch.cat([old[:, : starts[row]], one], 1) for old, one in zip(held[row], (key, value), strict=True)
            )  # type: ignore[assignment]
            right.append(by_definition(asked, *held[row], window, **options))
        torch.testing.assert_close(found[0], torch.cat(right), atol=1e-5, rtol=1e-5)
        assert cache.lengths == [keys.shape[1] for keys, _ in held]
        if number(0, 3) == 0:
            chosen = [number(0, len(held)) for _ in range(number(1, 5))]
            cache.select(chosen)
            held = [held[row] for row in chosen]
    with pytest.raises(IndexError, match="go on at"):
        cache.begin(Rows(tuple(length + 1 for length in cache.lengths), (1,) * len(held)))
    with pytest.raises(IndexError, match="rows"):
        cache.begin(Rows((0,) * 9, (1,) * 9))


@pytest.mark.parametrize("counts", [(7,), (6, 6, 6), (3, 9, 1)])
@pytest.mark.parametrize("window", [None, 4])
def test_whole_texts_without_a_cache_attend_as_with_one(counts: tuple[int, ...], window: int | None) -> None:
    rows, cache = Rows((0,) * len(counts), counts), RowCache(Pool())
    given: list[Any] = [torch.randn(1, n, rows.total, SIZE) for n in (HEADS, GROUPS, GROUPS)]
    cache.begin(rows)
    right, _ = attention(LAYER_17, *given, sliding_window=window, fedsea_step=Step(rows.counts, cache.rows))
    found, _ = attention(LAYER_17, *given, sliding_window=window, fedsea_step=Step(rows.counts))
    torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-5)


def fill(cache: RowCache, rows: Rows) -> None:
    cache.begin(rows)
    keys = torch.randn(1, GROUPS, rows.total, SIZE)
    step = Step(rows.counts, cache.rows)
    attention(LAYER_17, torch.randn(1, HEADS, rows.total, SIZE), keys, keys, fedsea_step=step)
    finish(cache, rows)


def test_copies_share_blocks_until_they_differ_and_all_are_given_back() -> None:
    pool = Pool()
    cache = RowCache(pool)
    fill(cache, Rows((0,), (3 * BLOCK + 5,)))
    assert pool.taken == 4
    cache.select([0, 0, 0])
    assert pool.taken == 4
    rows = Rows((3 * BLOCK + 5,) * 3, (1,) * 3)
    assert cache.blocks_for(rows) == 3 + 3
    fill(cache, rows)
    assert pool.taken == 3 + 3  # the last blocks are each row's own now
    cache.crop_rows([BLOCK, BLOCK, BLOCK])
    assert pool.taken == 1
    cache.reset()
    gc.collect()
    assert pool.taken == 0


def test_a_pool_is_filled_to_the_last_block_before_it_grows() -> None:
    pool = Pool()
    caches = [RowCache(pool) for _ in range(8)]
    for step in range(64):  # side by side, as sessions grow
        for number, cache in enumerate(caches):
            if step % (number + 1) == 0:
                fill(cache, Rows((cache.get_seq_length(),), (number + 3,)))
    tokens = sum(cache.get_seq_length() for cache in caches)
    assert tokens <= pool.taken * BLOCK < tokens + len(caches) * BLOCK
    assert pool.held - pool.taken < 256


def test_threads_that_share_a_pool_never_get_one_block_twice() -> None:
    pool, wrong = Pool(), list[str]()

    def use(number: int) -> None:
        for _ in range(60):
            caches = [RowCache(pool) for _ in range(3)]
            for cache in caches:
                cache.begin(Rows((0,), (number + 3 * BLOCK,)))
            held = [block for cache in caches for row in cache.rows for block in row.blocks]
            if any(slab.holders[at] != 1 for slab, at in held) or len({(id(slab), at) for slab, at in held}) < len(
                held
            ):
                wrong.append("a block of two rows")
            caches[0].select([0, 0])
            del caches, cache, held

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    gc.collect()
    assert not wrong
    assert pool.taken == 0
