"""The three parts of a split model: input blocks (A), middle blocks (B) and output blocks (C).

Each is built from transformers' own modules, holds only its own weights, and calls every weight by its name in the
whole model, so that `state_dict()` of a part is a slice of the whole model's.
"""

import copy
from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fedsea.checkpoints import Checkpoint
from fedsea.errors import ModelNotFoundError
from fedsea.partition import Partition, require_layers
from fedsea.parts.cache import RowCache, cache_argument
from fedsea.parts.family import Family, family_of
from fedsea.parts.narrow import LinearMap
from fedsea.parts.rows import Rows, attention_mask
from fedsea.text import one_line

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Part(nn.Module):
    """Some decoder layers of a model, with or without its ends; the base of the three parts.

    Built by `from_checkpoint`, with real weights; the constructor alone gives modules on the meta device.
    """

    model: Any
    lm_head: nn.Linear

    def __init__(self, config: PreTrainedConfig, layers: range, *, embedding: bool = False, head: bool = False) -> None:
        super().__init__()
        self.config = copy.deepcopy(config)
        self.config._attn_implementation = "sdpa"
        self.layers = layers
        family = family_of(config)
        try:
            self.windows = {layer: family.window(config, layer) for layer in layers}
            self._build(family, embedding=embedding, head=head)
            self.rotary = family.rotary(self.config)
        except Exception as error:  # of any kind: the configuration may come from a stranger
            why = one_line(f"{type(error).__name__}: {error}")
            raise ModelNotFoundError(f"the model's configuration cannot be used ({why})") from error
        self.narrow_cut = nn.ModuleDict()  # the part's half of a narrow cut, if there is one
        self.eval()

    def _build(self, family: Family, *, embedding: bool, head: bool) -> None:
        """The modules, on the meta device."""
        config: Any = self.config
        with torch.device("meta"):
            self.model = nn.Module()
            if embedding:
                self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
            self.model.layers = nn.ModuleDict({str(layer): family.layer(config, layer) for layer in self.layers})
            if head:
                self.model.norm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def follow(self, decoder: Any) -> Self:
        """Compute with the modules that a decoder has now under the names of this part's own."""
        # For every token, and hardly ever another: registering a module takes longer than asking for it.
        for name in ("embed_tokens", "norm"):
            if name in self.model._modules and getattr(self.model, name) is not (module := getattr(decoder, name)):
                setattr(self.model, name, module)
        own, other = self.model.layers, decoder.layers
        for layer in own:
            if own[layer] is not (module := other[layer]):
                own[layer] = module
        return self

    def new_cache(self) -> RowCache:
        """An empty KV cache for this part's layers."""
        return RowCache(self.rotary)

    @property
    def device(self) -> torch.device:
        """Where the part computes."""
        return cast(Tensor, self.rotary.inv_freq).device

    @property
    def weight_bytes(self) -> int:
        """Bytes of the part's weights."""
        return sum(weight.numel() * weight.element_size() for weight in self.parameters())

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that one cached token of one row takes in one layer."""
        config: Any = self.config
        head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads: int = config.num_key_value_heads
        return 2 * heads * head_dim * dtype.itemsize

    def run_layers(self, hidden: Tensor, rows: Rows, cache: RowCache | None, layers: range) -> Tensor:
        """Run layers, by their numbers in the whole model, on new tokens: `[rows, width, hidden]` -> the same shape.

        Rows that differ in length are padded at the right; what comes out at padded places means nothing. The cache
        holds what came before and gets the new tokens' keys and values; None for whole texts of which nothing is kept,
        as in training, whose rows start at 0.
        """
        if not layers:
            return hidden
        if cache is not None:
            cache.begin(rows)
        # A rotary embedding that changes with the length of the text belongs to that text.
        embedding = cache.rotary if cache is not None else copy.deepcopy(self.rotary)
        positions = rows.positions(hidden.device)
        if rows.reach == rows.furthest:
            rotary = embedding(hidden, positions)
        else:
            rotary = _rotate_within(rows.furthest, embedding, hidden, positions)
        masks = {window: attention_mask(rows, window, hidden.device) for window in {self.windows[at] for at in layers}}
        hidden = self.through_layers(hidden, layers, positions, rotary, masks, cache)
        if cache is not None:
            cache.finish()
        return hidden

    def through_layers(
        self,
        hidden: Tensor,
        layers: range,
        positions: Tensor,
        rotary: tuple[Tensor, Tensor],
        masks: Mapping[int | None, Tensor | None],
        cache: Any,
    ) -> Tensor:
        """`run_layers` on `positions` `[rows, width]` with masks, by window, that are given, and whatever cache."""
        for layer in layers:
            block = self.model.layers[str(layer)]
            hidden = block(
                hidden,
                attention_mask=masks[self.windows[layer]],
                position_embeddings=rotary,
                position_ids=positions,
                use_cache=cache is not None,
                **{cache_argument(type(block).forward): cache},
            )
        return hidden

    def _load(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str, head: Tensor | None = None
    ) -> Self:
        """Give every module its weights from the checkpoint, and the head those of `head` if given; read no others."""
        # By the name under which it is stored: a tied head is the embedding.
        tied = self.config.tie_word_embeddings
        stored_as = {name: _EMBEDDING if tied and name == _HEAD else name for name in self.state_dict()}
        shapes = {stored_as[name]: list(weight.shape) for name, weight in self.state_dict().items()}
        weights = {} if head is None else {_HEAD: head}
        wanted = sorted({stored for name, stored in stored_as.items() if name not in weights})
        lacking = [name for name in wanted if name not in checkpoint.tensor_names()]
        if lacking:
            raise ModelNotFoundError(f"{checkpoint.name} does not fill the model: it lacks {', '.join(lacking[:3])}")
        loaded = {}
        for name, tensor in checkpoint.load(wanted, dtype=dtype, device=device):
            which = f"{checkpoint.name}: weight {name}"
            if list(tensor.shape) != shapes[name]:
                needed = f"the model of its configuration needs {shapes[name]}"
                raise ModelNotFoundError(f"{which} has shape {list(tensor.shape)}; {needed}")
            if not tensor.is_floating_point():
                kind = f"{str(tensor.dtype).removeprefix('torch.')}, as quantised weights are"
                raise ModelNotFoundError(f"{which} is stored as {kind}; use the original checkpoint instead")
            loaded[name] = tensor
        weights |= {name: loaded[stored] for name, stored in stored_as.items() if name not in weights}
        self.load_state_dict(weights, strict=True, assign=True)
        self.requires_grad_(False)
        self.rotary.to(device)
        return self


def _rotate_within(tokens: int, embedding: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines of an embedding that may look at how long the text is: the whole step's `tokens`."""
    # Padded places must not make it believe in a longer text, nor a piece of a step in a shorter one.
    last = positions.new_full((len(positions), 1), tokens - 1)
    cos, sin = embedding(hidden, torch.cat([positions.clamp(max=tokens - 1), last], dim=1))
    return cos[:, :-1], sin[:, :-1]


class InputBlocks(Part):
    """A: the embedding and the first `p` decoder layers. Runs at the client."""

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, partition: Partition, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Self:
        """Read this part's weights, and no others, from a checkpoint."""
        layers = partition.input(checkpoint.config.num_hidden_layers)
        return cls(checkpoint.config, layers, embedding=True)._load(checkpoint, dtype=dtype, device=device)

    def narrow(self, weight: Tensor) -> None:
        """Cut `h_A` narrow from now on: project it by a weight `[rank, hidden]`, of which a copy is kept."""
        self.narrow_cut["project"] = LinearMap(weight).to(self.device)

    def forward(self, input_ids: Tensor, rows: Rows, cache: RowCache | None) -> Tensor:
        """Token ids `[rows, width]` -> `h_A` without noise, `[rows, width, hidden]`, or `rank` with a narrow cut."""
        return self.run_embedded(self.model.embed_tokens(input_ids), rows, cache)

    def run_embedded(self, embedded: Tensor, rows: Rows, cache: RowCache | None) -> Tensor:
        """The same of what the embedding gave, `[rows, width, hidden]`."""
        return self.narrowed(self.run_layers(embedded, rows, cache, self.layers))

    def narrowed(self, hidden: Tensor) -> Tensor:
        """What leaves of states `[..., hidden]`: all, or `[..., rank]` with a narrow cut."""
        narrow: Tensor = self.narrow_cut["project"](hidden) if self.narrow_cut else hidden
        return narrow


class MiddleBlocks(Part):
    """B: decoder layers between the cuts. Runs at the block server, for every partition that its layers cover."""

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, layers: range, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Self:
        """Read these layers, and no others, from a checkpoint; a PartitionError if the model does not have them."""
        require_layers(layers, checkpoint.config.num_hidden_layers)
        return cls(checkpoint.config, layers)._load(checkpoint, dtype=dtype, device=device)

    def second_adapter_copy(self) -> "MiddleBlocks":
        """Other modules on the same weights, which are not copied: for a run's adapters to be put on."""
        other = MiddleBlocks(self.config, self.layers)
        other.load_state_dict(self.state_dict(), strict=True, assign=True)
        other.requires_grad_(False)
        other.rotary = self.rotary
        return other

    def add_narrow_cut(self, weight: Tensor) -> None:
        """Take what a narrow cut leaves of `h_A` from now on, and lift it by a copy of a weight `[hidden, rank]`."""
        self.narrow_cut["lift"] = LinearMap(weight).to(self.device)

    def lifted(self, hidden: Tensor) -> Tensor:
        """What came, `[..., hidden]`; with a narrow cut `[..., rank]` -> `[..., hidden]`."""
        lifted: Tensor = self.narrow_cut["lift"](hidden) if self.narrow_cut else hidden
        return lifted

    def forward(self, hidden: Tensor, rows: Rows, cache: RowCache | None, layers: range) -> Tensor:
        """What came over the cut, `[rows, width, hidden or rank]` -> `h_B` `[rows, width, hidden]`."""
        return self.run_layers(self.lifted(hidden), rows, cache, layers)


class OutputBlocks(Part):
    """C: the last `q` decoder layers, the final norm and the head. Runs at the client."""

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        partition: Partition,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        embedding: Tensor | None = None,
    ) -> Self:
        """Read this part's weights, and no others; a tied head shares the input blocks' `embedding`, if it is given."""
        layers = partition.output(checkpoint.config.num_hidden_layers)
        part = cls(checkpoint.config, layers, head=True)
        head = embedding if checkpoint.config.tie_word_embeddings else None
        return part._load(checkpoint, dtype=dtype, device=device, head=head)

    def forward(self, hidden: Tensor, rows: Rows, cache: RowCache | None) -> Tensor:
        """Hidden states `h_B` `[rows, width, hidden]` -> hidden states before the final norm, the same shape."""
        return self.run_layers(hidden, rows, cache, self.layers)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: `[..., hidden]` -> logits `[..., vocabulary]`."""
        logits: Tensor = self.lm_head(self.model.norm(hidden))
        return logits
