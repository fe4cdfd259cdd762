"""A conversion accounts for all that a GGUF file holds: used, known to change nothing, or refused by name."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedsea.checkpoints import load_whole_model, open_checkpoint
from fedsea.errors import ModelNotFoundError
from tests.support.gguf_files import gguf, write_gguf
from tests.support.weights import assert_same_weights, load_all

pytestmark = pytest.mark.usefixtures("conversions")
IDS = torch.randint(2, 64, (1, 300), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
THETA = {"rope_theta": 10000.0}
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def make(kind: str = "llama", **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = SIZES | {"rope_parameters": {"rope_type": "default"} | THETA} | more
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


def add_llama_3_frequencies(writer: Any) -> None:
    """As llama.cpp's converter works them out."""
    frequencies = 1.0 / (10000.0 ** (np.arange(0, 16, 2, dtype=np.float64) / 16))
    factors = []
    for frequency in frequencies:
        turns = 64 * frequency / (2 * math.pi)
        smooth = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))


def add_yarn(writer: Any) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(64)
    writer.add_rope_scaling_yarn_beta_fast(16.0)


def add_linear(writer: Any) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0} | THETA
MODELS: dict[str, tuple[str, dict[str, Any], Callable[[Any], None] | None]] = {
    "llama 3's": ("llama", {"rope_parameters": {"rope_type": "llama3"} | LLAMA_3 | THETA}, add_llama_3_frequencies),
    "yarn": ("qwen2", {"rope_parameters": YARN}, add_yarn),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0} | THETA}, add_linear),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, None),
    "qwen2": ("qwen2", {}, None),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, None),
    "qwen3": ("qwen3", {"head_dim": 24}, lambda writer: writer.add_key_length(24)),
    "wide heads": ("llama", {"head_dim": 24}, lambda writer: writer.add_rope_dimension_count(24)),
    "mistral": ("mistral", {"sliding_window": 40}, lambda writer: writer.add_sliding_window(40)),
    "mistral without a window": ("mistral", {"sliding_window": None}, None),
}


@pytest.mark.parametrize("what", MODELS)
def test_converted_model_computes_as_the_original(tmp_path: Path, what: str) -> None:
    kind, settings, more = MODELS[what]
    original = make(kind, **settings)
    write_gguf(original, tmp_path / "m.gguf", architecture="llama" if kind == "mistral" else kind, more=more)
    with torch.no_grad():
        expected = original(IDS).logits
        torch.testing.assert_close(load_whole_model(tmp_path / "m.gguf")(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_large_weights_are_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsea.checkpoints.convert.SHARD_BYTES", 10_000)
    original = make()
    write_gguf(original, tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert_same_weights(load_all(checkpoint), original.state_dict())
    assert len(list((tmp_path / "cache" / "gguf").glob("*/*.safetensors"))) > 2


def test_quantised_weights_are_those_that_the_file_means(tmp_path: Path) -> None:
    original = make()
    embedding = original.get_input_embeddings().weight.detach().numpy()

    def write(writer: Any) -> None:
        packed = gguf.quantize(embedding, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    write_gguf(original, tmp_path / "m.gguf", without="model.embed_tokens.weight", more=write)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    ((_, got),) = checkpoint.load(["model.embed_tokens.weight"], dtype=torch.float32)
    assert 0 < float((got - torch.from_numpy(embedding)).abs().max()) < 0.01


def test_an_answer_ends_with_the_end_of_a_turn_as_well(tmp_path: Path) -> None:
    write_gguf(make(), tmp_path / "m.gguf", tokenizer={"eot_token_id": 5, "eom_token_id": 1})
    assert open_checkpoint(tmp_path / "m.gguf").generation_config.eos_token_id == [1, 5]


def test_what_changes_nothing_is_let_pass(tmp_path: Path) -> None:
    def more(writer: Any) -> None:
        writer.add_name("Tiny")
        writer.add_license("mit")
        writer.add_string("general.base_model.0.name", "x")
        writer.add_uint32("llama.expert_count", 0)
        writer.add_rope_scaling_finetuned(True)
        writer.add_string("quantize.imatrix.file", "x")
        writer.add_uint32("tokenizer.ggml.fim_pre_token_id", 3)
        writer.add_tensor("blk.0.attn_rot_embd.weight", np.ones(8, dtype=np.float32))

    write_gguf(make(), tmp_path / "m.gguf", more=more)
    assert open_checkpoint(tmp_path / "m.gguf").config.num_hidden_layers == 2


def tensor(name: str, *shape: int) -> Callable[[Any], None]:
    return lambda writer: writer.add_tensor(name, np.ones(shape, dtype=np.float32))


REFUSED: dict[str, Callable[[Any], None]] = {
    "rope_factors_long.weight": tensor("rope_factors_long.weight", 8),
    "blk.0.ffn_gate_exps.weight": tensor("blk.0.ffn_gate_exps.weight", 2, 2),
    "blk.1.attn_q_norm.weight": tensor("blk.1.attn_q_norm.weight", 16),
    "rope_freqs.weight does not fit": tensor("rope_freqs.weight", 5),
    "blk.1.attn_q.bias": tensor("blk.1.attn_q.bias", 32),
    "llama.expert_count = 8": lambda writer: writer.add_expert_count(8),
    "llama.logit_scale = 0.5": lambda writer: writer.add_logit_scale(0.5),
    "llama.rope.scaling.type 'longrope'": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
    "llama.rope.dimension_count": lambda writer: writer.add_rope_dimension_count(8),
    "llama.some.new.key = 3": lambda writer: writer.add_uint32("llama.some.new.key", 3),
    "some.other.key": lambda writer: writer.add_string("some.other.key", "x"),
    "tokenizer.ggml.remove_extra_whitespaces": lambda writer: writer.add_remove_extra_whitespaces(True),
    "one of 3 files": lambda writer: writer.add_uint16("split.count", 3),
    "holds no model": lambda writer: writer.add_string("general.type", "adapter"),
}


@pytest.mark.parametrize("named", [*REFUSED, "architecture 'gemma' are not supported; supported: llama, qwen2"])
def test_what_would_change_results_and_is_not_understood_is_refused_by_name(tmp_path: Path, named: str) -> None:
    more = REFUSED.get(named)
    write_gguf(make(), tmp_path / "m.gguf", architecture="llama" if more else "gemma", more=more)
    with pytest.raises(ModelNotFoundError, match=re.escape(named)) as raised:
        open_checkpoint(tmp_path / "m.gguf")
    assert "\n" not in str(raised.value)
