"""Attention over rows of different lengths, one behind the other: one function for every family of transformers.

transformers calls it in place of its own (`AttentionInterface`). A step's new tokens stand in one row of the model,
`[1, heads, tokens, head_dim]`; each of the step's rows attends to its own tokens: those that its cache holds, and its
new ones up to each. Windows, soft caps and sinks are what the family's layers ask for; no line here knows a family.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from fedsea.parts.cache import CachedRow, Piece
from fedsea.parts.rows import Rows

_Options = tuple[float | None, float, float | None, Tensor | None]  # scaling, dropout, soft cap, sinks
IMPLEMENTATION = "fedsea"  # as transformers' configurations call it


@dataclass
class Step:
    """What layers compute: `counts` new tokens of each row.

    Attributes
    ----------
    cached
        Where each row's keys and values are; None for whole texts of which nothing is kept.
    siblings
        Whether the tokens could all come next in the one row: each attends to that and to itself, and none is kept.
    calls, windows
        How often layers have attended, and which windows they have asked for.
    """

    counts: Sequence[int]
    cached: Sequence[CachedRow] | None = None
    siblings: bool = False
    calls: int = 0
    windows: set[int] = field(default_factory=set)


class _Now(threading.local):
    step: Step | None = None


NOW = _Now()  # for families whose layers do not hand on `fedsea_step`


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    fedsea_step: Step | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """`[1, heads, tokens, head_dim]` -> `[1, tokens, heads, head_dim]`, as transformers asks for it."""
    step = fedsea_step or NOW.step
    assert step is not None, "layers are a part's, which says what they compute"
    step.calls += 1
    if sliding_window is not None:
        step.windows.add(sliding_window)
    options, layer = (scaling, dropout, softcap, s_aux), cast(int, module.layer_idx)
    if step.siblings:
        return _siblings(step.cached, layer, query[0], key[0], value[0], sliding_window, options), None
    plain = softcap is None and s_aux is None
    if step.cached is None and plain and len(set(step.counts)) == 1 < len(step.counts):
        return _alike(len(step.counts), query, key, value, scaling, dropout, sliding_window), None
    done, at = [], 0
    for number, count in enumerate(step.counts):
        new = slice(at, at + count)
        own = key[0, :, new], value[0, :, new]
        pieces = [own] if step.cached is None else step.cached[number].extended(layer, *own, sliding_window)
        if count == 1 == len(pieces) and plain:
            keys, values = pieces[0]  # all there is can be looked at
            out = scaled_dot_product_attention(
                query[:, :, new],
                keys.unsqueeze(0),
                values.unsqueeze(0),
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=query.shape[1] != len(keys),
            )
            done.append(out.view(1, query.shape[1], -1))
        elif count:
            done.append(_row(query[0, :, new], pieces, sliding_window, options))
        at += count
    return (done[0] if len(done) == 1 else torch.cat(done)).unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, attention)


def _alike(
    rows: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    """Whole texts of one length: one call for all."""
    query, key, value = (one[0].unflatten(1, (rows, -1)).transpose(0, 1) for one in (query, key, value))
    count = query.shape[2]
    mask = _mask(count, count, window, query.device) if window is not None and window < count else None
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and count > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).reshape(1, rows * count, out.shape[1], out.shape[3])


def _siblings(
    cached: Sequence[CachedRow] | None,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    options: _Options,
) -> Tensor:
    """Tokens that could come next in one row: each attends to what is cached and to itself."""
    assert cached is not None
    (row,), count = cached, query.shape[1]
    oldest = 0 if window is None else max(0, row.length + 1 - window)
    before = row.pieces(layer, oldest, row.length)
    mask = torch.eye(count, dtype=torch.bool, device=query.device)
    mask = torch.cat([mask.new_ones(count, row.length - oldest), mask], 1)
    return _weighed(query, [*before, (key, value)], mask, options).unsqueeze(0)


def _row(query: Tensor, pieces: Sequence[Piece], window: int | None, options: _Options) -> Tensor:
    """One row's new tokens `[heads, new, head_dim]`, the last of what `pieces` hold: `[new, heads, head_dim]`."""
    scaling, dropout, softcap, sinks = options
    heads, new, _ = query.shape
    tokens = sum(keys.shape[1] for keys, _values in pieces)
    seen = window is None or tokens <= window  # by the last of them, everything
    if len(pieces) > 1 or softcap is not None or sinks is not None:
        mask = None if new == 1 and seen else _mask(new, tokens, window, query.device)
        return _weighed(query, pieces, mask, options)
    keys, values = pieces[0]
    whole = new == tokens and seen
    out = scaled_dot_product_attention(
        query.unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=None if whole else _mask(new, tokens, window, query.device),
        is_causal=whole,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=heads != len(keys),
    )
    return out[0].transpose(0, 1)


def _weighed(query: Tensor, pieces: Sequence[Piece], mask: Tensor | None, options: _Options) -> Tensor:
    """The same by its definition: with soft caps, sinks, any mask `[new, tokens]`, and pieces that lie apart."""
    scaling, dropout, softcap, sinks = options
    heads, new, size = query.shape
    groups, sizes = len(pieces[0][0]), [keys.shape[1] for keys, _values in pieces]
    grouped = query.reshape(groups, -1, size)
    scores = torch.cat([grouped @ keys.mT for keys, _values in pieces], 2) * (scaling or size**-0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(heads, new, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(heads, 1, 1).expand(-1, new, 1).to(scores.dtype)], 2)
    weights = scores.softmax(2, dtype=torch.float32).to(query.dtype)[:, :, : sum(sizes)]
    weights = drop(weights, dropout, training=dropout > 0).reshape(groups, -1, sum(sizes))
    parts: list[Tensor] = [part @ values for part, (_keys, values) in zip(weights.split(sizes, 2), pieces, strict=True)]
    return sum(parts[1:], start=parts[0]).reshape(heads, new, -1).transpose(0, 1)


def _mask(new: int, tokens: int, window: int | None, device: torch.device) -> Tensor:
    """True where the last `new` of `tokens` may attend: to those before and themselves, `window` of them at most."""
    position = torch.arange(tokens - new, tokens, device=device).unsqueeze(1)
    column = torch.arange(tokens, device=device)
    mask = column <= position
    if window is not None:
        mask &= column > position - window
    return mask


def joined_mask(rows: Rows, dtype: torch.dtype, device: torch.device, cached: bool) -> Tensor:
    """What layers that attend by themselves add to scores: each row sees its own keys, which stand row by row.

    `[1, 1, new tokens, keys]`; the keys are those that are cached and the new ones, row by row.
    """
    starts = rows.starts if cached else (0,) * len(rows)
    own = [_mask(count, start + count, None, device) for start, count in zip(starts, rows.counts, strict=True)]
    allowed = torch.block_diag(*own).bool()
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, torch.finfo(dtype).min)[
        None, None
    ]
