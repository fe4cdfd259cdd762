"""Models of well-known sizes with random weights, made from nothing: for tests, and for timing models one cannot get.

Each weight is drawn from a generator seeded by the weight's own name, so that a client and a server that make only
their own part have drawn one and the same model. The draws are raw 16-bit integers of numpy's SFC64 (whose stream numpy
promises to keep), taken as a uniform distribution: one addition and one multiplication in float32, both exactly rounded
everywhere. A normal distribution would cost three times as much and differ in the last bit from CPU to CPU, and nothing
that is measured with random weights needs it.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from fedsea.checkpoints.base import Checkpoint
from fedsea.checkpoints.fingerprint import Fingerprint, config_digest, group_digests
from fedsea.errors import ModelNotFoundError

PREFIX = "random:"
STREAM_VERSION = "fedsea-random-1"
CHUNK_VALUES = 2**20  # one generator each; fixed, so that values do not depend on the number of threads
PIECE_VALUES = 2**18  # small enough for the CPU's cache, large enough that threads seldom wait for Python's lock
CAST_VALUES = 2**15  # torch starts no threads of its own for a cast of this size


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


_LLAMA_2 = {
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": _rope(10000.0),
}
_TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": _rope(10000.0),
    "initializer_range": 0.2,  # at the usual 0.02 so small a model gives every token nearly the same logits
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _LLAMA_2
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-2-13b": _LLAMA_2
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama-2-70b": _LLAMA_2
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _rope(500000.0),
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _rope(100000.0),
        "tie_word_embeddings": True,
    },
    "tiny": _TINY | {"model_type": "llama"},
    "tiny-llama3": _TINY
    | {
        "model_type": "llama",
        "rope_parameters": _rope(
            10000.0,
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    },
    "tiny-mistral": _TINY | {"model_type": "mistral", "head_dim": 16, "sliding_window": 32},
    "tiny-qwen2": _TINY
    | {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 32,
        "max_window_layers": 3,
        "layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 3,
    },
    "tiny-qwen3": _TINY | {"model_type": "qwen3", "head_dim": 32},
}


class RandomCheckpoint(Checkpoint):
    """A model whose weights are drawn, not read.

    Norms are ones; every other weight is uniform with a standard deviation of the configuration's `initializer_range`.
    There is no tokenizer, and no end-of-text token: a generation has the length that it is asked for.

    Parameters
    ----------
    name
        `random:` and a key of `CONFIGURATIONS`.

    Raises
    ------
    ModelNotFoundError
        If there is no such configuration.
    """

    def __init__(self, name: str) -> None:
        key = name.removeprefix(PREFIX)
        if key not in CONFIGURATIONS:
            raise ModelNotFoundError(
                f"no random configuration {key!r}; there are: {', '.join(PREFIX + known for known in CONFIGURATIONS)}"
            )
        self.name = name
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        self.config: PreTrainedConfig = AutoConfig.for_model(**(CONFIGURATIONS[key] | tokens))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        self.config.architectures = [type(model).__name__]
        self.generation_config = GenerationConfig.from_model_config(self.config)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def load(
        self, names: Iterable[str], *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, torch.Tensor]]:
        names = list(names)
        unknown = sorted(set(names) - self._shapes.keys())
        if unknown:
            raise ModelNotFoundError(f"{self.name} has no weight {unknown[0]}")
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16), "fedsea-draw") as pool:
            for name in names:
                yield name, self._draw(name, dtype, device, pool)

    def fingerprint(self, layers: Iterable[int] | None = None) -> Fingerprint:
        scale = f"{STREAM_VERSION} {self.config.initializer_range!r}".encode()
        whole = Fingerprint(
            config_digest(self.config), group_digests((name, shape, scale) for name, shape in self._shapes.items())
        )
        return whole if layers is None else whole.restrict(layers)

    def tokenizer(self) -> Any:
        raise ModelNotFoundError(
            f"{self.name} has random weights and no tokenizer; give token ids, or name a real model"
        )

    def _draw(
        self, name: str, dtype: torch.dtype, device: torch.device | str, pool: ThreadPoolExecutor
    ) -> torch.Tensor:
        target = torch.empty(self._shapes[name], dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            return target.fill_(1.0)
        half_width = math.sqrt(3.0) * self.config.initializer_range
        flat = target.view(-1)

        def fill(chunk: int) -> None:
            _draw_chunk(name, chunk, half_width, flat[chunk * CHUNK_VALUES : (chunk + 1) * CHUNK_VALUES])

        for _ in pool.map(fill, range(math.ceil(flat.numel() / CHUNK_VALUES))):
            pass  # iterating raises what a thread raised
        return target


def _draw_chunk(name: str, chunk: int, half_width: float, target: torch.Tensor) -> None:
    """Fill one chunk of a weight (one-dimensional, at most `CHUNK_VALUES` values) from the chunk's own generator."""
    seed = hashlib.sha256(f"{STREAM_VERSION}/{name}/{chunk}".encode()).digest()
    generator = np.random.SFC64(int.from_bytes(seed, "little"))
    values = torch.empty(min(PIECE_VALUES, target.numel()))
    for start in range(0, target.numel(), PIECE_VALUES):
        wanted = target[start : start + PIECE_VALUES]
        in_place = wanted.dtype == torch.float32 and wanted.device.type == "cpu"
        piece = wanted if in_place else values[: wanted.numel()]
        numbers = piece.numpy()
        raw = generator.random_raw(math.ceil(len(numbers) / 4)).astype("<u8", copy=False).view("<i2")[: len(numbers)]
        np.add(raw, np.float32(0.5), out=numbers)  # the middle of each of 65,536 steps: symmetric about zero
        np.multiply(numbers, np.float32(half_width / 2**15), out=numbers)
        if wanted.device.type != "cpu":
            wanted.copy_(piece.to(wanted.device))  # moved first: the device casts faster
        elif not in_place:
            for at in range(0, len(numbers), CAST_VALUES):
                wanted[at : at + CAST_VALUES].copy_(piece[at : at + CAST_VALUES])
