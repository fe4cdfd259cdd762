"""An adapter that attackers have as well."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from fedsea.parts.adapter_files import read_adapter
from fedsea.parts.adapters import AdapterSpec, adapter_parameters
from fedsea.parts.blocks import Part


@dataclass(frozen=True)
class KnownAdapter:
    """A LoRA adapter of the whole model, its weights by their names there."""

    spec: AdapterSpec
    weights: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: Path, config: PreTrainedConfig) -> Self:
        """A PEFT adapter from its folder; errors as `read_adapter` and `AdapterSpec.from_config` raise them."""
        lora, weights = read_adapter(folder)
        return cls(AdapterSpec.from_config(lora, config, fresh=False), weights)

    @torch.no_grad()
    def put_on(self, part: Part) -> None:
        """Put it on a part's layers, frozen."""
        self.spec.put_on(part, part.layers)
        for name, parameter in adapter_parameters(part).items():
            parameter.copy_(self.weights[name])
        part.requires_grad_(False)
