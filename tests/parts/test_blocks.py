"""The three parts put together are the whole model; rows are cut into chunks."""

from typing import Any

import pytest
import torch

from fedsea.checkpoints import load_whole_model, open_checkpoint
from fedsea.errors import PartitionError
from fedsea.partition import Partition, layer_of
from fedsea.parts import MiddleBlocks, Rows
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
        hidden = first(ids.reshape(-1), rows, first.new_cache())
        for blocks in middle:
            hidden = blocks(hidden, rows, blocks.new_cache(), partition.middle(layers))
        logits = last.logits(last(hidden, rows, last.new_cache()))
        torch.testing.assert_close(logits.view(2, 60, -1), whole(ids).logits, atol=1e-5, rtol=0)


def test_a_part_holds_its_own_weights_only() -> None:
    whole, held = load_whole_model("random:tiny").state_dict(), dict[str, torch.Tensor]()
    for part in parts(Partition(2, 1)):
        weights = part.state_dict()
        assert not weights.keys() & held.keys()
        held |= weights
    torch.testing.assert_close(held, dict(whole), rtol=0, atol=0)


def test_layers_outside_the_model_are_refused() -> None:
    checkpoint = open_checkpoint("random:tiny")
    with refused(PartitionError, "0:6"):
        MiddleBlocks.from_checkpoint(checkpoint, range(3, 7), dtype=FLOAT)
    with refused(PartitionError, "0 or more"):
        Partition(-1, 0)


def test_a_weights_layer_is_the_first_number_in_its_name() -> None:
    names = ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "transformer.h.11.attn.c_attn.bias"]
    names += ["model.decoder.layers.3.fc1.weight", "model.layers.2.mlp.experts.7.up_proj.weight", "lm_head.weight"]
    assert [layer_of(name) for name in names] == [None, 1, 11, 3, 2, None]


def test_chunks_cover_each_place_once_in_order() -> None:
    rows = Rows((3, 0, 10), (20, 1, 7))
    chunks = rows.chunks(9)
    assert all(chunk.total <= 9 for chunk in chunks)
    for row in range(3):
        places = [place for chunk in chunks for place in range(chunk.starts[row], chunk.ends[row])]
        assert places == list(range(rows.starts[row], rows.ends[row]))


def test_rope_that_depends_on_length_is_kept_apart_between_texts() -> None:
    """Dynamic NTK changes the rotary embedding once a text is long; another text must not notice."""
    checkpoint = open_checkpoint("random:tiny")
    checkpoint.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    checkpoint.config.max_position_embeddings = 32
    blocks: Any = MiddleBlocks.from_checkpoint(checkpoint, range(6), dtype=FLOAT)
    short, rows = torch.randn(8, 64), Rows((0,), (8,))
    alone = blocks(short, rows, blocks.new_cache(), range(6))
    blocks(torch.randn(100, 64), Rows((0,), (100,)), blocks.new_cache(), range(6))
    assert torch.equal(blocks(short, rows, blocks.new_cache(), range(6)), alone)
