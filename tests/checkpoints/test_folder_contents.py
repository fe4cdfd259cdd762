"""What a folder of weights promises (names, shapes, a tied head) is kept, or refused in one line."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM

from fedsea import Partition, SplitModelForCausalLM
from fedsea.checkpoints import load_tokenizer, load_whole_model, open_checkpoint
from fedsea.checkpoints.configurations import CONFIGURATIONS
from fedsea.errors import ModelNotFoundError
from fedsea.parts import MiddleBlocks
from tests.support.weights import Weights, rewrite

IDS = torch.arange(1, 12)[None]


def save(folder: Path, kind: str = "tiny", **settings: Any) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(CONFIGURATIONS[kind] | settings))).eval()
    model.save_pretrained(folder)
    return model


def split_logits(folder: Path) -> torch.Tensor:
    """All of the model in input and output blocks: what a client computes of it, without a server."""
    with SplitModelForCausalLM.from_pretrained(folder, server="127.0.0.1:1", partition=Partition(3, 3)) as model:
        logits: torch.Tensor = model(IDS).logits
        return logits


def without_prefix(weights: Weights) -> Weights:
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


def head_instead_of_embedding(weights: Weights) -> Weights:
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    return weights


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("tiny", dict),
        ("tiny", without_prefix),
        ("tiny-qwen2", without_prefix),
        ("tiny-qwen2", head_instead_of_embedding),
        ("tiny", lambda weights: weights | {"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)}),
    ],
)
def test_what_transformers_loads_is_computed_as_in_transformers(
    tmp_path: Path, kind: str, change: Callable[[Weights], Weights]
) -> None:
    original = save(tmp_path, kind)
    rewrite(tmp_path, change)
    with torch.no_grad():
        expected = original(IDS).logits
        assert torch.equal(load_whole_model(tmp_path)(IDS).logits, expected)
    torch.testing.assert_close(split_logits(tmp_path), expected, atol=1e-5, rtol=1e-5)
    fingerprint = open_checkpoint(tmp_path).fingerprint()
    assert fingerprint.groups.keys() >= {"embedding", "0", "5", "norm"}


def wrong_files(weight_map: dict[str, str]) -> dict[str, str]:
    first, last = min(weight_map.values()), max(weight_map.values())
    return {name: first if file == last else last if file == first else file for name, file in weight_map.items()}


def some_names(weight_map: dict[str, str]) -> dict[str, str]:
    return {name: file for index, (name, file) in enumerate(sorted(weight_map.items())) if index % 3 == 0}


@pytest.mark.parametrize("change", [wrong_files, some_names])
def test_an_index_that_is_wrong_loads_as_in_transformers(
    tmp_path: Path, change: Callable[[dict[str, str]], dict[str, str]]
) -> None:
    original = save(tmp_path)
    original.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    changed = change(body["weight_map"])
    assert set(changed.values()) == set(body["weight_map"].values())
    index.write_text(json.dumps(body | {"weight_map": changed}))
    with torch.no_grad():
        torch.testing.assert_close(split_logits(tmp_path / "shards"), original(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("differs", [True, False])
def test_a_tied_head_that_is_stored_as_well_counts_if_any_of_it_differs(tmp_path: Path, differs: bool) -> None:
    save(tmp_path, tie_word_embeddings=True)

    def change(weights: Weights) -> Weights:
        head = weights["model.embed_tokens.weight"].clone()
        head[101, 3] += 5 * differs  # one number of one row
        return weights | {"lm_head.weight": head}

    rewrite(tmp_path, change)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits
        assert torch.equal(load_whole_model(tmp_path)(IDS).logits, expected)
    torch.testing.assert_close(split_logits(tmp_path), expected, atol=1e-5, rtol=1e-5)
    assert open_checkpoint(tmp_path).config.tie_word_embeddings is not differs


@pytest.mark.parametrize("settings", [{"hidden_act": "no-such"}, {"pad_token_id": 256}], ids=str)
def test_a_configuration_of_which_no_model_can_be_made_is_one_line(tmp_path: Path, settings: dict[str, Any]) -> None:
    save(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ModelNotFoundError, match="configuration cannot be used") as raised:
        split_logits(tmp_path)
    assert "\n" not in str(raised.value)


UP = "model.layers.2.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {other: weight for other, weight in weights.items() if other != name}


BROKEN: list[tuple[Callable[[Weights], Weights], str]] = [
    (without(UP), r"lacks model\.layers\.2\.mlp\.up_proj\.weight"),
    (without("lm_head.weight"), r"has no weight lm_head\.weight.*tie_word_embeddings"),
    (
        lambda weights: weights | {UP: torch.zeros(8, 64)},
        r"model\.layers\.2\.mlp\.up_proj\.weight has shape \[8, 64\]; .* needs \[160, 64\]",
    ),
    (
        lambda weights: weights | {EMBEDDING: weights[EMBEDDING][:100].clone()},
        r"model\.embed_tokens\.weight has shape \[100, 64\]; .* needs \[256, 64\]",
    ),
    (lambda weights: {f"module.{name}": weight for name, weight in weights.items()}, r"lacks (lm_head|model\.)"),
]


@pytest.mark.parametrize(("change", "says"), BROKEN)
def test_weights_that_do_not_fill_the_model_are_one_line(
    tmp_path: Path, change: Callable[[Weights], Weights], says: str
) -> None:
    save(tmp_path)
    rewrite(tmp_path, change)
    for load in (split_logits, load_whole_model):
        with pytest.raises(ModelNotFoundError, match=says) as raised:
            load(tmp_path)
        assert "\n" not in str(raised.value)
    if "up_proj" in says:  # at the server as well
        with pytest.raises(ModelNotFoundError, match=says):
            MiddleBlocks.from_checkpoint(open_checkpoint(tmp_path), range(1, 5), dtype=torch.float32)


def test_quantised_weights_without_a_word_are_one_line(tmp_path: Path) -> None:
    save(tmp_path)
    rewrite(tmp_path, lambda weights: weights | {UP: weights[UP].to(torch.int8)})
    with pytest.raises(ModelNotFoundError, match=r"layers\.2\.mlp\.up_proj\.weight is stored as int8"):
        split_logits(tmp_path)


NESTED, OF_WRONG_TYPES = "[" * 100_000, '{"hidden_size": "x", "eos_token_id": {}, "model": 3}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *itertools.product(("config.json", "tokenizer.json"), (NESTED, OF_WRONG_TYPES, "[1]", "\x00")),
        *itertools.product(("generation_config.json", "tokenizer_config.json"), (NESTED, "\x00")),
    ],
)
def test_a_damaged_file_beside_the_weights_is_one_line(tmp_path: Path, name: str, content: str) -> None:
    save(tmp_path)
    Tokenizer(BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    load_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelNotFoundError, match=f"{re.escape(str(tmp_path))}.* cannot be ") as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)
