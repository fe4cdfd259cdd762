"""Where the tokens of a batch stand: its padding, positions and packed texts, read as rows.

What transformers' `forward` makes of a mask and of positions is done as it does it, or refused before anything is sent.
In most families only differences of positions count, so a row may begin at any position; within it
the tokens have to be one after the other, as no more than lengths crosses the wire.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fedsea.client.cache import SplitCache, mask_with
from fedsea.errors import UsageError
from fedsea.parts import Rows
from fedsea.parts.rows import gather_rows
from fedsea.parts.structure import Structure, turning_point

# What TRL's and transformers' collators say of packed texts beside their positions.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass(frozen=True)
class Layout:
    """How `[rows, columns]` of a batch are texts.

    `mask` says which columns are tokens, bool, `[rows, columns]`; None if all are. `offsets` has of each row by how
    much the positions of its tokens are more than their number in the row. In a `packed` batch a row is several texts.
    """

    rows: Rows
    mask: Tensor | None
    offsets: tuple[int, ...]
    packed: bool = False

    def take(self, ids: Tensor) -> Tensor:
        """Token ids `[rows, columns]` of the batch -> those of the texts, one behind the other, `[tokens]`."""
        return ids.reshape(-1) if self.mask is None else ids[self.mask]

    def place(self, states: Tensor, shape: torch.Size) -> Tensor:
        """States of the texts' tokens `[tokens, hidden]` -> `[rows, columns, hidden]`, zeros at padding."""
        if self.mask is None:
            return states.view(*shape, -1)
        placed = states.new_zeros(*shape, states.shape[1])
        placed[self.mask] = states
        return placed

    def carry_on(self, states: Tensor) -> Tensor:
        """States `[rows, columns, hidden]` with those of a text's last token at the padding behind it."""
        if self.mask is None or bool(self.mask[:, -1].all()):
            return states
        columns = torch.arange(self.mask.shape[1], device=states.device)
        last = torch.where(self.mask, columns, 0).cummax(1).values
        return states.gather(1, last.unsqueeze(2).expand(-1, -1, states.shape[2]))

    def choose(self, chosen: list[int]) -> "Layout":
        """That of some rows of the batch, which is not packed."""
        rows = Rows(tuple(gather_rows(self.rows.starts, chosen)), tuple(gather_rows(self.rows.counts, chosen)))
        mask = None if self.mask is None else self.mask[chosen]
        return Layout(rows, mask, tuple(gather_rows(self.offsets, chosen)))

    def check_learnt(self, labels: Tensor) -> None:
        """Refuse labels that would be learnt from states at padding: there are none here."""
        if self.mask is not None and bool((labels[:, 1:] != -100)[~self.mask[:, :-1]].any()):
            raise UsageError(
                "a label would be learnt from a column of padding: set the labels of padding, and of a row's first "
                "token behind it, to -100, or pad at the right: tokenizer.padding_side = 'right'"
            )


def read_batch(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Any,
    config: Any,
    structure: Structure,
    others: Mapping[str, Any],
) -> tuple[Tensor, Layout]:
    """The arguments of `forward`, checked: its token ids `[rows, columns]`, and their layout."""
    packing = {name: others[name] for name in PACKING if others.get(name) is not None}
    given = {key: value for key, value in others.items() if value is not None and key not in PACKING}
    unsupported = [key for key, value in given.items() if value is not False]
    if config.output_hidden_states and "output_hidden_states" not in given:
        unsupported.append("output_hidden_states")  # the configuration asks for them in every call
    if unsupported:
        raise UsageError(f"a split model does not take {', '.join(sorted(unsupported))}")
    if input_ids is None or input_ids.numel() == 0:
        raise UsageError("the prompt is empty; the model needs at least one token")
    if input_ids.dim() != 2:
        raise UsageError(f"input_ids must be [rows, tokens]; got the shape {list(input_ids.shape)}")
    if cache is not None and not isinstance(cache, SplitCache):
        raise UsageError("the cache of a split model comes from its own new_cache()")
    return input_ids, read_layout(input_ids, attention_mask, position_ids, packing, cache, config, structure)


def read_layout(
    ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor | None,
    packing: Mapping[str, Any],
    cache: SplitCache | None,
    config: Any,
    structure: Structure,
) -> Layout:
    """How transformers' `forward` reads a batch `[rows, columns]`; UsageError if it is none of what is supported.

    Without a cache these are whole texts, which may be packed where there is no mask. `packing` is what there is of
    `PACKING`.
    """
    cached = cache.columns if cache is not None else 0
    before = cache.lengths if cache is not None and cache.lengths else [0] * len(ids)
    if len(before) != len(ids):
        raise UsageError(f"the cache holds {len(before)} rows, the batch has {len(ids)}")
    plain = cache is None or (cache.mask is None and not any(cache.offsets))
    if plain and attention_mask is None and positions is None and not packing:
        # Never any padding, and positions begin at 0: as in most steps, which should cost nothing here.
        return Layout(Rows(tuple(before), (ids.shape[1],) * len(ids)), None, (0,) * len(ids))
    mask = _tokens(ids, attention_mask, cache, cached)
    counted = torch.arange(cached, cached + ids.shape[1], device=ids.device).unsqueeze(0)
    given = counted if positions is None else _checked(positions, ids)
    layout = _packed(ids, given) if positions is not None and attention_mask is None and cache is None else None
    _check_packing(packing, layout, ids)
    if layout is None:
        layout = _counting_on(ids, mask, given, before, cache, explicit=positions is not None)
        _check_windows(mask_with(cache, ids.shape[1], mask), config.sliding_window if structure.windowed else None)
    if structure.absolute and any(layout.offsets):
        raise UsageError(
            "this model counts positions from a text's first token: leave out the padding before it, or give "
            "position_ids that begin at 0 (attention_mask.cumsum(-1) - 1), as generate does"
        )
    turn = turning_point(config)
    if turn is not None and (int(given.max()) >= turn) != (layout.rows.furthest > turn):
        raise UsageError(
            f"by its positions this batch is computed as a text of more than {turn} tokens, and by its tokens as a "
            "shorter one: leave out the padding, or give positions that begin at 0"
        )
    return layout


def _tokens(ids: Tensor, attention_mask: Tensor | None, cache: SplitCache | None, cached: int) -> Tensor | None:
    """Which of the new columns are tokens; those before must be what the cache holds."""
    known = cache.mask if cache is not None else None
    if attention_mask is None:
        if known is not None and not bool(known.all()):
            raise UsageError("the cache holds padding: give the attention_mask of all columns, the cache's as well")
        return None
    columns = ids.shape[1]
    if attention_mask.shape != (len(ids), cached + columns):
        raise UsageError(
            f"the attention_mask has the shape {list(attention_mask.shape)}; a split model takes one of 1 for tokens "
            f"and 0 for padding, here {[len(ids), cached + columns]}"
        )
    whole = attention_mask.to(ids.device).bool()
    old = whole[:, :cached]
    if not (bool(old.all()) if known is None else torch.equal(old, known.to(old.device))):
        raise UsageError("the attention_mask is another than before where the cache holds the text already")
    mask = whole[:, cached:]
    return None if bool(mask.all()) else mask


def _checked(positions: Tensor, ids: Tensor) -> Tensor:
    shapes = (list(ids.shape), [1, ids.shape[1]])
    if list(positions.shape) not in shapes or positions.is_floating_point():
        raise UsageError(f"position_ids must be whole numbers of the shape {shapes[0]}; got {list(positions.shape)}")
    return positions.to(ids.device)


def _packed(ids: Tensor, positions: Tensor) -> Layout | None:
    """As transformers reads positions where there is no mask: a text begins where they do not count on."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = (positions.diff(dim=-1) != 1).expand(len(ids), -1)
    if not bool(begins[:, 1:].any()):
        return None
    first = [*begins.flatten().nonzero().flatten().tolist(), ids.numel()]
    counts = tuple(end - start for start, end in pairwise(first))
    return Layout(Rows((0,) * len(counts), counts), None, (0,) * len(counts), packed=True)


def _check_packing(packing: Mapping[str, Any], layout: Layout | None, ids: Tensor) -> None:
    """What a collator says of packed texts beside their positions must be the same."""
    if not packing:
        return
    counts = layout.rows.counts if layout is not None else (ids.shape[1],) * len(ids)
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    number = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).tolist()
    right = {"cu_seq_lens": ends, "max_length": max(counts), "seq_idx": number}
    for name, value in packing.items():
        said = value.flatten().tolist() if isinstance(value, Tensor) and value.dim() else int(value)
        if said != right[name.removesuffix("_q").removesuffix("_k")]:
            raise UsageError(f"{name} says that other texts are packed here than position_ids, without a mask, does")


def _counting_on(
    ids: Tensor, mask: Tensor | None, positions: Tensor, before: list[int], cache: SplitCache | None, *, explicit: bool
) -> Layout:
    """One text a row, whose tokens' positions count on from one to the next, and from those of the cache."""
    tokens = mask if mask is not None else torch.ones_like(ids, dtype=torch.bool)
    rows = Rows(tuple(before), tuple(tokens.sum(1).tolist()))
    if min(rows.counts) == 0:
        raise UsageError("a prompt of the batch is empty; each needs at least one token")
    started = torch.tensor(before, device=ids.device).unsqueeze(1)
    offset = positions - (started + tokens.cumsum(1) - 1)
    first = offset.gather(1, tokens.int().argmax(1, keepdim=True))
    if cache is not None and cache.offsets:
        known = torch.tensor(cache.offsets, device=ids.device).unsqueeze(1)
        first = torch.where(started > 0, known, first)
    wrong = (offset != first) & tokens
    if bool(wrong.any()):
        raise UsageError(_hole(int(wrong.any(1).int().argmax()), explicit=explicit))
    return Layout(rows, mask, tuple(first.flatten().tolist()))


def _hole(row: int, *, explicit: bool) -> str:
    if explicit:
        return (
            f"the position_ids of row {row} do not count on from one token to the next; they may start again, for "
            "packed texts, only without an attention_mask and without a cache (use_cache=False)"
        )
    return (
        f"row {row} has padding between its tokens, over which forward counts positions on, and a split model cannot: "
        "pad at the left, or give position_ids that leave it out (attention_mask.cumsum(-1) - 1), as generate does"
    )


def _check_windows(whole: Tensor | None, window: int | None) -> None:
    """Sliding windows count columns; that is as counting tokens where no padding is between them."""
    if whole is None or window is None or whole.shape[1] <= window:
        return
    begun, ended = whole.cumsum(1) > 0, whole.flip(1).cumsum(1).flip(1) > 0
    if bool((~whole & begun & ended).any()):
        raise UsageError(
            "a row has padding between its tokens, which this model's sliding windows would count: pad at the left"
        )
