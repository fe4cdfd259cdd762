"""What no attacker gets past: the bound for texts like those of an audit, and the mechanism's epsilon."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsea.audit.knowledge import Knowledge
from fedsea.errors import UsageError
from fedsea.parts import Rows
from fedsea.privacy import (
    PrivacySpent,
    Source,
    estimated_bound,
    guaranteed_bound,
    language_source,
    privacy_spent,
    uniform_source,
)

DELTA = 1e-6
FEWEST_STATES = 4


@dataclass(frozen=True)
class Limit:
    """The most that any attack can read of one kind of text."""

    source: str  # what kind of text
    guessable: bool  # whether it is text as a language model sees it, or tokens that cannot be guessed
    bits: float  # that the states of a token carry at most; infinite without noise
    bits_guaranteed: bool  # whether that holds for every text, as states are clipped; else it is an estimate
    accuracy: float  # largest share of tokens that can be named, in [0, 1]; 1 rules nothing out
    accuracy_guaranteed: bool  # for tokens that cannot be guessed only


@dataclass(frozen=True)
class Limits:
    """Limits on what attackers can read, the widest sense first."""

    limits: tuple[Limit, ...]  # for each kind of text, guarantees before estimates
    observations: int  # of each state, with fresh noise each time
    state: PrivacySpent | None  # local differential privacy of one token's state
    text: PrivacySpent | None  # and of the longest text as a whole
    no_epsilon: str  # why there is neither; empty if there is

    @property
    def of_text(self) -> Limit | None:
        """The smallest accuracy for text as the language model sees it: always an estimate."""
        return min((one for one in self.limits if one.guessable), key=lambda one: one.accuracy, default=None)

    @property
    def any_attacker(self) -> float | None:
        """The largest share of such a text's tokens that any attack reads, an estimate; None if texts are too short."""
        return None if self.of_text is None else self.of_text.accuracy


def find_limits(
    knowledge: Knowledge,
    texts: Sequence[tuple[int, ...]],
    *,
    known: int = 1,
    observations: int = 1,
    same_states: bool = True,
) -> Limits:
    """The limits for texts like these, whose first `known` tokens (one at least) are not to be guessed.

    The estimate is made from their states, without a client's adapter. Each was observed `observations` times at most:
    at the same states, from several processes, or else (training) at states that change in between.
    """
    of_state = observations
    if not knowledge.shared.partition.input_layers:
        # A state is its token's then, and every place that has the token is an observation with noise of its own.
        # (Of a text, all these places are counted anyway.)
        of_state *= max(Counter(token for text in texts for token in text).values())
    states = torch.cat([_states(knowledge, text) for text in texts])
    clipped = knowledge.noise.channel.clip != float("inf")
    limits = []
    for place, source in enumerate(_sources(knowledge, texts, known)):
        bounds, guessable = [], place > 0
        if clipped:
            hidden: int = knowledge.shared.checkpoint.config.hidden_size
            bounds.append(guaranteed_bound(knowledge.noise, hidden, source, of_state, same_states=same_states))
        if len(states) >= FEWEST_STATES:
            bounds.append(estimated_bound(knowledge.noise, states, source, of_state, same_states=same_states))
        for one in bounds:
            certain = one.guarantee and not guessable
            limits.append(Limit(source.name, guessable, one.bits, one.guarantee, one.accuracy, certain))
    state = text = None
    no_epsilon = ""
    try:
        longest = max(map(len, texts))
        state = privacy_spent(knowledge.noise, delta=DELTA, releases=of_state)
        text = privacy_spent(knowledge.noise, delta=DELTA, releases=longest * observations)
    except UsageError as error:
        no_epsilon = str(error)
    return Limits(tuple(limits), of_state, state, text, no_epsilon)


def _sources(knowledge: Knowledge, texts: Sequence[tuple[int, ...]], known: int) -> list[Source]:
    """Tokens that cannot be guessed, and text as the public model sees it."""
    losses, right = [], []
    for text in texts:
        predicted, loss = knowledge.shared.predicted_by_context(text)
        losses.append(loss[known - 1 :])
        right += [guess == token for guess, token in zip(predicted.tokens[known:], text[known:], strict=True)]
    sources = [uniform_source(knowledge.vocabulary)]
    if right:
        sources.append(language_source(torch.cat(losses), knowledge.vocabulary, torch.tensor(right)))
    return sources


@torch.no_grad()
def _states(knowledge: Knowledge, text: Sequence[int]) -> Tensor:
    """`h_A` before the mechanism, without the first position, which is an outlier: `[tokens - 1, hidden]`."""
    ids = torch.tensor(list(text))
    states: Tensor = knowledge.input_blocks(ids, Rows((0,), (len(text),)), None)[1:]
    return states
