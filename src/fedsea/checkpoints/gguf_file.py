"""A GGUF file whose keys and tensors are crossed off as they are used, so that none is left out without a word."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from fedsea.errors import ModelNotFoundError

_HARMLESS = (
    "GGUF.",
    "general.",  # names, licences, how it was quantised, recommended sampling
    "quantize.",
    "tokenizer.chat_template",
    "tokenizer.huggingface.json",
    "tokenizer.ggml.fim_",
    "tokenizer.ggml.token_type_count",
    *(f"tokenizer.ggml.{token}_token_id" for token in ("seperator", "cls", "mask", "prefix", "suffix", "middle")),
    "split.",
)
_HARMLESS_OF_MODEL = ("tensor_data_layout", "rope.scaling.finetuned")
_COMPUTED = "attn_rot_embd"  # rotary frequencies that the configuration gives as well


class GgufFile:
    """Keys and tensors of a GGUF file; a ModelNotFoundError if it is no whole model, or lacks what is required.

    Whatever else the library raises for a file that is damaged passes through.
    """

    def __init__(self, source: Path) -> None:
        reader = gguf.GGUFReader(str(source))
        self._fields = dict(reader.fields)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._keys_left, self._tensors_left = set(self._fields), set(self._tensors)
        self.architecture: str = self.required("general.architecture")
        if self.read("general.type", "model") != "model":
            raise ModelNotFoundError(f"it holds no model (general.type is {self.read('general.type')!r})")
        if self.read("split.count", 1) > 1:
            raise ModelNotFoundError(
                f"it is one of {self.read('split.count')} files of a model; join them first (llama-gguf-split --merge)"
            )

    def read(self, key: str, default: Any = None) -> Any:
        """The value of a key, or `default`; it counts as used."""
        self._keys_left.discard(key)
        return self._fields[key].contents() if key in self._fields else default

    def mark(self, prefix: str, *keys: str) -> None:
        """Keys that other code uses."""
        self._keys_left -= {prefix + key for key in keys}

    def of_model(self, key: str, default: Any = None) -> Any:
        """The value of a key that begins with the architecture's name, or `default`; it counts as used."""
        return self.read(f"{self.architecture}.{key}", default)

    def required(self, key: str) -> Any:
        """The value of a key; it counts as used."""
        value = self.read(key)
        if value is None:
            raise ModelNotFoundError(f"it lacks the key {key}")
        return value

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, in torch's order."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def tensor(self, name: str, change: Callable[[Any], Any] = lambda array: array) -> torch.Tensor:
        """A tensor in float32; it counts as used. `change` is applied to the array first."""
        self._tensors_left.discard(name)
        found = self._tensors[name]
        values = gguf.dequantize(found.data, found.tensor_type).reshape(self.shape(name))
        return torch.from_numpy(np.array(change(values), dtype=np.float32, order="C"))

    def settle(self) -> None:
        """Nothing more will be used: a ModelNotFoundError if a key or a tensor is left that may change results."""
        harmless = (*_HARMLESS, *(f"{self.architecture}.{key}" for key in _HARMLESS_OF_MODEL))
        left = {key: self.read(key) for key in sorted(self._keys_left) if not key.startswith(harmless)}
        unknown = [f"{key} = {str(value)[:40]}" for key, value in left.items() if value]  # 0 or empty turns nothing on
        if unknown:
            raise ModelNotFoundError(
                f"it asks for what is not supported: {', '.join(unknown[:3])}; use the model in Hugging Face layout"
            )
        tensors = sorted(name for name in self._tensors_left if _COMPUTED not in name)
        if tensors:
            raise ModelNotFoundError(
                f"it has tensors that are not supported: {', '.join(tensors[:3])}; use the model in Hugging Face layout"
            )
