"""A forward pass in training: a batch as micro-batches, and what of each leaves for the middle."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fedsea.client.protection import Protection
from fedsea.client.run import MiddleRun
from fedsea.errors import LimitExceededError, NonFiniteError, UsageError
from fedsea.parts import InputBlocks, Rows
from fedsea.parts.blocks import Part
from fedsea.parts.structure import turning_point
from fedsea.wire.codec import MAX_PLACES
from fedsea.wire.frames import Kind


def leaving(
    blocks: InputBlocks,
    protection: Protection,
    run: MiddleRun,
    tokens: Tensor,
    rows: Rows,
    split: list[tuple[int, int]],
) -> Iterator[tuple[Rows, Tensor]]:
    """Token ids `[tokens]` of each micro-batch through the input blocks: its rows, and what may leave of them.

    NonFiniteError says after which layer something is not finite first.
    """
    for first, last in split:
        piece = Rows(rows.starts[first:last], rows.counts[first:last])
        ids = tokens[sum(rows.counts[:first]) : sum(rows.counts[:last])]
        digests = list[list[bytes]]([] for _ in range(first, last))
        hidden = protection.states(blocks, ids, piece, piece, None, digests, training=True, base=first == 0)
        if not bool(torch.isfinite(hidden).all()):
            where = first_not_finite(blocks, blocks.embed(ids, piece), piece) or "with the noise"
            run.trouble = f"the hidden states are not finite: first {where}, in the input blocks"
            raise NonFiniteError(run.explanation())
        yield piece, hidden


def split_batch(run: MiddleRun, rows: Rows, micro_batches: int, config: Any) -> list[tuple[int, int]]:
    """Rows `first` to `last` (exclusive) of each micro-batch, as many as the server keeps and frames can carry."""
    limit, turn = run.channel.micro_batches, turning_point(config)
    mixed = turn is not None and min(rows.counts) <= turn < max(rows.counts)
    tokens = run.settings.tokens_of_frame(run.channel.frame_bytes, Kind.FORWARD, len(rows))
    split = split_rows(rows, 1 if mixed else min(micro_batches, limit), tokens)
    if mixed and len(split) > 1:
        raise UsageError(
            f"this model computes texts of up to {turn} tokens in another way than longer ones; put no texts of both "
            "kinds into a batch that is too large for one frame, or make the batch smaller"
        )
    if len(split) > limit:
        raise LimitExceededError(
            f"the batch takes {len(split)} micro-batches, the block server keeps {limit}; make the batch smaller"
        )
    return split


def split_rows(rows: Rows, pieces: int, max_tokens: int) -> list[tuple[int, int]]:
    """Rows `first` to `last` (exclusive) of each micro-batch: about `pieces`, none larger than a frame may be."""
    if max(rows.counts) > max_tokens:
        raise LimitExceededError(
            f"a text of {max(rows.counts)} tokens does not fit into a frame of the block server's; {max_tokens} do"
        )
    size = -(-len(rows) // max(1, pieces))
    split, first = [], 0
    while first < len(rows):
        last = first + 1
        width = tokens = rows.counts[first]
        while last < len(rows) and last - first < size:
            width, tokens = max(width, rows.counts[last]), tokens + rows.counts[last]
            if (last + 1 - first) * width > MAX_PLACES or tokens > max_tokens:
                break
            last += 1
        split.append((first, last))
        first = last
    return split


def dropout_seed() -> int:
    """From torch's generator, which a training that is resumed sets; hashed, so that it tells nothing of that."""
    drawn = int(torch.randint(1 << 62, ()))
    return int.from_bytes(hashlib.blake2b(drawn.to_bytes(8), digest_size=4).digest()) >> 1


@torch.no_grad()
def first_not_finite(part: Part, hidden: Tensor, rows: Rows) -> str | None:
    """After which layer of a part the states are not finite first, in words; None if all are."""
    for layer in part.layers:
        if not bool(torch.isfinite(hidden).all()):
            return f"before layer {layer}"
        hidden = part.run_layers(hidden, rows, None, range(layer, layer + 1))
    return f"after layer {part.layers[-1]}" if part.layers and not bool(torch.isfinite(hidden).all()) else None
