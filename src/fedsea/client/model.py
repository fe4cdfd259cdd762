"""The client's model: transformers on the outside, input and output blocks on the inside, the middle elsewhere."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedsea.client.cache import SplitCache
from fedsea.client.generation import NOT_THE_MODELS, check_arguments, go_on_after_last_token, the_cache
from fedsea.client.layout import read_layout
from fedsea.client.pretrained import SplitPreTrainedModel
from fedsea.errors import UsageError
from fedsea.parts.cache import CACHE
from fedsea.parts.structure import turning_point

# How transformers would lay out files; an adapter is one small file.
_LAYOUT = {"max_shard_size", "safe_serialization", "variant", "save_peft_format", "save_original_format", "token"}


class SplitModelForCausalLM(SplitPreTrainedModel, GenerationMixin):
    """A causal language model whose middle blocks are run by a block server.

    A transformers `PreTrainedModel`: `generate` in all its modes, streamers, stopping criteria, assisted decoding;
    `Trainer` and PEFT's methods, on all parts. Text, token ids, logits and sampling stay here; protected hidden states
    go out, hidden states come back. Built by `from_pretrained`. A context manager: leaving it closes its sessions.
    """

    # What crosses the network is no graph, so torch.compile leaves the model as it is.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SplitCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        cache: SplitCache | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' causal language models, of new tokens `input_ids` `[rows, tokens]`, int64.

        A batch may be padded at either side, given its `attention_mask`; logits at padding mean nothing. Rows may be
        packed, several texts one after the other: without an `attention_mask` and a cache, a text begins wherever
        `position_ids` do not count on, and sees nothing of the others.

        Parameters
        ----------
        attention_mask
            1 for tokens and 0 for padding, `[rows, cached + tokens]`; as before where the cache holds the text.
        past_key_values, cache
            A `SplitCache` to go on from; None for a new one. transformers uses the one name or the other, by release.
        use_cache
            False to keep nothing. No cache is kept of packed rows, or while an adapter is trained (gradients enabled).
        num_items_in_batch
            Labels of the whole batch over which the loss is averaged, where this call is a part of it.
        position_ids
            `[rows, tokens]` or `[1, tokens]`, counting on from one token of a text to the next; columns are counted,
            padding as well, if it is not given.
        kwargs
            `seq_idx`, `cu_seq_lens_q` and the like, with which collators describe packed rows, are compared with
            `position_ids`. Everything else is refused.

        Raises
        ------
        UsageError
            If there are no tokens, or an argument is not supported, or mask and positions are more than lengths can
            say: padding between a row's tokens. Nothing has been sent then.
        LimitExceededError
            If a row would be longer than the model or the server allows.
        """
        if labels is not None and self.training and torch.is_grad_enabled() and not self.adapter.trains:
            raise UsageError("there is nothing to train; add an adapter first: model.add_adapter(LoraConfig(...))")
        weight = 1.0
        if labels is not None:
            learnt = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
            weight = float(max(1, int(learnt)))
        hidden, cache = self.backbone.states(
            input_ids,
            attention_mask,
            past_key_values,
            use_cache,
            logits_to_keep,
            cache=cache,
            position_ids=position_ids,
            labels=labels,
            weight=weight,
            **kwargs,
        )
        logits = self._logits(hidden)
        run = self.adapter.run if hidden.requires_grad else None
        if hidden.requires_grad and self.dtype is torch.float16:
            logits = run.scaled(logits.float()) if run is not None else logits.float()
        loss = None
        if labels is not None:
            of_items = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_items)
            if run is not None:
                loss = run.checked(loss, hidden, logits)
        named: dict[str, Any] = {CACHE: cache}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **named)
        named_tuple = self.config.return_dict if return_dict is None else return_dict
        return output if named_tuple else output.to_tuple()

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.backbone.logits(hidden, self.get_output_embeddings())

    def next_logits(self, new: Tensor, cache: SplitCache) -> Tensor:
        """What `forward` gives for the last of some new tokens `[1, tokens]` of one text, without what surrounds it.

        Returns float32 `[1, vocabulary]`. The cache holds the text before them.
        """
        with torch.no_grad():
            layout = read_layout(new, None, None, {}, cache, self.config, self.backbone.structure)
            return self._logits(self.backbone.step(new, layout, cache)[:, -1:])[:, -1].float()

    def answer_loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, items: int) -> Tensor:
        """The loss of `forward`, computed from the logits of the learnt tokens only, summed and divided by `items`.

        Where the prompt is not learnt, that spares most of the head's work and memory. All are `[rows, columns]`.
        """
        learnt = labels[:, 1:] != -100
        hidden = self.backbone.states(input_ids, attention_mask, weight=float(max(1, items)))[0][:, :-1][learnt]
        run, logits = self.adapter.run, self._logits(hidden).float()
        logits = run.scaled(logits) if run is not None else logits
        loss = nn.functional.cross_entropy(logits, labels[:, 1:][learnt], reduction="sum") / items
        return run.checked(loss, hidden, logits) if run is not None and loss.requires_grad else loss

    def guess_limit(self, length: int) -> int:
        """Tokens that a text of `length` may have with guesses: a step has no more than what changes none of it."""
        turn = turning_point(self.config)
        return self.max_tokens if turn is None or length > turn else min(self.max_tokens, turn)

    def generate(
        self, inputs: Any = None, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers' models, in all modes; what it returns is the whole model's.

        `past_key_values` or `cache` is a `SplitCache` to go on from. Raises what `forward` does.
        """
        check_arguments(kwargs, generation_config or self.generation_config)
        given = the_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if given is not None:
            kwargs[CACHE] = given
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refused: it needs the whole model in one process."""
        raise UsageError("a split model has no continuous batching: give generate all prompts as one padded batch")

    continuous_batching_context_manager = generate_batch = init_continuous_batching

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' models, without what is not for `forward`."""
        given = {name: value for name, value in kwargs.items() if name not in NOT_THE_MODELS}
        return super().prepare_inputs_for_generation(*args, **given)  # type: ignore[misc]

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        before = model_kwargs.get("position_ids")
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if "position_ids" in updated:
            updated["position_ids"] = go_on_after_last_token(before, updated["position_ids"])
        return updated

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *_args: Any, **_kwargs: Any
    ) -> None:
        """`generate` asks for a cache: a split one, unless the user brings one or wants none."""
        # A session sends a prompt in pieces by itself. transformers' would have pieces of padding alone.
        generation_config.prefill_chunk_size = None
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = self.new_cache()
