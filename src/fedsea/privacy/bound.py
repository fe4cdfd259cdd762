"""How much of a text can be read from noised states, whatever the attack: bits a token, and accuracy.

A state `h` (`d` numbers) leaves as `h + noise`, the noise Gaussian with standard deviation `s` on every element. What
that tells of `h`, and so of the text that made it, is the mutual information of a Gaussian channel. It is at most:

- From the power (`power_capacity`): `d/2 * log2(1 + P / (d s^2))` bits, where `P` is the mean squared norm of `h`. It
  holds for every distribution of that power. A state clipped to norm `c` has `P <= c^2`, for every text: a guarantee.
- From a sample (`observed_capacity`): the mean over `h` of `KL(P(Y | h), Q)`, for any distribution `Q` of the output.
  `Q` is a Gaussian fitted to one half of the sample, and the mean is over the other: an estimate that does not come out
  too small for want of states, as one from the sample's covariance would.

A text of `n` states tells at most `n` times as much, whatever hangs together in it, and also where the next token is
chosen after an answer (feedback does not widen such a channel). What the provider computes from the states, `h_B` among
it, adds nothing. What it is sent beside them is not covered: gradients in training, lengths and timing.

From bits to accuracy: an attacker who is to name each token of a text from a source of `H` bits a token lacks `H - C`
of them at least (`C` being what the channel carries). `fano_accuracy` and `guess_accuracy` each say how often it can be
right then; both hold, so the smaller counts.

The source is an assumption. For uniform tokens (keys, numbers, names that cannot be guessed) nothing has to be
believed. Real text is easier to guess: a language model's cross entropy stands for its `H` only as far as the model is
the best guesser there is. So a bound on bits can be a guarantee, one on the accuracy of naming real text cannot.

Sources: Cover and Thomas, Elements of Information Theory, chapters 2 (Fano), 9 (Gaussian channels, feedback) and 13
(the bound by an output distribution).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsea.errors import UsageError
from fedsea.privacy.mechanism import Noise
from fedsea.privacy.mechanisms.clip import clip_norms

HALVINGS = 200  # more than float64 can tell apart


@dataclass(frozen=True)
class Source:
    """What an attacker knows of a text before it sees any state.

    Attributes
    ----------
    entropy
        Bits a token.
    guess
        How often the best guess is right, in [0, 1], given all tokens before; 1 if it is not known.
    vocabulary
        Tokens that there are.
    name
        In words.
    """

    entropy: float
    guess: float
    vocabulary: int
    name: str


def uniform_source(vocabulary: int) -> Source:
    """Tokens drawn uniformly: nothing is known of the text."""
    return Source(math.log2(vocabulary), 1 / vocabulary, vocabulary, "uniform tokens")


def language_source(cross_entropy: Tensor, vocabulary: int, right: Tensor | None = None) -> Source:
    """Text as a language model sees it.

    Parameters
    ----------
    cross_entropy
        Of each token given those before it, nats, `[tokens]`.
    vocabulary
        Tokens that there are.
    right
        Whether the model's first choice was the token, bool, `[tokens]`; None if that is not known. How often it is
        right is estimated by the upper end of Wilson's 95 % interval: few tokens prove little.

    Raises
    ------
    UsageError
        If there is no token, or an entropy is negative or not finite.
    """
    values = cross_entropy.double()
    if len(values) == 0 or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise UsageError("a text's cross entropies must be finite numbers, 0 or more, one a token; measure them anew")
    guess = 1.0 if right is None else _at_most(int(right.sum()), len(right))
    entropy = min(float(values.mean()) / math.log(2), math.log2(vocabulary))  # no source has more
    return Source(entropy, guess, vocabulary, "text as the language model sees it")


def _at_most(hits: int, tries: int, deviations: float = 1.96) -> float:
    """Upper end of Wilson's score interval of a share."""
    share, spread = hits / tries, deviations**2 / tries
    return (share + spread / 2 + math.sqrt(share * (1 - share) * spread + spread**2 / 4)) / (1 + spread)


@dataclass(frozen=True)
class LeakageBound:
    """What any attacker can read from the states of a text.

    Attributes
    ----------
    bits
        That the states of a token carry at most; infinite without noise.
    guarantee
        True if that holds for every text, as states are clipped; False if it is estimated from a sample of states.
    looks
        How often each token's state is seen, with fresh noise each time.
    source
        What the attacker knows of the text beforehand.
    """

    bits: float
    guarantee: bool
    looks: int
    source: Source

    @property
    def accuracy(self) -> float:
        """The largest share of tokens that any attacker can name, in [0, 1], on average over texts of the source."""
        remaining = max(0.0, self.source.entropy - self.bits)
        return min(fano_accuracy(remaining, self.source.vocabulary), guess_accuracy(self.bits, self.source.guess))


def guaranteed_bound(
    noise: Noise, hidden_size: int, source: Source, looks: int = 1, *, same_states: bool = True
) -> LeakageBound:
    """What any attacker can read, for every text.

    Parameters
    ----------
    noise
        The mechanism, calibrated; it clips before it adds noise.
    hidden_size
        Numbers in a state of the model. With a narrow cut only those count that it leaves.
    looks
        How often each token's state is seen with fresh noise: 1 if a text is sent from one process, with the same
        weights, however often. More for further processes and, in training, for steps of the input blocks' adapter.
    same_states
        Whether the looks are at the same states (further processes): their mean has variance `s^2 / looks`. Else (the
        adapter has moved) each look may tell something of its own, and the bits add up.

    Raises
    ------
    UsageError
        If nothing bounds the states, or `looks` is not positive.
    """
    clip, width = noise.channel.clip, noise.channel.width or hidden_size
    if math.isinf(clip):
        raise UsageError(f"{noise} guarantees nothing: states are not bounded before noise; clip first")
    bits = _of_looks(lambda std: power_capacity(clip**2, std, width), noise, looks, same_states=same_states)
    return LeakageBound(bits, True, looks, source)


def estimated_bound(
    noise: Noise, states: Tensor, source: Source, looks: int = 1, *, same_states: bool = True
) -> LeakageBound:
    """What any attacker can read of texts like those of a sample; `source`, `looks`, `same_states` as above.

    Parameters
    ----------
    noise
        The mechanism, calibrated; with a clip or without.
    states
        A sample of `h_A` before the mechanism, `[tokens, hidden]`, in the order of the text; with a narrow cut what
        that leaves of it, `[tokens, width]`. Leave the first position of a text out: it is an outlier in most models.

    Raises
    ------
    UsageError
        If there are fewer than four states, they are not of the mechanism's width, or `looks` is not positive.
    """
    clip, width = noise.channel.clip, noise.channel.width
    if width is not None and states.shape[1] != width:
        raise UsageError(f"{noise} sends {width} numbers a state; project the sample, it has {states.shape[1]}")
    clipped = clip_norms(states.double(), clip) if math.isfinite(clip) else states
    bits = _of_looks(lambda std: observed_capacity(clipped, std), noise, looks, same_states=same_states)
    return LeakageBound(bits, False, looks, source)


def _of_looks(capacity: Callable[[float], float], noise: Noise, looks: int, *, same_states: bool) -> float:
    if looks < 1:
        raise UsageError(f"a state is looked at once or more; got {looks}")
    std = noise.channel.std
    return capacity(std / math.sqrt(looks)) if same_states else looks * capacity(std)


def power_capacity(power: float, std: float, dimensions: int) -> float:
    """Bits that states of `dimensions` numbers carry at most; `power` is their mean squared norm."""
    if power == 0:
        return 0.0
    if std == 0:
        return math.inf
    return dimensions / 2 * math.log1p(power / (dimensions * std**2)) / math.log(2)


def observed_capacity(states: Tensor, std: float) -> float:
    """Bits that states `[tokens, hidden]`, in the order of the text, carry at most, estimated; infinite without noise.

    Each half of the sample is coded with a Gaussian fitted to the other half. Its covariance is drawn towards equal
    variance everywhere, the more so the fewer states there are. Never above `power_capacity`.
    """
    if len(states) < 4:
        raise UsageError(f"a bound is estimated from four states or more, and much better from many; got {len(states)}")
    if std == 0:
        return math.inf
    sample = states.double().cpu().numpy() / std
    half = len(sample) // 2
    halves = sample[:half], sample[half:]
    nats = (_coding_nats(*halves) * (len(sample) - half) + _coding_nats(*reversed(halves)) * half) / len(sample)
    power = float((sample**2).sum(1).mean())
    return min(max(0.0, nats / math.log(2)), power_capacity(power, 1.0, sample.shape[1]))


def _coding_nats(fitted: NDArray[np.float64], coded: NDArray[np.float64]) -> float:
    """Mean over the states `coded` of KL(N(state, 1), Q), with Q the Gaussian of noised states like `fitted`."""
    count, size = fitted.shape
    mean = fitted.mean(0)
    _left, values, directions = np.linalg.svd(fitted - mean, full_matrices=False)
    variances = values**2 / count
    share = size / (size + count)
    even = variances.sum() / size * share
    inside = 1 + (1 - share) * variances + even  # variances of Q in the directions that `fitted` has
    outside = 1 + even  # and in all others
    centred = coded - mean
    along = ((centred @ directions.T) ** 2).mean(0)
    across = max(0.0, float((centred**2).sum(1).mean() - along.sum()))
    rest = size - len(variances)
    logs = np.log(inside).sum() + rest * math.log(outside)
    traces = ((1 + along) / inside).sum() + (rest + across) / outside
    return float(logs + traces - size) / 2


def fano_accuracy(remaining: float, vocabulary: int) -> float:
    """The largest accuracy, in [0, 1], of who lacks `remaining` bits a token, of `vocabulary` tokens.

    By Fano's inequality: of an error `e` the entropy of a coin and `e * log2(vocabulary - 1)` sum up to that at least.
    """
    if remaining >= math.log2(vocabulary):
        return 1 / vocabulary

    def lacking(error: float) -> float:
        coin = -sum(one * math.log2(one) for one in (error, 1 - error) if one > 0)
        return coin + error * math.log2(vocabulary - 1)

    most = 1 - 1 / vocabulary  # the error of guessing; lacking() rises up to there
    return 1 - bisect(lambda error: lacking(error) < remaining, 0.0, most)[0]


def guess_accuracy(bits: float, guess: float) -> float:
    """The largest accuracy, in [0, 1], of who learns `bits` a token, and guesses right `guess` of the time without.

    The relative entropy of the two is at most `bits`, by the data-processing inequality.
    """
    if guess >= 1 or math.isinf(bits):
        return 1.0
    if guess <= 0:  # what no guess ever finds: the relative entropy is infinite
        return 0.0

    def learnt(accuracy: float) -> float:
        against = accuracy * math.log2(accuracy / guess)
        return against + ((1 - accuracy) * math.log2((1 - accuracy) / (1 - guess)) if accuracy < 1 else 0.0)

    return 1.0 if learnt(1.0) <= bits else bisect(lambda accuracy: learnt(accuracy) <= bits, guess, 1.0)[0]


def bisect(holds: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Where a condition that holds at `low` ceases to hold: the last number where it does, the first where not."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high
