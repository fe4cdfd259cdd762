"""Fingerprints name what differs between two machines, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from fedsea.checkpoints import Fingerprint, load_whole_model, open_checkpoint
from fedsea.checkpoints.configurations import CONFIGURATIONS
from fedsea.checkpoints.fingerprint import MAX_JSON_BYTES, config_digest
from fedsea.errors import ProtocolError
from tests.support.weights import rewrite


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    load_whole_model("random:tiny").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def changed(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Fingerprint:
    """The fingerprint of the folder after a change to one of its tensors."""
    rewrite(folder, lambda weights: weights | {name: edit(weights[name])})
    return open_checkpoint(folder).fingerprint()


def test_groups_are_layers_and_ends(folder: Path) -> None:
    groups = list(open_checkpoint(folder).fingerprint().groups)
    assert groups == ["embedding", "0", "1", "2", "3", "4", "5", "norm", "head"]
    assert "head" not in open_checkpoint("random:tiny-qwen2").fingerprint().groups  # tied


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.embed_tokens.weight", "the embedding"),
        ("model.layers.4.self_attn.q_proj.weight", "layer 4"),
        ("model.layers.0.input_layernorm.weight", "layer 0"),
        ("model.norm.weight", "the final norm"),
        ("lm_head.weight", "the head"),
    ],
)
def test_changed_weight_is_named_by_its_group(folder: Path, name: str, group: str) -> None:
    before = open_checkpoint(folder).fingerprint()
    assert before.mismatches(changed(folder, name, lambda tensor: tensor * 1.001)) == [group]


def test_finetuned_layers_are_named_in_order(folder: Path) -> None:
    before = open_checkpoint(folder).fingerprint()
    for layer in (5, 2):
        after = changed(folder, f"model.layers.{layer}.mlp.up_proj.weight", lambda tensor: tensor + 0.01)
    assert before.mismatches(after) == ["layer 2", "layer 5"]
    assert before.restrict([0, 1]).mismatches(after) == []
    assert before.mismatches(after.restrict([5])) == ["layer 5"]


def test_lossless_change_of_storage_changes_nothing(tmp_path: Path) -> None:
    model = load_whole_model("random:tiny", torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16", max_shard_size="100KB")
    model.float().save_pretrained(tmp_path / "float32")
    half, full = (open_checkpoint(tmp_path / dtype).fingerprint() for dtype in ("bfloat16", "float32"))
    assert half == full


def test_changed_configuration_is_named(folder: Path) -> None:
    before = open_checkpoint(folder).fingerprint()
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500000.0
    (folder / "config.json").write_text(json.dumps(config))
    assert before.mismatches(open_checkpoint(folder).fingerprint()) == ["the configuration"]


def test_fields_that_do_not_matter_leave_the_configuration_digest_alone() -> None:
    one, two = (AutoConfig.for_model(**CONFIGURATIONS["tiny-llama3"]) for _ in range(2))
    two.eos_token_id, two.use_cache, two.initializer_range, two.dtype = 17, False, 0.5, "bfloat16"
    two.rope_parameters = {**two.rope_parameters, "rope_theta": 10000, "attention_factor": None}
    two.rms_norm_eps = torch.tensor(two.rms_norm_eps, dtype=torch.float32).item()  # what a GGUF file holds
    assert config_digest(one) == config_digest(two)


@pytest.mark.parametrize(
    ("family", "digest"),
    [
        ("llama-2-7b", "81e8584dbefd56b98bc2f3a24bc2f12b"),
        ("llama-3-8b", "58c09aa3e02672208bae5d0888c000d4"),
        ("tiny", "89bab5ee68636c161d5d8cd1651e4897"),
        ("tiny-llama3", "c829d14d711982c8f7a400ea00fe7dab"),
        ("tiny-mistral", "64e342041b5bedf8a26767318fe43985"),
        ("tiny-qwen2", "4adf297fe4fcb9ada370617959714dee"),
        ("tiny-qwen3", "f814c49205a3670374946c6dc6bca570"),
    ],
)
def test_configuration_digest_is_the_same_under_every_version(family: str, digest: str) -> None:
    # A client and a server of different versions compare these: a change here breaks them.
    assert open_checkpoint(f"random:{family}").fingerprint().config == digest


def test_random_fingerprint_costs_no_drawing() -> None:
    seventy = open_checkpoint("random:llama-2-70b").fingerprint()
    assert len(seventy.groups) == 83
    assert seventy.mismatches(open_checkpoint("random:llama-2-7b").fingerprint())[0] == "the configuration"
    assert open_checkpoint("random:llama-2-70b").fingerprint([3, 79]) == seventy.restrict([3, 79])
    assert open_checkpoint("random:tiny").fingerprint() != open_checkpoint("random:tiny-qwen3").fingerprint()


def test_json_round_trip() -> None:
    fingerprint = open_checkpoint("random:llama-2-70b").fingerprint()
    assert Fingerprint.from_json(fingerprint.to_json()) == fingerprint
    assert Fingerprint.from_json(fingerprint.to_json().encode()) == fingerprint


DIGEST = "0" * 32


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        b"\xff\xfe\xfd",
        "[" * 100_000,
        {"config": DIGEST},
        {"config": DIGEST, "groups": []},
        {"config": DIGEST, "groups": {}, "more": 1},
        *({"config": digest, "groups": {}} for digest in (DIGEST[1:], DIGEST.replace("0", "G"), 7)),
        *({"config": DIGEST, "groups": {"0": digest}} for digest in (None, DIGEST + "\n")),
        *({"config": DIGEST, "groups": {key: DIGEST}} for key in ("-1", "00", "٣", "0\n", "tail")),
        f'{{"config": "{DIGEST}", "config": "{DIGEST}", "groups": {{}}}}',
        json.dumps({"config": DIGEST, "groups": {}}) + " " * MAX_JSON_BYTES,
    ],
)
def test_malformed_json_of_a_peer_is_a_protocol_error(text: str | bytes | dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        Fingerprint.from_json(json.dumps(text) if isinstance(text, dict) else text)


@given(st.text() | st.binary() | st.recursive(st.none() | st.text(), st.lists).map(json.dumps))
def test_any_other_text_of_a_peer_is_a_protocol_error(text: str | bytes) -> None:
    with pytest.raises(ProtocolError):
        Fingerprint.from_json(text)
