"""The draws that noise is made of.

- The secret is 32 bytes from the operating system, never derived from a configured seed, and never leaves.
- The stream is SHAKE-256 keyed with the secret: a cryptographic generator. torch's own keeps 32 bits of its seed; an
  attacker who knows one token of a text (a chat template's first, say) could try them all and subtract the rest.
- The draw for a token depends on the secret, the mechanism, the text up to that token and what else the state was made
  of (`fedsea.client.origin` says what that is), and on nothing else: nothing counts changes. The same state sent again
  (a retry, a replay, a beam's twin row, generation without a cache) carries the same noise, so there is nothing to
  average. Another state of the same text has noise of its own, so the difference of the two shows neither.
- Where states are rounded coarsely, as in 16 bits, one text computed in two ways (token by token, or as a whole) has
  states that differ by a last place, which is no small part of them: under one draw the difference would leave without
  noise, and it names tokens. A draw for each of them would be a further look. So an eighth of the noise's standard
  deviation is drawn by the state itself. It hides such differences, and averaging them away takes off no more than
  that: 1.6 % of the variance.

With no input layers a state depends on its token alone, and its draw on the text before it as well. So equal tokens of
a text are several looks at one state, which the bounds count. One draw for each token would be worse: the same numbers
wherever a token stands are a cipher of the language, which no bound covers.
"""

import copy
import hashlib
import math
import secrets
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fedsea.privacy.mechanism import Noise

DIGEST_BYTES = 16
OF_STATE = 1 / 8  # of the noise's standard deviation, where the state itself is part of the key


class NoiseSource:
    """Standard normals that only this client can draw, the same for the same text and whatever else a state is made of.

    A copy has the same secret: where its states are the same there is one look, where they differ the draws do. The
    mechanism that uses the draws is part of the key: if two mechanisms (or strengths) shared one, their difference
    would show the state.
    """

    def __init__(self, mechanism: Noise) -> None:
        self._secret = secrets.token_bytes(32)
        self._mechanism, self._key = mechanism, _key(mechanism, self._secret)

    def under(self, mechanism: Noise) -> Self:
        """The same source for another mechanism: it has draws of its own, and the same ones each time."""
        if mechanism is self._mechanism:
            return self
        other = copy.copy(self)
        other._mechanism, other._key = mechanism, _key(mechanism, self._secret)
        return other

    def extend(self, digest: bytes, tokens: Sequence[int], made: Sequence[bytes] | None = None) -> list[bytes]:
        """Digests of a text's prefixes that end at each of `tokens`, going on from `digest` (b"" for none).

        `made` has for each token what else its state was made of; None where the text is all.
        """
        digests = []
        for token, more in zip(tokens, made if made is not None else [b""] * len(tokens), strict=True):
            data = digest + token.to_bytes(4, "little") + more
            digest = hashlib.blake2b(data, key=self._key, digest_size=DIGEST_BYTES).digest()
            digests.append(digest)
        return digests

    def normals(self, digests: Sequence[bytes], hidden_size: int, states: Sequence[bytes] | None = None) -> Tensor:
        """Standard normals for tokens given by their prefix digests: float32, `[tokens, hidden_size]`.

        By Box and Muller's transform of 32-bit uniforms, so no draw is further out than 6.66, or 7.5 with `states`: the
        bytes of each state, where states of one digest may differ by coarse rounding.
        """
        if states is not None:
            owns = [
                hashlib.blake2b(digest + state, key=self._key, digest_size=DIGEST_BYTES, person=b"of a state").digest()
                for digest, state in zip(digests, states, strict=True)
            ]
            common, own = self.normals(digests, hidden_size), self.normals(owns, hidden_size)
            return math.sqrt(1 - OF_STATE**2) * common + OF_STATE * own
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

    def __copy__(self) -> Self:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("the secret of a model's noise is not written anywhere; load the model anew instead")


def _key(mechanism: Noise, secret: bytes) -> bytes:
    return hashlib.blake2b(repr(mechanism).encode(), key=secret).digest()
