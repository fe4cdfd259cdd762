"""What every source of weights offers: a configuration, and tensors by their names in the whole model."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from fedsea.checkpoints.fingerprint import Fingerprint
from fedsea.errors import ModelNotFoundError


class Checkpoint(ABC):
    """A model's configuration and weights, read tensor by tensor.

    Attributes
    ----------
    name
        The name that the user gave.
    config
        The whole model's transformers configuration, with `architectures` set.
    generation_config
        What `generate` needs to know: end-of-text tokens, defaults.
    where
        What errors call the place of its files.
    """

    name: str
    where: str
    config: PreTrainedConfig
    generation_config: GenerationConfig

    @abstractmethod
    def tensor_names(self) -> frozenset[str]:
        """Names of all weights of the whole model that the checkpoint stores (a tied head is not stored)."""

    def load(
        self, names: Iterable[str], *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors, one after another, cast to `dtype` on `device`.

        Nothing else is read from disk, and no second copy of more than one tensor is alive at a time.

        Raises
        ------
        ModelNotFoundError
            If a tensor is not in the checkpoint, or its file is damaged.
        """
        names = list(names)
        unknown = sorted(set(names) - self.tensor_names())
        if unknown:
            raise ModelNotFoundError(f"{self.where} has no weight {unknown[0]}")
        return self._read(names, dtype, device)

    @abstractmethod
    def _read(
        self, names: list[str], dtype: torch.dtype, device: torch.device | str
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """What `load` gives; all names are there."""

    @abstractmethod
    def fingerprint(self, layers: Iterable[int] | None = None) -> Fingerprint:
        """Digests of the configuration and of the weights that this machine has (`layers`: only these layers)."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's tokenizer, as transformers loads it; a ModelNotFoundError if the checkpoint has none."""


def longest_text(config: PreTrainedConfig) -> int:
    """Tokens that a text may have, as the configuration says; as many as one likes if it does not."""
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 1 << 20)
