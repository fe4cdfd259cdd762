"""What no attacker gets past: the bound for texts like those of an audit, and the mechanism's epsilon."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsea.audit.observation import Knowledge
from fedsea.errors import UsageError
from fedsea.parts import Rows
from fedsea.privacy.accountant import PrivacySpent, privacy_spent
from fedsea.privacy.bound import LeakageBound, estimated_bound, guaranteed_bound, language_source, uniform_source

DELTA = 1e-6
FEWEST_STATES = 4


@dataclass(frozen=True)
class Limit:
    """The most that anybody can read, whatever the attack, of one kind of text.

    Attributes
    ----------
    source
        What kind of text.
    guessable
        Whether it is text as a language model sees it, or tokens that nobody can guess.
    bits
        That the states of a token carry at most; infinite without noise.
    bits_guaranteed
        True if that holds for every text, as states are clipped; False if it is an estimate from the audited ones.
    accuracy
        Largest share of tokens that can be named, in [0, 1]; 1 rules nothing out.
    accuracy_guaranteed
        Whether that is a guarantee as well: for tokens that nobody can guess only.
    """

    source: str
    guessable: bool
    bits: float
    bits_guaranteed: bool
    accuracy: float
    accuracy_guaranteed: bool


@dataclass(frozen=True)
class Limits:
    """Limits on what attackers can read, the widest sense first.

    Attributes
    ----------
    limits
        For each kind of text, guarantees before estimates.
    looks
        How often each text was seen, with fresh noise each time.
    state, text
        Local differential privacy of one token's state, and of the longest of the texts as a whole; None if there is
        none.
    no_epsilon
        Why there is none; empty if there is.
    """

    limits: tuple[Limit, ...]
    looks: int
    state: PrivacySpent | None
    text: PrivacySpent | None
    no_epsilon: str

    @property
    def of_text(self) -> Limit | None:
        """The smallest accuracy for text as the language model sees it: always an estimate."""
        return min((one for one in self.limits if one.guessable), key=lambda one: one.accuracy, default=None)


def find_limits(
    knowledge: Knowledge,
    texts: Sequence[Sequence[int]],
    losses: Sequence[Tensor],
    right: Sequence[Tensor],
    looks: int,
    *,
    same_states: bool = True,
) -> Limits:
    """The limits for texts like these.

    Parameters
    ----------
    texts
        Tokens of each, with its answer. The estimate is made from their states, without a client's adapter.
    losses
        Cross entropy of each token but the first of each text, as the public model gives it, nats.
    right
        Whether the model's first choice was right there, bool.
    looks
        How often each text was seen, at most. With no input layers a token's state was seen as often as it stands in
        the texts, times this.
    same_states
        Whether looks are at the same states, from several processes; else (training) states change in between.
    """
    of_text = looks
    if not knowledge.partition.input_layers:
        # A state is its token's then, and every place that has the token is a look at it, with noise of its own.
        # (Of a text, all these places are counted anyway.)
        looks *= max(Counter(token for text in texts for token in text).values())
    hidden = knowledge.checkpoint.config.hidden_size
    vocabulary = knowledge.checkpoint.config.vocab_size
    states = torch.cat([_states(knowledge, text) for text in texts])
    sources = [uniform_source(vocabulary)]
    if sum(map(len, losses)):
        guesses = torch.cat(list(right))
        sources.append(language_source(torch.cat(list(losses)), vocabulary, guesses))
    clipped = knowledge.noise.channel.clip != float("inf")
    limits = []
    for source in sources:
        guessable = source is not sources[0]
        if clipped:
            bound = guaranteed_bound(knowledge.noise, hidden, source, looks, same_states=same_states)
            limits.append(_limit(bound, guessable=guessable))
        if len(states) >= FEWEST_STATES:
            bound = estimated_bound(knowledge.noise, states, source, looks, same_states=same_states)
            limits.append(_limit(bound, guessable=guessable))
    state = text = None
    no_epsilon = ""
    try:
        longest = max(map(len, texts))
        state = privacy_spent(knowledge.noise, delta=DELTA, releases=looks)
        text = privacy_spent(knowledge.noise, delta=DELTA, releases=longest * of_text)
    except UsageError as error:
        no_epsilon = str(error)
    return Limits(tuple(limits), looks, state, text, no_epsilon)


def _limit(bound: LeakageBound, *, guessable: bool) -> Limit:
    certain = bound.guarantee and not guessable
    return Limit(bound.source.name, guessable, bound.bits, bound.guarantee, bound.accuracy, certain)


@torch.inference_mode()
def _states(knowledge: Knowledge, text: Sequence[int]) -> Tensor:
    """`h_A` before the mechanism, without the first position, which is an outlier: `[tokens - 1, hidden]`."""
    ids = torch.tensor([list(text)])
    states: Tensor = knowledge.input_blocks(ids, Rows.uniform(1, 0, len(text)), None)[0, 1:]
    return states
