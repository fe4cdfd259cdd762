"""The draws that noise is made of.

Noise is only worth as much as its secrecy and its freshness, so the standard normals come from `NoiseSource`:

- Its secret is 32 bytes from the operating system, never derived from a configured seed, and never leaves.
- The stream is SHAKE-256 keyed with the secret: a cryptographic generator. torch's own generator keeps 32 bits of its
  seed; whoever knows one token of a text (a chat template's first, say) could try them all and subtract the rest.
- The draw for a token depends on the secret and on the text up to that token, and on nothing else. The same state sent
  again (a retry, a replay after a lost connection, a beam's twin row, generation without a cache, the same question
  asked anew) carries the same noise, so a server that sees it a hundred times has nothing to average.
"""

import hashlib
import math
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedsea.privacy.mechanism import Noise

DIGEST_BYTES = 16


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
