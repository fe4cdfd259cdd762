"""transformers' `generate` on a split model: every argument works, or is refused by name before anything is sent.

`docs/generate.md` has the table of them.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from transformers import GenerationConfig, GenerationMixin

from fedsea.client.cache import SplitCache
from fedsea.errors import UsageError
from fedsea.parts.cache import CACHE

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
_NOT_THE_MODELS = ("tokenizer", "assistant_tokenizer")


class SplitGenerationMixin(GenerationMixin):
    """`generate` of `SplitModelForCausalLM`."""

    new_cache: Callable[[], SplitCache]

    def generate(
        self, inputs: Any = None, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers' models, in all modes; what it returns is the whole model's.

        Parameters
        ----------
        inputs
            Token ids of the prompts, `[rows, tokens]`, int64; padded at the left where they differ in length.
        past_key_values, cache
            A `SplitCache` to go on from, by either name.

        Raises
        ------
        UsageError
            If an argument is not supported. Nothing has been sent then.
        LimitExceededError
            If a row would be longer than the model or the server allows.
        """
        _check(kwargs, generation_config or self.generation_config)
        given = the_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if given is not None:
            kwargs[CACHE] = given
        whole: Any = super()
        return whole.generate(inputs, generation_config, *args, **kwargs)

    def init_continuous_batching(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refused: it needs the whole model in one process.

        Raises
        ------
        UsageError
            Always.
        """
        raise UsageError("a split model has no continuous batching: give generate all prompts as one padded batch")

    continuous_batching_context_manager = generate_batch = init_continuous_batching

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' models, without what is not for `forward`."""
        for name in _NOT_THE_MODELS:
            kwargs.pop(name, None)
        whole: Any = super()
        return whole.prepare_inputs_for_generation(*args, **kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """A text goes on after its last token, where transformers goes on after padding at the right of a prompt."""
        whole: Any = super()
        before = model_kwargs.get("position_ids")
        updated: dict[str, Any] = whole._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        after = updated.get("position_ids")
        if before is not None and after is not None and after.shape[-1] > before.shape[-1]:
            new = torch.arange(1, after.shape[-1] - before.shape[-1] + 1, device=after.device)
            updated["position_ids"] = torch.cat([before, before.amax(-1, keepdim=True) + new], dim=-1)
        return updated

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *_args: Any, **_kwargs: Any
    ) -> None:
        """`generate` asks for a cache: a split one, unless the user brings one or wants none."""
        # A session sends a prompt in pieces by itself. transformers' would have pieces of padding alone.
        generation_config.prefill_chunk_size = None
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = self.new_cache()


def the_cache(past_key_values: SplitCache | None, cache: SplitCache | None) -> SplitCache | None:
    """The cache that a caller has given, by either of its names."""
    if past_key_values is not None and cache is not None:
        raise UsageError("past_key_values and cache are two names of one argument; give one of them")
    return cache if past_key_values is None else past_key_values


def _asks_nothing(name: str, value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and (not value or (name, value) == ("num_beam_groups", 1)))


def _check(arguments: dict[str, Any], config: GenerationConfig) -> None:
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
