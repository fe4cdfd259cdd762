"""What transformers and its users put in a module's place counts: the split model computes with what is registered."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fedsea.checkpoints import load_whole_model
from tests.conftest import RunningServer, StartServer, connect

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def grow(model: Any) -> None:
    torch.manual_seed(0)
    model.resize_token_embeddings(264, mean_resizing=False)


def shrink(model: Any) -> None:
    model.resize_token_embeddings(128, mean_resizing=False)


def replace_embedding(model: Any) -> None:
    new = nn.Embedding(256, 64)
    nn.init.normal_(new.weight, generator=torch.Generator().manual_seed(1))
    model.set_input_embeddings(new)


def replace_head(model: Any) -> None:
    new = nn.Linear(64, 256, bias=True)
    nn.init.normal_(new.weight, generator=torch.Generator().manual_seed(1))
    nn.init.ones_(new.bias)
    model.set_output_embeddings(new)


def replace_norm(model: Any) -> None:
    model.model.norm = nn.Identity()


def replace_layer(model: Any) -> None:
    layers = model.model.layers
    first: Any = "0" if isinstance(layers, nn.ModuleDict) else 0
    other = copy.deepcopy(layers[first])
    with torch.no_grad():
        other.mlp.up_proj.weight.mul_(2)
    layers[first] = other


@pytest.fixture(scope="module")
def servers(tiny_server: RunningServer, start_server: StartServer) -> dict[str, RunningServer]:
    return {"random:tiny": tiny_server, "random:tiny-qwen2": start_server("random:tiny-qwen2")}


@pytest.mark.parametrize("name", ["random:tiny", "random:tiny-qwen2"])  # its own head, and one tied to the embedding
@pytest.mark.parametrize("change", [grow, shrink, replace_embedding, replace_head, replace_norm, replace_layer])
def test_a_module_that_is_replaced_is_replaced(
    servers: dict[str, RunningServer], name: str, change: Callable[[Any], None]
) -> None:
    whole = load_whole_model(name)
    with connect(servers[name], name) as model:
        before = model(input_ids=IDS).logits
        change(whole)
        change(model)
        ids = torch.cat([IDS, torch.tensor([[model.get_input_embeddings().num_embeddings - 1]])], dim=1)
        with torch.no_grad():
            expected = whole(input_ids=ids, labels=ids)
            got = model(input_ids=ids, labels=ids)
        assert got.logits.shape == expected.logits.shape
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.loss, expected.loss)
        torch.testing.assert_close(
            model.generate(IDS, max_new_tokens=4, do_sample=False),
            whole.generate(IDS, max_new_tokens=4, do_sample=False),
        )
        assert before.shape != got.logits[:, :-1].shape or not torch.equal(before, got.logits[:, :-1])
