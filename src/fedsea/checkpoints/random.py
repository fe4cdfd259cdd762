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
from fedsea.checkpoints.configurations import CONFIGURATIONS, PREFIX
from fedsea.checkpoints.fingerprint import Fingerprint, config_digest, group_digests
from fedsea.errors import ModelNotFoundError

STREAM_VERSION = "fedsea-random-1"
CHUNK_VALUES = 2**20  # one generator each; fixed, so that values do not depend on the number of threads
PIECE_VALUES = 2**18  # small enough for the CPU's cache, large enough that threads seldom wait for Python's lock
CAST_VALUES = 2**15  # torch starts no threads of its own for a cast of this size


class RandomCheckpoint(Checkpoint):
    """A model whose weights are drawn, not read.

    Norms (weights of one dimension) are ones; every other weight is uniform, with a standard deviation of the
    configuration's `initializer_range`. There is no tokenizer, and no end-of-text token: a
    generation has the length that its caller sets.
    """

    def __init__(self, name: str) -> None:
        self.name = self.where = name
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        self.config: PreTrainedConfig = AutoConfig.for_model(**(CONFIGURATIONS[name.removeprefix(PREFIX)] | tokens))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        self.config.architectures = [type(model).__name__]
        self.generation_config = GenerationConfig.from_model_config(self.config)
        stored = model.state_dict().keys()
        tensors = [*model.named_parameters(), *(pair for pair in model.named_buffers() if pair[0] in stored)]
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors}

    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def _read(
        self, names: list[str], dtype: torch.dtype, device: torch.device | str
    ) -> Iterator[tuple[str, torch.Tensor]]:
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
        if name.endswith(".weight") and target.dim() == 1:
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
