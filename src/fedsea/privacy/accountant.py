"""Local differential privacy of clipped states with Gaussian noise on them.

Any two states of norm at most `clip` are at most `2 * clip` apart, so Gaussian noise makes the release of one
(epsilon, delta)-indistinguishable from that of any other. A text of `n` tokens is `n` releases, and every further look
with fresh noise (another process; in training every step of the input blocks' adapter) is `n` more.

The composition is exact. `n` Gaussian releases are as one whose states are `mu = sqrt(n) * 2 * clip / std` standard
deviations apart, and for that (Balle and Wang, Improving the Gaussian Mechanism for Differential Privacy, ICML 2018,
theorem 8)

    delta = Phi(mu / 2 - epsilon / mu) - exp(epsilon) * Phi(-mu / 2 - epsilon / mu).

It holds in exact arithmetic. What is noised is rounded so that its last bits tell nothing of how it came about
(`fedsea.privacy.mechanisms.gaussian.on_grid`); draws end at 6.66 standard deviations, or at 7.5
(`NoiseSource.normals`), which `delta` does not count.
"""

import math
from dataclasses import dataclass

import torch

from fedsea.errors import UsageError
from fedsea.privacy.bound import bisect
from fedsea.privacy.mechanism import Noise


@dataclass(frozen=True)
class PrivacySpent:
    """Local differential privacy, under replacement of every state by any other.

    Attributes
    ----------
    epsilon
        Natural logarithm of how much likelier a release can be than that of other states; infinite without noise.
    delta
        With which probability that may fail.
    releases
        Of how many states this is the composition.
    """

    epsilon: float
    delta: float
    releases: int


def privacy_spent(noise: Noise, *, delta: float, releases: int = 1) -> PrivacySpent:
    """The local differential privacy of states that leave through a calibrated mechanism that clips.

    Parameters
    ----------
    delta
        Between 0 and 1.
    releases
        How many states, each with fresh noise: 1 for one state of one text, tokens times looks for a text.

    Raises
    ------
    UsageError
        If nothing bounds the states before the noise, or `delta` or `releases` cannot be used.
    """
    channel = noise.channel
    if math.isinf(channel.clip):
        raise UsageError(f"{noise} has no epsilon: states are not bounded before noise; clip first")
    if not 0 < delta < 1:
        raise UsageError(f"delta must be a number between 0 and 1; got {delta}")
    if releases < 1:
        raise UsageError(f"there must be one release or more; got {releases}")
    if channel.std == 0:
        return PrivacySpent(math.inf, delta, releases)
    distance = math.sqrt(releases) * 2 * channel.clip / channel.std
    # Phi(-t) is at most exp(-t^2 / 2), so that delta holds where the first term's argument is -t.
    most = distance**2 / 2 + distance * math.sqrt(2 * math.log(1 / delta))
    few = _delta(0.0, distance) <= delta
    epsilon = 0.0 if few else bisect(lambda one: _delta(one, distance) > delta, 0.0, most)[1]
    return PrivacySpent(epsilon, delta, releases)


def _delta(epsilon: float, distance: float) -> float:
    """The formula above, with exp(epsilon) taken into the scaled complementary error function."""
    first, second = distance / 2 - epsilon / distance, distance / 2 + epsilon / distance
    tails = torch.tensor([-first, second], dtype=torch.float64) / math.sqrt(2)
    if first > 0:  # where the scaled function would overflow
        return float(torch.erfc(tails[0]) - math.exp(-(first**2) / 2) * torch.special.erfcx(tails[1])) / 2
    near, far = torch.special.erfcx(tails).tolist()
    return float(math.exp(-(first**2) / 2) * (near - far) / 2)
