"""The three parts put together are the whole model; rows, masks and caches do what a dense reference does."""

from typing import Any

import pytest
import torch

from fedsea.checkpoints import load_whole_model, open_checkpoint
from fedsea.errors import ModelNotFoundError, PartitionError
from fedsea.partition import Partition, layer_of, weight_names
from fedsea.parts import MiddleBlocks, RowCache, Rows
from fedsea.parts.family import family_of
from fedsea.parts.rows import attention_mask
from tests.parts.conftest import parts
from tests.support.refused import refused

FLOAT = torch.float32


@pytest.mark.parametrize("name", ["tiny", "tiny-llama3", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"])
def test_parts_chained_are_the_whole_model(name: str) -> None:
    whole = load_whole_model(f"random:{name}")
    layers = whole.config.num_hidden_layers
    ids = torch.randint(256, (2, 60), generator=torch.Generator().manual_seed(0))
    rows = Rows.uniform(2, 0, 60)
    for p in range(layers + 1):
        partition = Partition(p, (layers - p) // 2)
        first, *middle, last = parts(partition, name)
        hidden = first(ids, rows, first.new_cache())
        for blocks in middle:
            hidden = blocks(hidden, rows, blocks.new_cache(), partition.middle(layers))
        logits = last.logits(last(hidden, rows, last.new_cache()))
        torch.testing.assert_close(logits, whole(ids).logits, atol=1e-5, rtol=0)


def test_a_part_holds_its_own_weights_only() -> None:
    whole, held = load_whole_model("random:tiny").state_dict(), dict[str, torch.Tensor]()
    for part in parts(Partition(2, 1)):
        weights = part.state_dict()
        assert not weights.keys() & held.keys()
        held |= weights
    torch.testing.assert_close(held, dict(whole), rtol=0, atol=0)


def test_layers_outside_the_model_and_unknown_families_are_refused() -> None:
    checkpoint = open_checkpoint("random:tiny")
    with refused(PartitionError, "0:6"):
        MiddleBlocks.from_checkpoint(checkpoint, range(3, 7), dtype=FLOAT)
    with refused(PartitionError, "0 or more"):
        Partition(-1, 0)
    checkpoint.config.model_type = "gpt2"
    with refused(ModelNotFoundError, r"'gpt2'.*llama"):
        family_of(checkpoint.config)


def test_weight_names_are_found_by_layer_and_end() -> None:
    names = [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.11.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert weight_names(names, range(1, 3)) == [names[1]]
    assert weight_names(names, range(11, 12), norm=True, head=True) == [names[4], names[2], names[3]]
    assert [layer_of(name) for name in names] == [None, 1, 11, None, None]


@pytest.mark.parametrize(
    "rows",
    [
        Rows((0, 0, 0), (4, 1, 3)),
        Rows((2, 5), (3, 3)),
        Rows((7, 0, 3), (1, 6, 2)),
        Rows((4, 4), (1, 1)),
        Rows((3, 1), (0, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 3])
def test_masks_say_what_the_definition_says(rows: Rows, window: int | None) -> None:
    mask = attention_mask(rows, window, torch.device("cpu"))
    columns = rows.reach
    if mask is None:  # then plain causal attention must be the same thing
        mask = torch.ones(rows.width, columns, dtype=torch.bool).tril(columns - rows.width)[None, None]
    mask = mask.expand(len(rows), 1, rows.width, columns)
    for row, (start, count) in enumerate(zip(rows.starts, rows.counts, strict=True)):
        for token in range(count):
            position = start + token
            seen = {column for column in range(columns) if mask[row, 0, token, column]}
            first = 0 if window is None else max(0, position - window + 1)
            assert seen == set(range(first, position + 1))


@pytest.mark.parametrize("counts", [(4, 1, 3), (2, 2, 2), (0, 5, 1)])
def test_packing_leaves_padding_out_and_comes_back(counts: tuple[int, ...]) -> None:
    rows = Rows((0,) * 3, counts)
    packed = torch.randn(sum(counts), 8)
    padded = rows.unpack(packed)
    assert padded.shape == (3, max(counts), 8)
    assert torch.equal(rows.pack(padded), packed)


def test_chunks_cover_each_place_once_in_order() -> None:
    rows = Rows((3, 0, 10), (20, 1, 7))
    chunks = rows.chunks(9)
    assert all(chunk.total <= 9 for chunk in chunks)
    for row in range(3):
        places = [place for chunk in chunks for place in range(chunk.starts[row], chunk.ends[row])]
        assert places == list(range(rows.starts[row], rows.ends[row]))


def test_the_cache_keeps_rows_of_their_own_lengths() -> None:
    # Against a plain list of what each row should hold, over random steps, crops and row choices.
    generator = torch.Generator().manual_seed(0)
    cache = RowCache(torch.nn.Identity())
    held: list[list[torch.Tensor]] = [[], [], []]

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    for _ in range(60):
        starts = tuple(max(0, len(row) - number(0, 3)) for row in held)
        rows = Rows(starts, tuple(number(1, 40) for _ in held))
        states = torch.randn(len(held), 2, rows.width, 4, generator=generator)
        cache.begin(rows)
        keys, values = cache.update(states, states + 1, layer_idx=17)
        cache.finish()
        for row, (start, count) in enumerate(zip(rows.starts, rows.counts, strict=True)):
            held[row] = held[row][:start] + [states[row, :, token] for token in range(count)]
            assert cache.lengths[row] == len(held[row])
            assert torch.equal(keys[row, :, : len(held[row])], torch.stack(held[row], 1))
            assert torch.equal(values[row, :, : len(held[row])], torch.stack(held[row], 1) + 1)
        if number(0, 4) == 0:
            chosen = [number(0, len(held)) for _ in range(number(1, 5))]
            cache.select(chosen)
            held = [list(held[row]) for row in chosen]
    with pytest.raises(IndexError, match="go on at"):
        cache.begin(Rows(tuple(length + 1 for length in cache.lengths), (1,) * len(held)))
    with pytest.raises(IndexError, match="rows"):
        cache.begin(Rows((0,) * 9, (1,) * 9))


def test_rope_that_depends_on_length_is_kept_apart_between_texts() -> None:
    """Dynamic NTK changes the rotary embedding once a text is long; another text must not notice."""
    checkpoint = open_checkpoint("random:tiny")
    checkpoint.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    checkpoint.config.max_position_embeddings = 32
    blocks: Any = MiddleBlocks.from_checkpoint(checkpoint, range(6), dtype=FLOAT)
    short = torch.randn(1, 8, 64)
    rows = Rows.uniform(1, 0, 8)
    alone = blocks(short, rows, blocks.new_cache(), range(6))
    blocks(torch.randn(1, 100, 64), Rows.uniform(1, 0, 100), blocks.new_cache(), range(6))
    assert torch.equal(blocks(short, rows, blocks.new_cache(), range(6)), alone)
