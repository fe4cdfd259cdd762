"""Noise that the client adds to every hidden state before it leaves.

What is drawn
-------------
Noise is only worth as much as its secrecy and its freshness, so the standard normals come from `NoiseSource`:

- Its secret is 32 bytes from the operating system, never derived from a configured seed, and never leaves.
- The stream is SHAKE-256 keyed with the secret: a cryptographic generator. torch's own generator keeps 32 bits of its
  seed; whoever knows one token of a text (a chat template's first, say) could try them all and subtract the rest.
- The draw for a token depends on the secret and on the text up to that token, and on nothing else. The same state sent
  again (a retry, a replay after a lost connection, a beam's twin row, generation without a cache, the same question
  asked anew) carries the same noise, so a server that sees it a hundred times has nothing to average.

The paper's scale
-----------------
The paper (FedSEA-LLaMA, section on privacy) reports noise by its mean absolute value `s`. A Gaussian's is
`std * sqrt(2 / pi)`, so `std = s * sqrt(pi / 2)`: its 0.05 is `GaussianNoise(std=0.0627)`. It only means something
beside the signal: 0.05 on LLaMA2-7B, whose mean |h_A| after one layer is about 0.022, is `RelativeGaussianNoise(2.85)`.
"""

import hashlib
import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsea.errors import UsageError

DIGEST_BYTES = 16


class Noise(ABC):
    """A mechanism: what happens to hidden states on their way out of the client."""

    def calibrated(self, mean_magnitude: Callable[[], float]) -> "Noise":
        """The mechanism for a model whose mean |h_A| `mean_magnitude()` measures; most do not depend on it."""
        return self

    @abstractmethod
    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        """Protect hidden states.

        Parameters
        ----------
        hidden
            `h_A`, `[tokens, hidden]`.
        normals
            Gives standard normal draws, float32, `[tokens, hidden]`: the same for the same state.

        Returns
        -------
        Tensor
            What may leave, `[tokens, hidden]`, same dtype.
        """


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """Independent Gaussian noise on every element (the paper's mechanism).

    Parameters
    ----------
    std
        Standard deviation, in the unit of the hidden states. 0 sends them as they are.

    Raises
    ------
    UsageError
        If `std` is negative or not finite.
    """

    std: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.std) and self.std >= 0):
            raise UsageError(f"the noise's standard deviation must be a number, 0 or more; got {self.std}")

    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        """`hidden + std * normals`, computed in float32."""
        if self.std == 0:
            return hidden
        drawn = normals().to(hidden.device)
        return (hidden.float() + self.std * drawn).to(hidden.dtype)


@dataclass(frozen=True)
class RelativeGaussianNoise(Noise):
    """Gaussian noise whose standard deviation is `level` times the mean |h_A| of the model at hand.

    The mean is measured once, when the model is loaded, on a fixed public text (`measure_magnitude`), so the same level
    gives the same standard deviation for the same model and partition, whatever is said later.

    Raises
    ------
    UsageError
        If `level` is negative or not finite.
    """

    level: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.level) and self.level >= 0):
            raise UsageError(f"the noise level must be a number, 0 or more; got {self.level}")

    def calibrated(self, mean_magnitude: Callable[[], float]) -> Noise:
        """`GaussianNoise` with the standard deviation that this level means here."""
        return GaussianNoise(self.level * mean_magnitude())

    def apply(self, hidden: Tensor, normals: Callable[[], Tensor]) -> Tensor:
        """Not possible before `calibrated`."""
        raise UsageError("relative noise has to be calibrated to the model first: call .calibrated(mean |h_A|)")


class NoiseSource:
    """Standard normals that only this client can draw, the same for the same text.

    Parameters
    ----------
    mechanism
        The mechanism that will use them. It is part of the key: two mechanisms (or two strengths) never share draws, or
        else their difference would show the state.
    """

    def __init__(self, mechanism: Noise) -> None:
        self._key = hashlib.blake2b(repr(mechanism).encode(), key=secrets.token_bytes(32)).digest()

    def extend(self, digest: bytes, tokens: Sequence[int]) -> list[bytes]:
        """Digests of a text's prefixes that end at each of `tokens`, going on from `digest` (b"" for none)."""
        digests = []
        for token in tokens:
            data = digest + token.to_bytes(4, "little")
            digest = hashlib.blake2b(data, key=self._key, digest_size=DIGEST_BYTES).digest()
            digests.append(digest)
        return digests

    def normals(self, digests: Sequence[bytes], hidden_size: int) -> Tensor:
        """Standard normals for tokens given by their prefix digests: float32, `[tokens, hidden_size]`.

        By Box and Muller's transform of 32-bit uniforms, so no draw is further out than 6.66.
        """
        pairs = (hidden_size + 1) // 2
        out = torch.empty(len(digests), 2 * pairs)
        for first in range(0, len(digests), 256):  # bounds the memory of a long prompt
            some = digests[first : first + 256]
            stream = b"".join(hashlib.shake_256(self._key + digest).digest(8 * pairs) for digest in some)
            bits = np.frombuffer(stream, dtype="<u4").reshape(len(some), 2, pairs).astype(np.float64)
            uniform = torch.from_numpy((bits + 1) / 2**32)
            radius = torch.sqrt(-2 * torch.log(uniform[:, 0]))
            angle = 2 * math.pi * uniform[:, 1]
            out[first : first + len(some), :pairs] = radius * torch.cos(angle)
            out[first : first + len(some), pairs:] = radius * torch.sin(angle)
        return out[:, :hidden_size]
