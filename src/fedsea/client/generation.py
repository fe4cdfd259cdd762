"""transformers' `generate` on a split model: every argument works, or is refused by name before anything is sent.

`docs/generate.md` has the table of them.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from fedsea.client.cache import SplitCache
from fedsea.errors import UsageError

_OF_THE_HUB = "transformers has moved it to code at the hub, which is written for whole models"
# Arguments of `generate`, and fields of its configuration, that a split model cannot honour: why.
REFUSED = {
    "inputs_embeds": "a text begins with its token ids: give input_ids",
    "output_attentions": "the middle's attention weights are elsewhere",
    "output_hidden_states": "the middle's hidden states are elsewhere",
    "assistant_early_exit": "the model's first layers are no model at the client: use assistant_model, or "
    "prompt_lookup_num_tokens",
    "use_mtp": "heads for several tokens are not loaded: use assistant_model, or prompt_lookup_num_tokens",
    "speculation_type": "it needs the middle's hidden states: use assistant_model, or prompt_lookup_num_tokens",
    "cache_config": "the middle's cache is at the block server: leave it out",
    "constraints": _OF_THE_HUB,
    "force_words_ids": _OF_THE_HUB,
    "num_beam_groups": _OF_THE_HUB,
    "diversity_penalty": _OF_THE_HUB,
    "penalty_alpha": _OF_THE_HUB,
    "dola_layers": _OF_THE_HUB,
}
_CACHES = ("dynamic", "static", "dynamic_full", "hybrid", "sliding_window")  # they decide the speed alone
# `generate` passes these on to the model with whatever else it does not know.
NOT_THE_MODELS = ("tokenizer", "assistant_tokenizer")


def the_cache(past_key_values: SplitCache | None, cache: SplitCache | None) -> SplitCache | None:
    """The cache that a caller has given, by either of its names."""
    if past_key_values is not None and cache is not None:
        raise UsageError("past_key_values and cache are two names of one argument; give one of them")
    return cache if past_key_values is None else past_key_values


def _asks_nothing(name: str, value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and (not value or (name, value) == ("num_beam_groups", 1)))


def check_arguments(arguments: dict[str, Any], config: GenerationConfig) -> None:
    """Refuse arguments of `generate` that a split model cannot honour: which, and why."""
    for name, why in REFUSED.items():
        value = arguments.get(name, getattr(config, name, None))
        if not _asks_nothing(name, value):
            raise UsageError(f"a split model's generate does not take {name}: {why}")
    wanted = arguments.get("cache_implementation", config.cache_implementation)
    if wanted is not None and wanted not in _CACHES:
        raise UsageError(
            f"a split model's generate does not take cache_implementation={wanted!r}: the middle's cache is at the "
            "block server; leave it out"
        )
    if isinstance(arguments.get("custom_generate"), str):
        raise UsageError("a split model's generate does not take custom_generate as a name at the hub: give a function")


def go_on_after_last_token(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    """transformers' next positions `[rows, columns]`: a text goes on after its last token, not after its padding."""
    if before is None or after is None or after.shape[-1] <= before.shape[-1]:
        return after
    new = torch.arange(1, after.shape[-1] - before.shape[-1] + 1, device=after.device)
    return torch.cat([before, before.amax(-1, keepdim=True) + new], dim=-1)
