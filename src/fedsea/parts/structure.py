"""Where a model of transformers has its layers and its ends: by rule, for any decoder-only family.

A part is the family's own base model with some of its layers: its own forward pass runs them. What the base model does
before its layers (position embeddings, a norm) is the input blocks', what it does after them the output blocks'. Which
modules these are is seen on a tiny random model of the same configuration, on which split and whole are then compared:
a family is used if they agree, and refused with the reason if they do not.
"""

import contextlib
import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fedsea.checkpoints.whole import fill_computed
from fedsea.errors import ModelNotFoundError
from fedsea.parts.attention import IMPLEMENTATION, NOW, Step

SMALL = {  # of a tiny model: its sizes, by what transformers' configurations call them; no more than the model has
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "attention_chunk_size": 8,
    "index_topk": 4,
    "sliding_window": 8,
}
SHIFT = 7  # positions by which a text is moved, to see whether that changes it
MOST_WIDE = 512  # of a tiny model's states, where its heads may be of any size
_WIDTHS = re.compile(r"intermediate_size|ffn_dim|ffn_hidden_size|n_inner|mlp_hidden_size")
_DROPOUTS = re.compile(r"dropout|pdrop|layerdrop|drop_rate")
_FACTORS = re.compile(r"multiplier|scaling(_factor)?$|_scale$|^scale_")  # what is seen only where it is not 1
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")
_OF_INPUTS = ("embedding_multiplier", "embed_scale", "embedding_scale", "scale_emb")  # a decoder's factor on its input


@dataclass(frozen=True)
class Structure:
    """Paths of modules in the whole model.

    Attributes
    ----------
    decoder
        The module whose forward pass runs the layers.
    layers
        The list of layers; `model.layers.3.` begins the names of the weights of one.
    embedding, head
        Of tokens; of logits.
    before, after
        What the decoder does before its layers, beside the embedding, and after them, in order.
    windowed
        Whether some layers look back on a window only.
    absolute
        Whether a text depends on the position that it begins at.
    masked
        Whether its layers attend by themselves, and take a mask: not by transformers' attention interface.
    """

    decoder: str
    layers: str
    embedding: str
    head: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    windowed: bool = False
    absolute: bool = False
    masked: bool = False


def structure_of(config: PreTrainedConfig) -> Structure:
    """Of a model, by its configuration; a ModelNotFoundError if it has not the shape of a decoder-only model."""
    tiny = shrunk(config)
    try:
        return _structure(tiny.model_type, tiny.to_json_string(use_diff=False))
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"models of the type {config.model_type!r} cannot be split: {error}") from None


@lru_cache(maxsize=64)
def _structure(model_type: str, fields: str) -> Structure:
    model = tiny_model(CONFIG_MAPPING[model_type].from_dict(json.loads(fields)))
    found = find_ends(model)
    attend_by_rows(model)
    with contextlib.suppress(Exception):  # of layers that attend by themselves, and miss their mask
        if not (traced := trace(model, found)).masked:
            return traced
    attend_by_rows(model, "eager")
    return trace(model, found)


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A whole model with random weights that depend on nothing but their shapes, and transformers' own attention."""
    draws = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    fill_computed(model, model, "cpu")
    for parent in model.modules():
        for name, weight in parent._parameters.items():
            if weight is not None:
                value = torch.empty(weight.shape).normal_(0, weight.shape[-1] ** -0.5, generator=draws)
                parent._parameters[name] = nn.Parameter(value + (weight.dim() == 1), requires_grad=False)
        for name, buffer in parent._buffers.items():
            if buffer is not None and buffer.is_meta:
                parent._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    model.tie_weights()
    model.eval()
    return model


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The whole model's modules on the meta device, which attend by `fedsea.parts.attention`."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    attend_by_rows(model)
    return model


def attend_by_rows(model: nn.Module, implementation: str = IMPLEMENTATION) -> None:
    """Have a model's layers attend by `fedsea.parts.attention`, or in another way."""
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation = implementation


def find_ends(model: PreTrainedModel) -> Structure:
    """The paths that show without running the model; ModelNotFoundError if it is not embedding, layers, head."""
    count = model.config.num_hidden_layers
    paths = {id(module): path for path, module in model.named_modules()}
    lists = [path for path, one in model.named_modules() if isinstance(one, nn.ModuleList) and len(one) == count]
    outermost = [path for path in lists if not any(other != path and path.startswith(f"{other}.") for other in lists)]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if len(outermost) != 1 or embedding is None or head is None or model.config.is_encoder_decoder:
        raise ModelNotFoundError("it is not an embedding, one list of decoder layers and a head")
    return Structure(outermost[0].rpartition(".")[0], outermost[0], paths[id(embedding)], paths[id(head)])


def trace(model: PreTrainedModel, found: Structure) -> Structure:
    """What a whole model with weights does before and after its layers, beside the embedding, as it runs."""
    tokens = torch.arange(4).unsqueeze(0)
    order: list[str] = []
    decoder, layers = model.get_submodule(found.decoder), model.get_submodule(found.layers)
    own = found.layers.rpartition(".")[2]

    def note(name: str) -> Any:
        return lambda *_args: order.append(name)

    hooks = [layers[0].register_forward_pre_hook(note("")), layers[-1].register_forward_hook(note(""))]  # type: ignore[index]
    for name, child in decoder.named_children():
        path = f"{found.decoder}.{name}"
        # A rotary embedding serves every layer: each part has its own.
        rotary = any("inv_freq" in buffer for buffer, _ in child.named_buffers())
        if name != own and path != found.embedding and not rotary:
            hooks.append(child.register_forward_pre_hook(note(path)))
    NOW.step = step = Step((tokens.numel(),))
    try:
        with torch.no_grad():
            begun = [
                model(input_ids=tokens, position_ids=tokens + later, use_cache=False).logits for later in (SHIFT, 0)
            ]
    finally:
        NOW.step = None
        for hook in hooks:
            hook.remove()
    order = order[len(order) // 2 :]
    first, last = order.index(""), len(order) - 1 - order[::-1].index("")
    if first + 1 != last:
        raise ModelNotFoundError("its layers share modules")
    before, after = tuple(order[:first]), tuple(order[last + 1 :])
    absolute = float((begun[0] - begun[1]).abs().max()) > 0.01 * float(begun[1].abs().max())
    return replace(
        found,
        before=before,
        after=after,
        windowed=bool(step.windows),
        absolute=absolute,
        masked=not step.calls,
    )


def kept_layers(config: PreTrainedConfig, layers: range) -> PreTrainedConfig:
    """A copy of a configuration that has these of its layers only, in what it says layer by layer."""
    cut, count = copy.deepcopy(config), config.num_hidden_layers
    for name, value in vars(cut).items():
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(cut, name, type(value)(value[layer] for layer in layers))
    cut.num_hidden_layers = len(layers)
    return cut


def input_factors(decoder: nn.Module) -> Iterator[str]:
    """Names of the factors that a decoder multiplies its input by."""
    return (name for name in _OF_INPUTS if isinstance(getattr(decoder, name, None), int | float))


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration of the same kind, of a tiny model: same switches, small sizes, no dropout, no factor of 1."""
    named: Mapping[str, str] = getattr(type(config), "attribute_map", {})
    fields: dict[str, Any] = config.to_dict()
    heads, count = config.num_attention_heads, config.num_hidden_layers
    head_dim: int = fields.get("head_dim") or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads

    def put(name: str, value: Any) -> None:
        fields[named.get(name, name)] = value

    for name, most in SMALL.items():
        value = getattr(config, name, None)
        if value is None and name in fields and name not in ("sliding_window", "attention_chunk_size"):
            value = most  # a number that has no default, and that every real model has
        if isinstance(value, int) and not isinstance(value, bool):
            put(name, min(value, most))
    small = min(heads, SMALL["num_attention_heads"])
    width = small * head_dim if small * head_dim <= MOST_WIDE or not fields.get("head_dim") else 64
    if "head_dim" in fields:
        put("head_dim", head_dim)
    for name in ("hidden_size", "word_embed_proj_dim"):
        if getattr(config, name, None) is not None:
            put(name, width if getattr(config, name) == config.hidden_size else width // 2)
    if "num_key_value_heads" in {*fields, *named}:
        put("num_key_value_heads", small if groups == heads else min(groups, 2))
    for name, value in list(fields.items()):
        if _WIDTHS.search(name) and isinstance(value, int):
            fields[name] = min(value, 64)
        elif _DROPOUTS.search(name) and isinstance(value, float):
            fields[name] = 0.0
        elif _FACTORS.search(name) and value == 1.0 and not isinstance(value, bool):
            fields[name] = 1.25
        elif name in _SPECIAL and value is not None:
            fields[name] = _SPECIAL.index(name)
    kept = _spread(fields, count)
    for name, value in list(fields.items()):
        if isinstance(value, list | tuple) and len(value) == count:
            fields[name] = [value[layer] for layer in kept]
    put("num_hidden_layers", len(kept))
    return type(config).from_dict(fields)


def _spread(fields: Mapping[str, Any], count: int) -> list[int]:
    """Four layers or more: one of each kind at least, in the model's order."""
    kinds: dict[str, int] = {}
    for layer in range(count):
        told = [value[layer] for value in fields.values() if isinstance(value, list | tuple) and len(value) == count]
        kinds.setdefault(json.dumps(told, default=str), layer)
    others = [layer for layer in range(count) if layer not in kinds.values()]
    return sorted([*kinds.values(), *others[: max(0, 4 - len(kinds))]])


def turning_point(config: PreTrainedConfig) -> int | None:
    """Tokens up to which a text is computed with other rotary frequencies than a longer one (longrope); None if none.

    As in transformers, the length is that of the longest row after a forward pass, and counts for all its tokens; what
    the cache holds stays as it was computed.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope" or rope["short_factor"] == rope["long_factor"]:
        return None
    turn: int = rope["original_max_position_embeddings"]
    return turn
