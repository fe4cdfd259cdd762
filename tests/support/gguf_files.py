"""Small GGUF files, written as llama.cpp's converter writes them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

gguf = pytest.importorskip("gguf")

PAIR, WORD = chr(0x100) + chr(0x101), chr(0x102) + chr(0x103)  # of two letters: one has a merge, the other has none


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    without: str = "",
    architecture: str = "llama",
    tokenizer: Mapping[str, Any] | None = None,
    more: Callable[[Any], None] | None = None,
) -> None:
    """Write a model under GGUF's names; a Llama's rotary halves of q and k interleaved.

    `without`: the name of a weight to leave out. `tokenizer`: further keys `tokenizer.ggml.KEY`, or others instead.
    `more`: called with the writer before it writes, to add keys and tensors.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    letters = [chr(0x100 + index) for index in range(config.vocab_size - 4)]
    keys = {
        "model": "gpt2",
        "tokens": ["<start>", "<end>", *letters, PAIR, WORD],
        "token_type": [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (config.vocab_size - 2),
        "merges": [f"{letters[0]} {letters[1]}"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    for key, value in (keys | dict(tokenizer or {})).items():
        add = {int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string, list: writer.add_array}
        if value is not None:
            add[type(value)](f"tokenizer.ggml.{key}", value)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    interleaved = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == without or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        for projection, count in interleaved.items() if architecture == "llama" else ():
            if projection in name:
                tensor = tensor.view(count, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        module, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(module)}.{kind}", tensor.contiguous().numpy())
    if more is not None:
        more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
