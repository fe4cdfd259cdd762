"""Weights that files have under other names, or in other pieces, than models: as transformers converts them.

Experts are stored one by one and computed as one tensor; some families have renamed a module. transformers knows how
(`conversion_mapping`, since 5.0); of its converters those are used that make one weight of several.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key

Sources = dict[str, str]
"""Weights as they are stored, by name after renaming, in order; and the pattern of a converter that each fits."""


class Conversions:
    """How the files of a type of model become its weights."""

    def __init__(self, class_name: str, config: PreTrainedConfig) -> None:
        found = get_checkpoint_conversion_mapping(class_name) or get_checkpoint_conversion_mapping(config.model_type)
        self._config = config
        self._joins: list[Any] = [one for one in found or () if isinstance(one, WeightConverter)]
        self._renamings: list[Any] = [one for one in found or () if not isinstance(one, WeightConverter)]

    def renamed(self, stored: str) -> str:
        """A weight's name in the model, or what it would be if it were stored as one piece."""
        for renaming in self._renamings:
            stored, _ = renaming.rename_source_key(stored)
        return stored

    def joined(self, names: Iterable[str]) -> dict[str, tuple[Any, Sources]]:
        """The weights that are made of several of these (renamed): by what, and of which."""
        made: dict[str, tuple[Any, Sources]] = {}
        for name in sorted(names, key=dot_natural_key):
            for converter in self._joins:
                target, pattern = converter.rename_source_key(name)
                if pattern is not None and len(converter.target_patterns) == 1:
                    made.setdefault(target, (converter, {}))[1][name] = pattern
                    break
        return made

    def join(self, name: str, converter: Any, sources: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> Any:
        """One weight of several tensors, by their names."""
        own = converter.copy(converter.source_patterns, converter.target_patterns, operations=converter.operations)
        for source, pattern in sources.items():
            own.collected_tensors[pattern].append(tensors[source])
        (made,) = own.convert(name, config=self._config).values()
        return made[0] if isinstance(made, list) else made
