"""Whether a family's models are the same split as whole: compared on a tiny random model, with a cache and without."""

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from fedsea.errors import ModelNotFoundError
from fedsea.parts.blocks import InputBlocks, MiddleBlocks, OutputBlocks, Part
from fedsea.parts.rows import Rows
from fedsea.parts.structure import Structure, shrunk, structure_of, tiny_model
from fedsea.text import one_line

LENGTHS = (13, 5, 21)  # of the texts that are compared, in tokens
TOLERANCE = 1e-4  # of the largest logit
ATTENDS = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers that keep keys and values
STEPS = 3  # tokens that come one by one


def difference(config: PreTrainedConfig) -> float:
    """How much a tiny model's logits differ, split and whole, as a share of the largest.

    Three texts of different lengths at once, with one input layer and with none: as a whole, and with a cache.
    """
    tiny = shrunk(config)
    structure, whole = structure_of(config), tiny_model(tiny)
    draws = torch.Generator().manual_seed(1)
    texts = [torch.randint(tiny.vocab_size, (count,), generator=draws) for count in LENGTHS]
    with torch.no_grad():
        right = [whole(input_ids=text.unsqueeze(0), use_cache=False).logits[0] for text in texts]
        found = [_compared(_Split(tiny, structure, whole.state_dict(), first), texts, right) for first in (1, 0)]
    return max(found)


class _Split:
    """A whole model's weights as three parts."""

    def __init__(self, config: PreTrainedConfig, structure: Structure, weights: dict[str, Tensor], first: int) -> None:
        count = config.num_hidden_layers
        parts: list[Part] = [
            InputBlocks(config, range(first), embedding=True, structure=structure),
            MiddleBlocks(config, range(first, count - 1), structure=structure),
            OutputBlocks(config, range(count - 1, count), head=True, structure=structure),
        ]
        for part in parts:
            part.fill({name: weights[name] for name in part.state_dict()}, "cpu")
        self.first, self.middle, self.last = parts
        self.caches = [part.new_cache() for part in parts]

    def logits(self, tokens: Tensor, rows: Rows, *, keep: bool) -> tuple[Tensor, ...]:
        first, middle, last = self.caches if keep else (None, None, None)
        hidden: Tensor = self.middle(self.first(tokens, rows, first), rows, middle, self.middle.layers)
        logits: Any = self.last.logits(self.last(hidden, rows, last))  # type: ignore[operator]
        return tuple(logits.split(rows.counts))


def _compared(split: _Split, texts: list[Tensor], right: list[Tensor]) -> float:
    whole = Rows((0,) * len(texts), tuple(map(len, texts)))
    at_once = split.logits(torch.cat(texts), whole, keep=False)
    begun = replace(whole, counts=tuple(count - STEPS for count in whole.counts))
    found = [split.logits(torch.cat([text[:-STEPS] for text in texts]), begun, keep=True)]
    for step in range(STEPS):
        rows = Rows(tuple(count + step for count in begun.counts), (1,) * len(texts))
        new = torch.stack([text[start] for text, start in zip(texts, rows.starts, strict=True)])
        found.append(split.logits(new, rows, keep=True))
    in_steps = [torch.cat(pieces) for pieces in zip(*found, strict=True)]
    scale = max(float(one.abs().max()) for one in right)
    pairs = zip([*at_once, *in_steps], [*right, *right], strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs) / scale


def check_family(config: PreTrainedConfig) -> None:
    """ModelNotFoundError, with the reason, if models of this kind are not the same split as whole."""
    why = _shape_of_another(config)
    if why is None:
        tiny = shrunk(config)
        why = _reason(tiny.model_type, tiny.to_json_string(use_diff=False))
    if why is not None:
        raise ModelNotFoundError(f"models of the type {config.model_type!r} cannot be split: {why}")


def _shape_of_another(config: PreTrainedConfig) -> str | None:
    """What a configuration says by itself of why its model cannot be split."""
    if config.is_encoder_decoder:
        return "it has an encoder beside its decoder"
    if any(getattr(config, name, None) is not None for name in ("text_config", "thinker_config")):
        return "it has parts for other than text; its text model may have a type of its own"
    if getattr(config, "is_decoder", True) is False and not hasattr(config, "rope_parameters"):
        return "it is an encoder"
    if not hasattr(config, "num_attention_heads") or not hasattr(config, "num_hidden_layers"):
        return "it is not made of decoder layers with attention"
    others = {str(kind) for kind in getattr(config, "layer_types", None) or ()} - ATTENDS
    return f"it has layers that keep a state of another kind ({', '.join(sorted(others))})" if others else None


@lru_cache(maxsize=64)
def _reason(model_type: str, fields: str) -> str | None:
    try:
        config = CONFIG_MAPPING[model_type].from_dict(json.loads(fields))
        tiny_model(config)
    except Exception as error:  # of any kind: the configuration may come from a stranger
        return f"the model's configuration cannot be used ({one_line(f'{type(error).__name__}: {error}')})"
    try:
        found = difference(config)
    except Exception as error:  # of any kind: a family does what it likes
        return one_line(f"{type(error).__name__}: {error}")
    return None if found <= TOLERANCE else f"split and whole differ by {found:.0%} of the largest logit"
