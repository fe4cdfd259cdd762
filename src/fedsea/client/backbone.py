"""The decoder of a split model, as transformers divides a model: everything below the head.

    token ids -> A -> protection -> the middle, at the block server -> C -> states before the final norm

Without gradients that is a step of a session, which a cache goes on from. With an adapter that is trained it is a pass
in autograd's graph.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedsea.client.adapter import TrainedAdapter
from fedsea.client.cache import SplitCache
from fedsea.client.generation import the_cache
from fedsea.client.layout import Layout, read_batch
from fedsea.client.middle import RemoteMiddle
from fedsea.client.protection import Protection
from fedsea.client.train_forward import dropout_seed, leaving, split_batch
from fedsea.errors import LimitExceededError, UsageError
from fedsea.parts import InputBlocks, OutputBlocks, Rows
from fedsea.parts.cache import CACHE
from fedsea.parts.structure import Structure


class SplitBackbone(nn.Module):
    """Embedding, decoder layers and final norm under transformers' names; the middle's layers are elsewhere.

    With `gradient_checkpointing`, which transformers sets, the middle keeps no activations in training.
    """

    def __init__(
        self,
        parts: tuple[InputBlocks, OutputBlocks],
        protection: Protection,
        middle: RemoteMiddle | None,
        adapter: TrainedAdapter,
        max_tokens: int,
    ) -> None:
        super().__init__()
        first, last = parts
        found = first.structure
        self.structure, self.root = found, found.decoder.partition(".")[0]
        layers = dict(first.get_submodule(found.layers).named_children())
        layers.update(last.get_submodule(found.layers).named_children())
        self._register(found.layers, nn.ModuleDict(layers))
        for part, paths in ((first, [found.embedding, *found.before]), (last, found.after)):
            for path in paths:
                self._register(path, part.get_submodule(path))
        # Past nn.Module's registration, so that each weight has one name, the whole model's. The parts follow what is
        # registered: transformers replaces modules (`resize_token_embeddings`), and so may others.
        self._parts = parts
        self.protection, self.middle, self.adapter = protection, middle, adapter
        self.config, self.max_tokens, self.gradient_checkpointing = first.config, max_tokens, False

    def _register(self, path: str, module: nn.Module) -> None:
        """Under its path in the whole model, whose `root` this is."""
        here: nn.Module = self
        *steps, name = path.split(".")[1:]
        for step in steps:
            if step not in here._modules:
                here.add_module(step, nn.Module())
            here = here.get_submodule(step)
        here.add_module(name, module)

    @property
    def input_blocks(self) -> InputBlocks:
        """A, of the modules that are registered now."""
        return self._parts[0].follow(self, self.root)

    @property
    def output_blocks(self) -> OutputBlocks:
        """C, of the modules that are registered now."""
        return self._parts[1].follow(self, self.root)

    def logits(self, hidden: Tensor, head: nn.Module) -> Tensor:
        """States before the final norm `[..., hidden]` -> logits, by the model's head."""
        return self._parts[1].logits(hidden, head)

    def new_cache(self) -> SplitCache:
        """An empty cache, with a session of its own."""
        session = self.middle.new_session() if self.middle is not None else None
        return SplitCache(self._parts[0].new_cache(), self._parts[1].new_cache(), session)

    def forward(self, input_ids: Tensor | None = None, **arguments: Any) -> BaseModelOutputWithPast:
        """As `SplitModelForCausalLM.forward`, up to the head: `last_hidden_state` `[rows, columns, hidden]`."""
        hidden, cache = self.states(input_ids, **arguments)
        if self.adapter.run is not None:
            hidden = self.adapter.run.scaled(hidden)
        named: dict[str, Any] = {CACHE: cache}
        return BaseModelOutputWithPast(last_hidden_state=self.output_blocks.finished(hidden), **named)

    def states(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        past_key_values: SplitCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: SplitCache | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        weight: float = 1.0,
        **kwargs: Any,
    ) -> tuple[Tensor, SplitCache | None]:
        """States before the final norm, `[rows, kept columns, hidden]`, and the cache that holds the text now.

        `weight` is what the loss counts beside those of other clients, where they train one adapter.
        """
        given = the_cache(past_key_values, cache)
        ids, layout = read_batch(input_ids, attention_mask, position_ids, given, self.config, self.structure, kwargs)
        if labels is not None:
            layout.check_learnt(labels)
        if layout.packed and use_cache:
            raise UsageError("rows of several texts (position_ids that start again) go into no cache: use_cache=False")
        if given is None and self.adapter.trains:
            packed = self._train_forward(layout.take(ids), layout.rows, weight)
            return _kept(layout.place(packed, ids.shape), logits_to_keep), None
        now = given if given is not None else self.new_cache()
        # An ordinary tensor for what goes on with it: inference mode ends here.
        hidden = self._step_unique(ids, layout, now, logits_to_keep).clone()
        if use_cache is False or layout.packed:
            if given is None:
                now.close()
            return hidden, None
        return hidden, now

    def _train_forward(self, tokens: Tensor, rows: Rows, weight: float) -> Tensor:
        """Token ids `[tokens]` through A, the middle and C in one graph: `[tokens, hidden]`."""
        if max(rows.ends) > self.max_tokens:
            raise self._too_long(rows)
        blocks, output_blocks = self.input_blocks, self.output_blocks
        run = self.adapter.run
        if self.middle is None or run is None:
            return output_blocks(blocks(tokens, rows, None), rows, None)  # type: ignore[no-any-return]
        run.begin_sum()
        split = split_batch(run, rows, self.middle.micro_batches, self.config)
        drops = self.training and self.adapter.spec is not None and self.adapter.spec.dropout > 0
        there_and_back = run.forward(
            leaving(blocks, self.protection, run, tokens, rows, split),
            training=self.training,
            recompute=self.gradient_checkpointing,
            seed=dropout_seed if drops else int,
            weight=weight,
        )
        done = [output_blocks(hidden, piece, None) for piece, hidden in there_and_back]
        return torch.cat(done) if len(done) > 1 else done[0]

    def step(self, ids: Tensor, layout: Layout, cache: SplitCache) -> Tensor:
        """Token ids `[rows, columns]` through A, the middle and C, from what the cache holds."""
        rows, plain = layout.rows, layout.mask is None and not layout.packed
        tokens = ids.reshape(-1) if plain else layout.take(ids)
        if max(rows.ends) > self.max_tokens:
            raise self._too_long(rows)
        first, last = self.input_blocks, self.output_blocks
        # Inference mode spares the many small operations of a decode step some of their cost.
        with torch.inference_mode():
            if self.middle is None:
                hidden: Tensor = first(tokens, rows, cache.input_cache)
            else:
                received = self.middle.step(first, self.protection, tokens, rows, cache)
                hidden = received.to(last.head.weight)  # its device and dtype
            hidden = last(hidden, rows, cache.output_cache)
            # `generate` goes on from the last column, which may be padding: it goes on from the text then.
            hidden = hidden.view(*ids.shape, -1) if plain else layout.carry_on(layout.place(hidden, ids.shape))
        cache.append(rows.ends, ids.shape[1], layout.mask)
        cache.offsets = list(layout.offsets)
        return hidden

    def _step_unique(self, ids: Tensor, layout: Layout, cache: SplitCache, logits_to_keep: int | Tensor) -> Tensor:
        """Compute equal rows of a new batch once: beams and several samples of a prompt start as copies of one row."""
        if not cache.lengths and len(ids) > 1 and not layout.packed:
            texts = ids if layout.mask is None else torch.where(layout.mask, ids, -1)
            unique, inverse = torch.unique(texts, dim=0, return_inverse=True)
            if len(unique) < len(ids):
                copies = inverse.tolist()
                first = [copies.index(row) for row in range(len(unique))]
                hidden = _kept(self.step(ids[first], layout.choose(first), cache), logits_to_keep)
                cache.select(copies)
                cache.offsets = list(layout.offsets)
                return hidden[copies]
        return _kept(self.step(ids, layout, cache), logits_to_keep)

    def _too_long(self, rows: Rows) -> LimitExceededError:
        return LimitExceededError(
            f"the text would have {max(rows.ends)} tokens; the model and the server allow {self.max_tokens}"
        )


def _kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Those columns of `[rows, columns, hidden]` whose logits are wanted."""
    if not isinstance(logits_to_keep, int):
        return hidden[:, logits_to_keep]
    return hidden[:, -logits_to_keep:] if logits_to_keep else hidden


@cache
def known_as(kind: type, model_type: str, found: Structure) -> Any:
    """A model class under the name, and in the module, of transformers' own class for the whole model.

    By it Trainer shifts the labels for label smoothing, `pipeline` knows what a model is for, and PEFT notes in an
    adapter's configuration how to load the base model.
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    module = f"transformers.models.{model_type}.modeling_{model_type}"
    facts = {
        "__module__": module,
        "__qualname__": name,
        "__doc__": kind.__doc__,
        "base_model_prefix": found.decoder.partition(".")[0],
        "_tied_weights_keys": {f"{found.head}.weight": f"{found.embedding}.weight"},
    }
    return type(kind)(name, (kind,), facts)
