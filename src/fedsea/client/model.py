"""The client's model: transformers on the outside, input and output blocks on the inside, the middle elsewhere."""

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedsea.checkpoints import Checkpoint, open_checkpoint
from fedsea.client.backbone import SplitBackbone
from fedsea.client.cache import SplitCache
from fedsea.client.connection import Endpoint, client_credentials
from fedsea.client.dtypes import compute_dtype, wire_dtype_for
from fedsea.client.generation import SplitGenerationMixin, the_cache
from fedsea.client.layout import PACKING, Layout, read_layout
from fedsea.client.narrow import check_rank, narrow_at_start
from fedsea.client.native import NativeMixin, known_as
from fedsea.client.session import Session, SessionSettings
from fedsea.client.traffic import Traffic
from fedsea.errors import LimitExceededError, UsageError
from fedsea.partition import Partition
from fedsea.parts import InputBlocks, OutputBlocks, Rows
from fedsea.parts.cache import CACHE
from fedsea.parts.families import turning_point
from fedsea.privacy import GaussianNoise, Magnitude, Noise, leak_warning, measure_magnitude
from fedsea.text import one_line
from fedsea.wire.credentials import Credentials
from fedsea.wire.tensors import to_wire


def tell(message: str) -> None:
    """Default notice: one line on standard error."""
    print(f"fedsea: {one_line(message)}", file=sys.stderr, flush=True)


class SplitModelForCausalLM(NativeMixin, PreTrainedModel, SplitGenerationMixin):  # type: ignore[misc]
    """A causal language model whose middle blocks are run by a block server.

    A transformers `PreTrainedModel`: `generate` in all its modes, streamers, stopping criteria, assisted decoding.
    Text, token ids, logits and sampling stay here; noised hidden states go out, hidden states come back. Built by
    `from_pretrained`. A context manager: leaving it closes its sessions.

    Attributes
    ----------
    traffic
        Application bytes up and down, round trips.
    partition
        Where the cuts are.
    noise
        The mechanism that is applied to every hidden state that leaves.
    tap
        Told after each step of a session which places it had, and what left for them and came back, as it crossed the
        wire, `[tokens, hidden]`; None for nobody.
    look_ledger
        Counts how often each text leaves under fresh noise, and refuses what is beyond its number; None for no count.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules: list[str] = []  # noqa: RUF012 - transformers' own attribute
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' own attribute
    supports_gradient_checkpointing = True

    def __new__(cls, input_blocks: InputBlocks, *_args: Any, **_kwargs: Any) -> Self:
        """A model of a class that goes by the name of the whole model's: libraries tell by it what a model is."""
        return super().__new__(known_as(cls, input_blocks.config.model_type))  # type: ignore[arg-type, no-any-return]

    def __init__(
        self,
        input_blocks: InputBlocks,
        output_blocks: OutputBlocks,
        partition: Partition,
        noise: Noise,
        measure: Callable[[], Magnitude],
        endpoint: Endpoint | None,
        settings: SessionSettings,
    ) -> None:
        super().__init__(input_blocks.config)
        owner = weakref.ref(self)
        self.model = SplitBackbone(lambda *args, **kwargs: _alive(owner())._backbone_states(*args, **kwargs))
        self.model.embed_tokens = input_blocks.model.embed_tokens
        self.model.layers = nn.ModuleDict({**input_blocks.model.layers, **output_blocks.model.layers})
        self.model.norm = output_blocks.model.norm
        self.lm_head = output_blocks.lm_head
        self.narrow_cut = input_blocks.narrow_cut
        # Past nn.Module's registration, so that each weight has one name, the whole model's. The parts follow what is
        # registered: transformers replaces modules (`resize_token_embeddings`), and so may others.
        self._parts = (input_blocks, output_blocks)
        self.vocab_size: int = self.config.vocab_size  # resize_token_embeddings sets it
        self.partition, self.traffic = partition, Traffic()
        self._protect(noise, measure)
        self.max_tokens: int = self.config.max_position_embeddings
        self.tap: Callable[[Rows, Tensor, Tensor], None] | None = None
        self._endpoint, self._settings = endpoint, settings
        self._caches: weakref.WeakSet[SplitCache] = weakref.WeakSet()
        self._prepare_training()
        self.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path | Checkpoint,
        *,
        server: str,
        credentials: str | Path | Credentials | None = None,
        insecure: bool = False,
        partition: Partition = Partition(),
        noise: Noise = GaussianNoise(0.0),
        dtype: str | torch.dtype = "float32",
        wire_dtype: str | None = None,
        device: str | torch.device = "cpu",
        reconnect_seconds: float = 60.0,
        notice: Callable[[str], None] = tell,
    ) -> Self:
        """Load the client's parts and meet the block server.

        Parameters
        ----------
        name
            What `open_checkpoint` takes: a hub id, a folder, a `.gguf` file, `smollm2-135m`, `random:<config>`.
        server
            The block server's `HOST:PORT`.
        credentials
            The client's folder of `fedsea credentials init`.
        insecure
            Connect without TLS. Only to a loopback address.
        partition
            Input and output layers to keep here.
        noise
            How to protect the hidden states that leave. One with a narrow cut is of use with an adapter only: the cut's
            weights are trained with it.
        dtype
            Compute dtype: float32, bfloat16 or float16.
        wire_dtype
            Dtype of hidden states on the wire. By default 16 bits: bfloat16 if computed in it, else float16.
        device
            Where to compute.
        reconnect_seconds
            How long to try to reach the server again after a connection is lost.
        notice
            Called with one line when a connection is lost and when it is back, and when the certificate ends soon.

        Raises
        ------
        FedSEAError
            Whatever is wrong with the model, the partition, the credentials or the server, in one line.
        """
        checkpoint = name if isinstance(name, Checkpoint) else open_checkpoint(name)
        computed = compute_dtype(dtype)
        sent = wire_dtype_for(wire_dtype, computed)
        middle = partition.middle(checkpoint.config.num_hidden_layers)
        check_rank(noise, checkpoint.config.hidden_size, middle)
        known = client_credentials(server, credentials, insecure) if middle else None
        if known is not None and (warning := known.ends_soon()) is not None:
            notice(warning)
        endpoint = Endpoint(server, known) if middle else None
        settings = SessionSettings(
            partition=partition,
            fingerprint=checkpoint.fingerprint(),
            wire_dtype=sent,
            hidden_size=checkpoint.config.hidden_size,
            reconnect_seconds=reconnect_seconds,
            notice=notice,
            turn=turning_point(checkpoint.config),
        )
        max_tokens = checkpoint.config.max_position_embeddings
        if endpoint is not None:
            # Before any weight is loaded: a wrong address, certificate, model or partition shows at once.
            first = Session(endpoint, settings, Traffic())
            max_tokens = min(max_tokens, first.open().max_tokens)
            first.close()
        input_blocks = InputBlocks.from_checkpoint(checkpoint, partition, dtype=computed, device=device)
        output_blocks = OutputBlocks.from_checkpoint(
            checkpoint, partition, dtype=computed, device=device, embedding=input_blocks.model.embed_tokens.weight
        )
        if noise.width is not None:
            narrow_at_start(input_blocks, checkpoint, noise.width)

        def measure() -> Magnitude:
            return measure_magnitude(input_blocks, checkpoint)

        model = cls(input_blocks, output_blocks, partition, noise, measure, endpoint, settings)
        model.generation_config = checkpoint.generation_config
        model.max_tokens = max_tokens
        if endpoint is not None and not insecure:  # without TLS nothing leaves this machine
            model._audited_as = checkpoint.name
            model._tell_of_leak(leak_warning(model.noise, partition, settings.hidden_size, measure))
        return model

    def new_cache(self) -> SplitCache:
        """An empty cache, with a session of its own; pass it to `generate` or `forward` as `past_key_values`."""
        session = Session(self._endpoint, self._session_settings, self.traffic) if self._endpoint is not None else None
        cache = SplitCache(self.input_blocks.new_cache(), self.output_blocks.new_cache(), session)
        self._caches.add(cache)
        return cache

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
        """As transformers' causal language models; a batch may be padded at either side, given its `attention_mask`.

        Rows may be packed, several texts one after the other: without an `attention_mask` and a cache, a text begins
        wherever `position_ids` do not count on, and sees nothing of the others.

        Parameters
        ----------
        input_ids
            New tokens, `[rows, tokens]`, int64.
        attention_mask
            1 for tokens and 0 for padding, `[rows, cached + tokens]`; as before where the cache holds the text.
        past_key_values, cache
            A `SplitCache` to go on from; None for a new one. transformers uses the one name or the other, by release.
        labels
            As in transformers, -100 is left out; gives `loss`.
        use_cache
            False to keep nothing after the call. Nothing is kept where a loss may be taken back: with an adapter that
            is trained, and gradients enabled.
        num_items_in_batch
            Labels of the whole batch over which the loss is averaged, where this call is a part of it.
        logits_to_keep
            Compute logits of the last so many columns only (or of the given columns); 0 for all.
        position_ids
            `[rows, tokens]` or `[1, tokens]`, counting on from one token of a text to the next; columns are counted,
            padding as well, if it is not given.
        kwargs
            `seq_idx`, `cu_seq_lens_q` and the like, with which collators describe packed rows, are compared with
            `position_ids`. Everything else is refused.

        Returns
        -------
        CausalLMOutputWithPast
            `logits` `[rows, columns, vocabulary]`; those at padding mean nothing. Of packed rows no cache is kept.

        Raises
        ------
        UsageError
            If there are no tokens, or an argument is not supported, or mask and positions are more than lengths can
            say: padding between a row's tokens. Nothing has been sent then.
        LimitExceededError
            If a row would be longer than the model or the server allows.
        """
        if labels is not None and self.training and torch.is_grad_enabled() and not self._trains():
            raise UsageError("there is nothing to train; add an adapter first: model.add_adapter(LoraConfig(...))")
        if labels is not None:
            learnt = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
            self._weight = float(max(1, int(learnt)))
        given = the_cache(past_key_values, cache)
        hidden, cache = self._states(
            input_ids,
            attention_mask,
            given,
            use_cache,
            logits_to_keep,
            position_ids=position_ids,
            labels=labels,
            **kwargs,
        )
        logits = self.output_blocks.logits(hidden)
        if hidden.requires_grad and self.dtype is torch.float16:
            logits = self._scaled(logits.float())
        loss = None
        if labels is not None:
            of_items = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_items)
            if hidden.requires_grad:
                loss = self._finish_loss(loss, hidden, logits)
        named: dict[str, Any] = {CACHE: cache}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **named)
        named_tuple = self.config.return_dict if return_dict is None else return_dict
        return output if named_tuple else output.to_tuple()

    def _states(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        past_key_values: SplitCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: SplitCache | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, SplitCache | None]:
        """States before the final norm, `[rows, kept columns, hidden]`, and the cache that holds the text now."""
        packing = {name: kwargs.pop(name) for name in PACKING if kwargs.get(name) is not None}
        asked = {key: value for key, value in kwargs.items() if value is not None}
        unsupported = [key for key, value in asked.items() if value is not False]
        if self.config.output_hidden_states and "output_hidden_states" not in asked:
            unsupported.append("output_hidden_states")  # the configuration asks for them in every call
        if unsupported:
            raise UsageError(f"a split model does not take {', '.join(sorted(unsupported))}")
        if input_ids is None or input_ids.numel() == 0:
            raise UsageError("the prompt is empty; the model needs at least one token")
        if input_ids.dim() != 2:
            raise UsageError(f"input_ids must be [rows, tokens]; got the shape {list(input_ids.shape)}")
        given = the_cache(past_key_values, cache)
        if given is not None and not isinstance(given, SplitCache):
            raise UsageError("the cache of a split model comes from its own new_cache()")
        layout = read_layout(input_ids, attention_mask, position_ids, packing, given, self.config)
        if labels is not None:
            layout.check_learnt(labels)
        if layout.packed and use_cache:
            raise UsageError("rows of several texts (position_ids that start again) go into no cache: use_cache=False")
        if given is None and self._trains():
            return _kept(self._pass_with_graph(input_ids, layout), logits_to_keep), None
        cache = given if given is not None else self.new_cache()
        # An ordinary tensor for whoever goes on with it: inference mode ends here.
        hidden = self._forward_unique(input_ids, layout, cache, logits_to_keep).clone()
        if use_cache is False or layout.packed:
            if given is None:
                cache.close()
            return hidden, None
        return hidden, cache

    def next_logits(self, new: Tensor, cache: SplitCache) -> Tensor:
        """What `forward` gives for the last of some new tokens of one text, without what surrounds it.

        Parameters
        ----------
        new
            Tokens to go on with, `[1, tokens]`, int64.
        cache
            Holds the text before them.

        Returns
        -------
        Tensor
            Logits of the next token, float32, `[1, vocabulary]`.
        """
        with torch.no_grad():
            layout = read_layout(new, None, None, {}, cache, self.config)
            logits = self.output_blocks.logits(self._forward(new, layout, cache, 1))
        return logits[:, -1].float()

    def _forward_unique(self, ids: Tensor, layout: Layout, cache: SplitCache, logits_to_keep: int | Tensor) -> Tensor:
        """Compute equal rows of a new batch once: beams and several samples of a prompt start as copies of one row."""
        if not cache.lengths and len(ids) > 1 and not layout.packed:
            texts = ids if layout.mask is None else torch.where(layout.mask, ids, -1)
            unique, twin = torch.unique(texts, dim=0, return_inverse=True)
            if len(unique) < len(ids):
                twins = twin.tolist()
                first = [twins.index(row) for row in range(len(unique))]
                hidden = self._forward(ids[first], layout.choose(first), cache, logits_to_keep)
                cache.select(twins)
                cache.offsets = list(layout.offsets)
                return hidden[twins]
        return self._forward(ids, layout, cache, logits_to_keep)

    def _forward(self, ids: Tensor, layout: Layout, cache: SplitCache, logits_to_keep: int | Tensor) -> Tensor:
        rows = layout.rows
        self._check_lengths(rows)
        # Inference mode spares the many small operations of a decode step some of their cost.
        with torch.inference_mode():
            hidden = self._exchange(layout.take(ids), rows, cache)
            hidden = self.output_blocks(hidden, rows, cache.output_cache)
            if layout.mask is not None or layout.packed:
                # `generate` goes on from the last column, which may be padding: it goes on from the text then.
                hidden = layout.carry_on(layout.place(rows.pack(hidden), ids.shape))
        cache.append(rows.ends, ids.shape[1], layout.mask)
        cache.offsets = list(layout.offsets)
        return _kept(hidden, logits_to_keep)

    def _exchange(self, tokens: Tensor, rows: Rows, cache: SplitCache) -> Tensor:
        """Through A and the middle: tokens `[rows, width]` -> `h_B` `[rows, width, hidden]`."""
        if cache.session is None:
            hidden: Tensor = self.input_blocks(tokens, rows, cache.input_cache)
            return hidden
        self._check_width(cache.session)
        if not cache.digests:
            cache.digests = [[] for _ in range(len(rows))]
        # A step that goes on where the last one ended repeats nothing.
        base, cache.repeats = cache.repeats, False

        def leaving(chunk: Rows) -> Tensor:
            return self._leaving(tokens, rows, chunk, cache, base=base)

        if self._run is not None:
            self._run.channel.settle()  # an optimizer step may be on its way
        row_map, cache.row_map = cache.row_map, None
        packed = cache.session.forward(leaving, rows, row_map)
        if self.tap is not None:
            self.tap(rows, cache.session.sent(rows), packed)
        return rows.unpack(packed.to(device=self.device, dtype=self.dtype))

    def _check_width(self, session: Session) -> None:
        if self.noise.width is not None and self._run is None:
            raise UsageError(
                "a narrow cut needs its other half at the block server: fine-tune with it first, or load the adapter "
                "that was trained with it (--adapter DIR, model.load_adapter)"
            )
        if session.width != self._settings.width:
            raise UsageError("the cache was begun before the model had its narrow cut; begin a new one")
        if session.run != self._session_settings.run:
            raise UsageError("the cache was begun with another adapter, or with it switched off; begin a new one")

    def _leaving(self, tokens: Tensor, rows: Rows, chunk: Rows, cache: SplitCache, *, base: bool) -> Tensor:
        """`h_A` of some of the step's places, protected, in the wire dtype: what leaves the client."""
        first = max(start - begin for start, begin in zip(chunk.starts, rows.starts, strict=True))
        ids, step = tokens[:, first : first + chunk.width], (tokens, rows)
        hidden = self._protected(ids, chunk, cache.input_cache, self.noise, cache.digests, base=base, step=step)
        return to_wire(hidden, self._settings.wire_dtype)

    def guess_limit(self, length: int) -> int:
        """Tokens that a text of `length` may have with guesses: a step has no more than what changes none of it."""
        turn = self._settings.turn
        return self.max_tokens if turn is None or length > turn else min(self.max_tokens, turn)

    def _check_lengths(self, rows: Rows) -> None:
        longest = max(rows.ends)
        if longest > self.max_tokens:
            raise LimitExceededError(
                f"the text would have {longest} tokens; the model and the server allow {self.max_tokens}"
            )

    def extra_repr(self) -> str:
        """What `print(model)` says beside the client's modules."""
        at = f" at {self._endpoint.address}" if self._endpoint is not None else ""
        return f"layers {self.partition.middle(self.config.num_hidden_layers)} elsewhere{at}"

    @property
    def device(self) -> torch.device:
        """Where the client computes."""
        return self.input_blocks.device

    @property
    def wire_dtype(self) -> torch.dtype:
        """What states are rounded to on the wire."""
        return self._settings.wire_dtype

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        dtype: torch.dtype = self.lm_head.weight.dtype
        return dtype

    def close(self) -> None:
        """Close all sessions, and wait a moment until the server knows."""
        for cache in list(self._caches):
            if cache.session is not None:
                cache.session.close()
        self._close_run()
        if self._endpoint is not None:
            self._endpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


def _alive(model: SplitModelForCausalLM | None) -> SplitModelForCausalLM:
    assert model is not None, "the backbone is used without its model"
    return model


def _kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Those columns of `[rows, columns, hidden]` whose logits are wanted."""
    if not isinstance(logits_to_keep, int):
        return hidden[:, logits_to_keep]
    return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
