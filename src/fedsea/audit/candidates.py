"""What A makes of each token that could come next: the tables and exact states that attackers search in.

Candidates for one position are run as siblings, each attending to the prefix and to itself only. So a layer runs
hundreds of them at once, and the prefix's keys and values are not copied for each.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fedsea.parts import InputBlocks, Rows
from fedsea.privacy import Noise

SIBLINGS = 256  # run at once: each attends over all of them, though all but itself are masked
TYPICAL_TOKENS = 16


class Prefix:
    """A text as far as it has been recovered, held in A's KV cache; its next position is where candidates stand."""

    def __init__(self, blocks: InputBlocks) -> None:
        self._blocks = blocks
        self._cache = blocks.new_cache()
        self._cache.begin(Rows((0,), (0,)))

    @property
    def length(self) -> int:
        """Tokens."""
        return self._cache.lengths[0]

    def copy(self) -> "Prefix":
        """One that goes on by itself."""
        other = Prefix(self._blocks)
        other._cache = self._cache.fork()
        return other

    @torch.no_grad()
    def extend(self, tokens: Sequence[int]) -> None:
        """Go on with tokens, at least one."""
        self._blocks(torch.tensor(list(tokens)), Rows((self.length,), (len(tokens),)), self._cache)

    @torch.no_grad()
    def states(self, tokens: Tensor) -> Tensor:
        """`h_A` of candidates (int64, `[candidates]`) at the next position, without noise: `[candidates, hidden]`."""
        return torch.cat([self._siblings(some) for some in tokens.split(SIBLINGS)])

    def _siblings(self, tokens: Tensor) -> Tensor:
        blocks, rows = self._blocks, Rows((self.length,), (len(tokens),), self.length + 1)
        states = blocks.run_layers(blocks.embed(tokens, rows), rows, self._cache, blocks.layers, siblings=True)
        return blocks.narrowed(states)


class Candidates:
    """Every token of the vocabulary, as A (float32) and a calibrated mechanism make it where its draws are 0.

    `context` is public text, at least `TYPICAL_TOKENS` tokens: what precedes the candidates in `typical`.
    """

    def __init__(self, blocks: InputBlocks, noise: Noise, context: Sequence[int]) -> None:
        self._blocks, self._noise, self._context = blocks, noise, context[:TYPICAL_TOKENS]
        self.vocabulary: int = blocks.config.vocab_size

    def prefix(self, tokens: Sequence[int] = ()) -> Prefix:
        """A prefix to search after."""
        prefix = Prefix(self._blocks)
        if tokens:
            prefix.extend(tokens)
        return prefix

    def expected(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        """What would be observed of candidates (int64, `[candidates]`) if all draws were 0: `[candidates, hidden]`."""
        return protected(prefix.states(tokens), self._noise)

    def _every(self, context: Sequence[int]) -> Tensor:
        return self.expected(self.prefix(context), torch.arange(self.vocabulary))

    @cached_property
    def alone(self) -> Tensor:
        """Of every token as a text's first, `[vocabulary, hidden]`: exact there, and a token without context elsewhere.

        A rotary embedding is relative, so a token that attends to itself alone is the same at every position.
        """
        return self._every(())

    @cached_property
    def typical(self) -> Tensor:
        """Of every token after some public text, `[vocabulary, hidden]`.

        Nearer to what a token is within a text than `alone`: attention has something to look at beside the token.
        """
        if not self._blocks.layers:
            return self.alone
        return self._every(self._context)

    @cached_property
    def squares(self) -> Tensor:
        """Squared length of each row of `typical`, `[vocabulary]`."""
        return self.typical.square().sum(1)


def protected(hidden: Tensor, noise: Noise) -> Tensor:
    """`[tokens, hidden]` as the mechanism sends it where its draws are 0."""
    exact = hidden.double()  # as it is before it is rounded
    return noise.apply(exact, lambda: torch.zeros_like(exact)).to(hidden.dtype)


def same_without_draws(one: Noise, other: Noise, hidden_size: int) -> bool:
    """Whether two mechanisms send the same where their draws are 0: they differ in the strength of noise at most.

    Tried on states of all lengths from 1e-4 to 1e6: a mechanism that bounds lengths shows where it does.
    """
    if one.width != other.width:
        return False
    directions = torch.randn(64, one.width or hidden_size, generator=torch.Generator().manual_seed(0))
    probes = torch.nn.functional.normalize(directions, dim=1) * torch.logspace(-4, 6, 64).unsqueeze(1)
    return torch.equal(protected(probes, one), protected(probes, other))
