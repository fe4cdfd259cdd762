"""LoRA adapters: their description, which is small and checked, and the weights that they start with.

One `LoraConfig` of the user becomes an `AdapterSpec`, which may come from any peer; each side puts PEFT's modules on
the layers that it holds. Where the weights start depends on a seed and on their names alone, so two sides (or two
partitions) start from the same adapter without sending it. Adapters are float32 whatever the model computes in: an
update of a float16 weight at a learning rate of 1e-5 is about one unit in its last place, and would vanish.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from fedsea.errors import ProtocolError, UsageError
from fedsea.fields import Fields
from fedsea.partition import LIFT, PROJECT, layer_of, layer_path
from fedsea.parts.lora_layers import Targets, find_targets, inject

MAX_RANK = 4096
MAX_NARROW = 1 << 16
MAX_TARGETS = 1 << 16
LAYERS = "model.layers"  # path of the layers in most families
SUFFIXES = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*){0,4}")


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA adapter of a whole model, without its weights."""

    targets: Targets
    dropout: float = 0.0  # probability that an input of the adapter is dropped in training
    use_rslora: bool = False  # scaled by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732)
    use_dora: bool = False  # learns the magnitudes of the weights' columns as well (arXiv 2402.09353)
    gaussian: bool = False  # starts from a Gaussian instead of PEFT's default, Kaiming's uniform
    seed: int = field(default=0, compare=False)  # what the start depends on, with the names
    narrow: int = 0  # rank of the narrow cut that is trained with it; 0 if states cross as they are

    @classmethod
    def from_config(
        cls, lora: LoraConfig, config: PreTrainedConfig, seed: int = 0, *, fresh: bool = True
    ) -> "AdapterSpec":
        """The adapter that a `LoraConfig` describes for a model; arguments and errors are those of `find_targets`."""
        targets = find_targets(lora, config, fresh=fresh)
        gaussian = lora.init_lora_weights == "gaussian"
        spec = cls(targets, lora.lora_dropout, lora.use_rslora, lora.use_dora, gaussian, seed)
        try:
            return cls.from_body(spec.to_body())  # what the block server would say of it
        except ProtocolError as error:
            raise UsageError(f"a split model does not take the adapter's configuration: {error}") from None

    def to_body(self) -> dict[str, Any]:
        """As a JSON object, modules of one kind together: `[["self_attn.q_proj", 8, 16.0, [0, 1, 2]], ...]`."""
        groups: dict[tuple[str, int, float], list[int]] = {}
        path = LAYERS
        for name, (rank, alpha) in self.targets.items():
            path, layer, suffix = layer_path(name) or (path, 0, "")
            groups.setdefault((suffix, rank, alpha), []).append(layer)
        body = vars(self) | {"targets": [[*key, sorted(layers)] for key, layers in sorted(groups.items())]}
        return body if path == LAYERS else body | {"path": path}

    @classmethod
    def from_body(cls, body: Any) -> "AdapterSpec":
        """Check and read what `to_body` made: a ProtocolError if anything is wrong, as it may come from any peer."""
        read, targets = Fields(body, "an adapter"), dict[str, tuple[int, float]]()
        path = read.text("path", like=SUFFIXES) if "path" in read.body else LAYERS
        for row in read.rows("targets", ("module", "rank", "alpha", "layers")):
            suffix, alpha = row.text("module", like=SUFFIXES), row.number("alpha", above=0, high=1e6)
            rank = row.count("rank", 1, MAX_RANK)
            targets |= {f"{path}.{layer}.{suffix}": (rank, alpha) for layer in row.counts("layers")}
        if not 0 < len(targets) <= MAX_TARGETS:
            raise read.wrong("targets", f"1 to {MAX_TARGETS} modules")
        switches = {name: read.switch(name) for name in ("use_rslora", "use_dora", "gaussian")}
        dropout, seed = read.number("dropout", 0, math.nextafter(1, 0)), read.count("seed", 0, (1 << 64) - 1)
        narrow = read.count("narrow", 0, MAX_NARROW) if "narrow" in read.body else 0
        return cls(targets, dropout, seed=seed, narrow=narrow, **switches)

    def within(self, layers: Iterable[int]) -> Targets:
        """Those of the targets that are in the given layers."""
        held = set(layers)
        return {name: sizes for name, sizes in self.targets.items() if layer_of(name) in held}

    def weight_names(self, layers: range) -> set[str]:
        """Names of the adapter's weights in the given layers, as `adapter_parameters` gives them."""
        kinds = ["lora_A", "lora_B", *["lora_magnitude_vector"] * self.use_dora]
        return {f"{name}.{kind}.weight" for name in self.within(layers) for kind in kinds}

    def weight_shapes(self, modules: Mapping[str, tuple[int, int]], layers: range) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's weights in the given layers, by name; `modules` are (out features, in features)."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (rank, _alpha) in self.within(layers).items():
            if name not in modules:
                raise ProtocolError(f"{name} is not a linear module of the model")
            to, of = modules[name]
            shapes[f"{name}.lora_A.weight"], shapes[f"{name}.lora_B.weight"] = (rank, of), (to, rank)
            if self.use_dora:
                shapes[f"{name}.lora_magnitude_vector.weight"] = (to,)
        return shapes

    def shapes_in(self, config: PreTrainedConfig, layers: range) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's weights in some layers of a model of which only the configuration is there."""
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config)
        return self.weight_shapes(linear_sizes(whole), layers)

    def put_on(self, module: nn.Module, layers: Iterable[int], adapter: str = "default") -> None:
        """Put PEFT's modules on those of a part's layers that are targets, at their start; only they are trainable.

        A ProtocolError if a target is not a linear module of the part.
        """
        targets, modules = self.within(layers), linear_sizes(module)
        for name in targets:
            if name not in modules:
                raise ProtocolError(f"{name} is not a linear module of the model")
        if not targets:
            return
        inject(module, targets, adapter, lora_dropout=self.dropout, use_rslora=self.use_rslora, use_dora=self.use_dora)
        for name, parameter in adapter_parameters(module, adapter).items():
            parameter.data = parameter.data.float()
            if ".lora_A." in name:
                parameter.data.copy_(self.start(name, parameter.shape))
            elif ".lora_B." in name:
                parameter.data.zero_()

    def start(self, name: str, shape: Sequence[int]) -> Tensor:
        """Where a `lora_A` weight starts: float32 of its shape, from the seed and its name alone."""
        digest = hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        start = torch.empty(tuple(shape))
        if self.gaussian:
            return start.normal_(0, 1 / shape[0], generator=generator)
        bound = 1 / math.sqrt(shape[1])  # kaiming_uniform with a = sqrt(5), as PEFT's default
        return start.uniform_(-bound, bound, generator=generator)

    def difference(self, other: "AdapterSpec") -> str | None:
        """In what an adapter is another than `other`, in words; None if they fit."""
        if self.targets.keys() != other.targets.keys():
            some = sorted(self.targets.keys() ^ other.targets.keys())
            return f"other target modules ({some[0]}{' and more' if len(some) > 1 else ''})"
        for name, sizes in self.targets.items():
            if sizes != other.targets[name]:
                ours, theirs = (f"rank {rank}, alpha {alpha:g}" for rank, alpha in (sizes, other.targets[name]))
                return f"{ours} beside {theirs} ({name})"
        if (self.use_dora, self.use_rslora) != (other.use_dora, other.use_rslora):
            return "another kind (DoRA or rsLoRA)"
        if self.narrow != other.narrow:
            cuts = (f"a narrow cut of rank {one}" if one else "no narrow cut" for one in (self.narrow, other.narrow))
            return " beside ".join(cuts)
        return None


def linear_sizes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Numbers out and in of each linear module, by its name; `Conv1D` is what GPT-2 calls one."""
    sizes = {}
    for name, one in module.named_modules():
        if isinstance(one, nn.Linear):
            sizes[name] = one.out_features, one.in_features
        elif isinstance(one, Conv1D):
            sizes[name] = one.nf, one.nx
    return sizes


def adapter_parameters(module: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """A module's adapter weights by their names in a PEFT adapter of the whole model, without PEFT's own prefix.

    Its half of a narrow cut is among them.
    """
    infix = f".{adapter}."
    return {
        name.replace(infix, "."): parameter
        for name, parameter in module.named_parameters()
        if (".lora_" in name and infix in name) or name in (PROJECT, LIFT)
    }


def misfit(weights: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Where an adapter's weights (tensors or arrays) differ first from what a model needs; None if they fit."""
    for name in sorted(weights.keys() ^ shapes.keys()):
        return f"the model has no {name}" if name in weights else f"{name} is missing"
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != tuple(shape):
            return f"{name} has shape {list(weights[name].shape)}, the model's has {list(shape)}"
    return None
