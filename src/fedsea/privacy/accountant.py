"""Local differential privacy of clipped states with Gaussian noise on them.

Any two states of norm at most `clip` are at most `2 * clip` apart. Gaussian noise on one of them therefore makes the
release (epsilon, delta)-indistinguishable from that of any other state: local differential privacy of one state, under
replacement. A text of `n` tokens is `n` releases, and every further look with fresh noise (another process; in training
every step of the input blocks' adapter) is `n` more: they compose. The composition is that of Opacus's accountant
(Renyi divergences), an upper bound.

The numbers are printed as they come out, however large: at noise that leaves a language model of use, they are large.
They hold in exact arithmetic. What is noised is rounded so that its last bits tell nothing of how it came about
(`fedsea.privacy.mechanisms.gaussian.on_grid`); draws of this package end at 6.66 standard deviations, or at 7.5
(see `NoiseSource.normals`), which `delta` does not count.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np

from fedsea.errors import UsageError
from fedsea.extras import install_line
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
    """The local differential privacy of states that leave through a mechanism.

    Parameters
    ----------
    noise
        The mechanism, calibrated; it clips before it adds noise.
    delta
        Between 0 and 1.
    releases
        How many states, each with fresh noise: 1 for one state of one text, tokens times looks for a text.

    Raises
    ------
    UsageError
        If nothing bounds the states, `delta` or `releases` cannot be used, or the accountant is not installed.
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations within Opacus are not the user's
            from opacus.accountants.analysis import rdp
    except ImportError:
        raise UsageError(f"epsilon needs an accountant; install it by: {install_line('opacus')}") from None
    multiplier = channel.std / (2 * channel.clip)
    # The best order is near this one, as Renyi divergences of Gaussians are linear in the order.
    best = multiplier * math.sqrt(2 * math.log(1 / delta) / releases)
    orders = 1 + best * np.geomspace(0.05, 20, 2001)
    spent = rdp.compute_rdp(q=1.0, noise_multiplier=multiplier, steps=releases, orders=orders)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where the best order is at an end, the bound still holds
        epsilon, _order = rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)
    return PrivacySpent(max(0.0, float(epsilon)), delta, releases)
