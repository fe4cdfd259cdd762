"""The three parts of a split model: input blocks (A), middle blocks (B) and output blocks (C).

Each is the family's own base model, cut: it has some of the layers, the input blocks also what comes before them, the
output blocks what comes after; and its own forward pass runs them. Each part holds its own weights only, and calls
every weight by its name in the whole model, so that `state_dict()` of a part is a slice of the whole model's.
"""

import copy
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fedsea.checkpoints import Checkpoint
from fedsea.checkpoints.whole import fill_computed
from fedsea.errors import ModelNotFoundError
from fedsea.partition import Partition, require_layers
from fedsea.parts.attention import NOW, Step, joined_mask
from fedsea.parts.cache import CachedRow, JoinedRows, Pool, RowCache, cache_argument
from fedsea.parts.narrow import LinearMap
from fedsea.parts.rows import Rows
from fedsea.parts.structure import Structure, input_factors, kept_layers, skeleton, structure_of
from fedsea.text import one_line

_CHANGING = {"dynamic", "longrope"}  # kinds of rotary embeddings that change with the length of the text


class Absent(nn.Module):
    """Takes the place of what another part does before the layers: states pass, positions add nothing."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self._hidden_size = hidden_size

    def forward(self, given: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        states = given.is_floating_point() and given.dim() == 3 and given.shape[-1] == self._hidden_size
        return given if states else torch.zeros((), device=given.device)


class _Given(nn.Module):
    """Takes the place of the decoder below a head: its output is what it is given."""

    def forward(self, *_args: Any, inputs_embeds: Tensor, **_kwargs: Any) -> Any:
        return _Output(inputs_embeds)


class _Output:
    """An output of a decoder that has its states and nothing else."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class _OfText(nn.Module):
    """A rotary embedding that looks at how long the text is: it is as long as the step of which these are a piece."""

    def __init__(self, embedding: nn.Module, tokens: int) -> None:
        super().__init__()
        self._embedding, self._last = embedding, tokens - 1

    def forward(self, states: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        last = position_ids.new_full((len(position_ids), 1), self._last)
        cos, sin = self._embedding(states, torch.cat([position_ids, last], dim=1), *args, **kwargs)
        return cos[:, :-1], sin[:, :-1]


class _SeenError(Exception):
    def __init__(self, numbers: int) -> None:
        self.numbers = numbers


class _Probe(RowCache):
    """Ends a layer where it has keys and values."""

    def __init__(self) -> None:
        super().__init__(Pool())

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        raise _SeenError(key_states.numel() + value_states.numel())


class Part(nn.Module):
    """Some decoder layers of a model, with or without its ends; the base of the three parts.

    Built by `from_checkpoint`, with real weights; the constructor alone gives modules on the meta device.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        layers: range,
        *,
        embedding: bool = False,
        head: bool = False,
        structure: Structure | None = None,
    ) -> None:
        super().__init__()
        self.config, self.layers = copy.deepcopy(config), layers
        self.has_embedding, self.has_head = embedding, head
        self._followed: tuple[nn.Module, list[tuple[dict[str, Any], dict[str, Any], str]]] | None = None
        try:
            self.structure = structure_of(config) if structure is None else structure
            whole = skeleton(config)
            self._cut(whole, embedding=embedding, head=head)
        except ModelNotFoundError:
            raise
        except Exception as error:  # of any kind: the configuration may come from a stranger
            why = one_line(f"{type(error).__name__}: {error}")
            raise ModelNotFoundError(f"the model's configuration cannot be used ({why})") from error
        decoder = self.get_submodule(self.structure.decoder)
        self.base_model_prefix = self.structure.decoder.partition(".")[0]  # PEFT asks for it
        # Whether tokens are computed in another way in a longer text: by rotary embeddings that change with it.
        self.looks_at_length = bool(_lengthening(decoder))
        self._takes_more = any(
            one.kind is one.VAR_KEYWORD for one in signature(type(decoder).forward).parameters.values()
        )
        self._whole = (whole,)  # in a tuple, so that no module is registered twice
        self._views: dict[range, Any] = {}
        self._pool = Pool()
        self._plain_head: bool | None = None  # whether logits are the head's output as it is; None if not known yet
        self.narrow_cut = nn.ModuleDict()  # the part's half of a narrow cut, if there is one
        self.eval()

    def _cut(self, whole: nn.Module, *, embedding: bool, head: bool) -> None:
        """Take away what other parts have, and register the rest under its own names."""
        found = self.structure
        every: Any = whole.get_submodule(found.layers)
        _put(whole, found.layers, nn.ModuleDict({str(number): every[number] for number in self.layers}))
        for path in found.before if not embedding else ():
            # One that is used before and after the layers cannot be told apart; such a model is refused.
            _put(whole, path, Absent(self.config.hidden_size))
        for path in found.after if not head else ():
            _put(whole, path, nn.Identity())
        for path, kept in ((found.embedding, embedding), (found.head, head)):
            if not kept:
                _put(whole, path, None)
        for name, child in whole.named_children():
            self.add_module(name, child)

    def follow(self, model: nn.Module, root: str) -> Self:
        """Compute with the modules that a model's `root` has now under the names of this part's own."""
        # For every token, and hardly ever another: so it is known by now where to look.
        if self._followed is None or self._followed[0] is not model:
            found = self.structure
            paths = [f"{found.layers}.{layer}" for layer in self.layers]
            paths += [found.embedding, *found.before] if self.has_embedding else []
            paths += found.after if self.has_head else []
            self._followed = model, [_twins(self, model, root, path) for path in paths]
        for own, others, name in self._followed[1]:
            if own[name] is not others[name]:
                own[name] = others[name]
                self._views.clear()
        return self

    def _view(self, layers: range) -> Any:
        """The base model with some of the part's layers, as a module that shares all that it runs."""
        found, decoder = self.structure, self.get_submodule(self.structure.decoder)
        held: Any = self.get_submodule(found.layers)
        view = copy.copy(decoder)
        view._modules = dict(decoder._modules)
        view.__dict__["config"] = kept_layers(self.config, layers)
        view._modules[_own(found.layers)] = nn.ModuleList([held[str(number)] for number in layers])
        for path in found.after:
            view._modules[_own(path)] = nn.Identity()  # `finished` does it
        if layers.start or not self.has_embedding:
            for path in found.before:
                view._modules[_own(path)] = Absent(self.config.hidden_size)
            for name in input_factors(decoder):
                setattr(view, name, 1.0)
        self._views[layers] = view
        return view

    def new_cache(self) -> RowCache:
        """An empty KV cache for this part's layers."""
        decoder = self.get_submodule(self.structure.decoder)
        return RowCache(self._pool, {name: decoder.get_submodule(name) for name in _lengthening(decoder)})

    @property
    def device(self) -> torch.device:
        """Where the part computes."""
        return next(self.parameters()).device

    @property
    def weight_bytes(self) -> int:
        """Bytes of the part's weights."""
        return sum(weight.numel() * weight.element_size() for weight in self.parameters())

    def run_layers(
        self, states: Tensor, rows: Rows, cache: RowCache | None, layers: range, *, siblings: bool = False
    ) -> Tensor:
        """Run layers, by their numbers in the whole model, on new tokens: `[tokens, hidden]` -> the same shape.

        The cache holds what came before and gets the new tokens' keys and values; None for whole texts of which nothing
        is kept, as in training, whose rows start at 0. `siblings` are tokens that could come next in the one row of a
        cache: each attends to what that holds and to itself, and the cache does not change.
        """
        if cache is not None and not siblings:
            cache.begin(rows)
        if layers or self.has_embedding:
            view = self._views.get(layers) or self._view(layers)
            view.__dict__["training"] = self.training
            if self.looks_at_length:
                view = _of_text(view, rows, cache)
            cached = cache.rows if cache is not None else None
            step = Step(rows.counts, cached, siblings=siblings)
            given: dict[str, Any] = {"fedsea_step": step} if self._takes_more else {}
            if self.structure.masked:
                given |= _masked(view, rows, states, cached)
            positions = rows.positions(states.device)
            before, NOW.step = NOW.step, step
            try:
                done = view(
                    inputs_embeds=states.unsqueeze(0),
                    position_ids=(positions[:1].expand(len(states)) if siblings else positions).unsqueeze(0),
                    use_cache=self.structure.masked and cached is not None,
                    **given,
                )
            finally:
                NOW.step = before
            states = done[0][0]
        if cache is not None and not siblings:
            for row, end in zip(cache.rows, rows.ends, strict=True):
                row.length = end
        return states

    def numbers_per_token(self) -> dict[int, int]:
        """How many numbers a token's keys and values are in each layer: asked of the layers themselves."""
        probe, found = Part(self.config, self.layers, structure=self.structure), dict[int, int]()
        states = torch.empty(1, 1, self.config.hidden_size, device="meta")
        places = torch.zeros(1, 1, dtype=torch.int64, device="meta")
        for layer in self.layers:
            view = probe._view(range(layer, layer + 1))
            try:
                view(**{"inputs_embeds": states, "position_ids": places, "use_cache": True, _cache_of(view): _Probe()})
            except _SeenError as seen:
                found[layer] = seen.numbers
        return found

    def _load(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str, head: Tensor | None = None
    ) -> Self:
        """Give every module its weights from the checkpoint, and the head those of `head` if given; read no others."""
        # By the name under which it is stored: a tied head is the embedding.
        in_head, in_embedding = f"{self.structure.head}.weight", f"{self.structure.embedding}.weight"
        tied = self.config.tie_word_embeddings
        stored_as = {name: in_embedding if tied and name == in_head else name for name in self.state_dict()}
        shapes = {stored_as[name]: list(weight.shape) for name, weight in self.state_dict().items()}
        weights = {} if head is None else {in_head: head}
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
        return self.fill(weights, device)

    def fill(self, weights: Mapping[str, Tensor], device: torch.device | str) -> Self:
        """Take all of the part's weights, which are not copied, and compute what is not stored (rotary frequencies)."""
        (whole,) = self._whole
        fill_computed(whole, self, device)  # before: it sets weights as well, where a module has both
        self.load_state_dict(weights, strict=True, assign=True)
        self.requires_grad_(False)
        return self


class InputBlocks(Part):
    """A: the embedding, what the model does before its layers, and the first `p` of these. Runs at the client."""

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

    @property
    def embedding(self) -> Any:
        """The embedding of tokens, as it is registered now."""
        return self.get_submodule(self.structure.embedding)

    def forward(self, tokens: Tensor, rows: Rows, cache: RowCache | None) -> Tensor:
        """Token ids `[tokens]` -> `h_A` without noise, `[tokens, hidden]`, or `[tokens, rank]` with a narrow cut."""
        return self.run_embedded(self.embed(tokens, rows), rows, cache)

    def embed(self, tokens: Tensor, rows: Rows) -> Tensor:
        """What the embedding gives for token ids `[tokens]`, `[tokens, hidden]`.

        It is called as transformers calls it, with ids `[rows, columns]`: hooks on it count on that (NEFTune).
        """
        if len(rows.counts) == 1:
            embedded: Tensor = self.embedding(tokens.unsqueeze(0))[0]
            return embedded
        columns = torch.arange(rows.width, device=tokens.device)
        real = columns < torch.tensor(rows.counts, device=tokens.device).unsqueeze(1)
        ids = tokens.new_zeros(real.shape)
        ids[real] = tokens
        return cast(Tensor, self.embedding(ids)[real])

    def run_embedded(self, embedded: Tensor, rows: Rows, cache: RowCache | None) -> Tensor:
        """The same of what the embedding gave, `[tokens, hidden]`."""
        hidden = self.run_layers(embedded, rows, cache, self.layers)
        return self.narrowed(hidden) if self.narrow_cut else hidden

    def narrowed(self, hidden: Tensor) -> Tensor:
        """What leaves of states `[..., hidden]`: all, or `[..., rank]` with a narrow cut."""
        return self.narrow_cut["project"](hidden) if self.narrow_cut else hidden


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
        other = MiddleBlocks(self.config, self.layers, structure=self.structure)
        return other.fill(self.state_dict(), self.device)

    def add_narrow_cut(self, weight: Tensor) -> None:
        """Take what a narrow cut leaves of `h_A` from now on, and lift it by a copy of a weight `[hidden, rank]`."""
        self.narrow_cut["lift"] = LinearMap(weight).to(self.device)

    def lifted(self, hidden: Tensor) -> Tensor:
        """What came, `[..., hidden]`; with a narrow cut `[..., rank]` -> `[..., hidden]`."""
        lifted: Tensor = self.narrow_cut["lift"](hidden) if self.narrow_cut else hidden
        return lifted

    def forward(self, hidden: Tensor, rows: Rows, cache: RowCache | None, layers: range) -> Tensor:
        """What came over the cut, `[tokens, hidden or rank]` -> `h_B`, `[tokens, hidden]`."""
        return self.run_layers(self.lifted(hidden) if self.narrow_cut else hidden, rows, cache, layers)


class OutputBlocks(Part):
    """C: the last `q` decoder layers, what the model does after its layers, and the head. Runs at the client."""

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

    @property
    def head(self) -> Any:
        """The head, as it is registered now."""
        return self.get_submodule(self.structure.head)

    def forward(self, hidden: Tensor, rows: Rows, cache: RowCache | None) -> Tensor:
        """Hidden states `h_B` `[tokens, hidden]` -> states before the final norm, the same shape."""
        return self.run_layers(hidden, rows, cache, self.layers)

    def finished(self, hidden: Tensor) -> Tensor:
        """States before the final norm -> what the head takes, the same shape."""
        for path in self.structure.after:
            hidden = self.get_submodule(path)(hidden)
        return hidden

    def logits(self, hidden: Tensor, head: nn.Module | None = None) -> Tensor:
        """States before the final norm `[..., hidden]` -> logits `[..., vocabulary]`, scaled as the family does it.

        By another `head`, if a model has replaced it.
        """
        finished, head = self.finished(hidden), self.head if head is None else head
        if self._plain_head is None:
            with torch.no_grad():
                probe = torch.linspace(-1, 1, finished.shape[-1]).to(finished).view(1, 1, -1)
                self._plain_head = torch.equal(self._above_decoder(head)(inputs_embeds=probe).logits, head(probe))
        if self._plain_head:
            return cast(Tensor, head(finished))
        logits = self._above_decoder(head)(inputs_embeds=finished.reshape(1, -1, finished.shape[-1])).logits
        return cast(Tensor, logits.view(*finished.shape[:-1], -1))

    def _above_decoder(self, head: nn.Module) -> Any:
        """The whole model above its decoder: what it makes of a decoder's output."""
        (whole,) = self._whole
        *path, name = self.structure.decoder.split(".")
        top = here = copy.copy(whole)
        top._modules = dict(self._modules)
        for step in path:
            inner: Any = copy.copy(here._modules[step])
            inner._modules = dict(inner._modules)
            here._modules[step] = here = inner
        here._modules[name] = _Given()
        _put(top, self.structure.head, head)
        return top


def _of_text(view: nn.Module, rows: Rows, cache: RowCache | None) -> nn.Module:
    """The same base model with rotary embeddings of the text's own, which know how long it is."""
    own = copy.copy(view)
    own._modules = dict(view._modules)
    for name in _lengthening(view):
        embedding = cache.rotaries[name] if cache is not None else copy.deepcopy(view.get_submodule(name))
        own._modules[name] = _OfText(embedding, rows.furthest)
    return own


def _masked(view: nn.Module, rows: Rows, states: Tensor, cached: Sequence[CachedRow] | None) -> dict[str, Any]:
    """What layers take that attend by themselves."""
    mask = joined_mask(rows, states.dtype, states.device, cached is not None)
    joined = {} if cached is None else {_cache_of(view): JoinedRows(cached, rows.counts)}
    return {"attention_mask": mask, **joined}


def _cache_of(view: nn.Module) -> str:
    return cache_argument(type(view).forward)


def _lengthening(decoder: nn.Module) -> list[str]:
    """Names of the rotary embeddings that change with the length of the text."""
    kinds = {name: getattr(child, "rope_type", None) for name, child in decoder._modules.items()}
    return [
        name for name, kind in kinds.items() if _CHANGING & set(kind.values() if isinstance(kind, dict) else [kind])
    ]


def _twins(part: nn.Module, model: nn.Module, root: str, path: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Where a part has a module, where a model has it whose `root` is given, and how it is called there."""
    parent, _, name = path.rpartition(".")
    return part.get_submodule(parent)._modules, model.get_submodule(parent[len(root) + 1 :])._modules, name


def _own(path: str) -> str:
    return path.rpartition(".")[2]


def _put(whole: nn.Module, path: str, module: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    whole.get_submodule(parent)._modules[name] = module
