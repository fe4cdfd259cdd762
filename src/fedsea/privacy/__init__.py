"""What happens to hidden states before they leave the client, and what that is worth.

- `parse_mechanism` reads what users write. A mechanism (`Noise`) is one file in `mechanisms/`; `Chain` does several in
  turn. A relative one is calibrated to a model first, whose states `measure.measure_magnitude` measures (a module that
  is imported where a model is, so that a mechanism can be read, and found wrong, without one).
- `NoiseSource` gives the draws: secret, and the same again for the same state.
- `LookLedger` counts how often a text leaves under fresh noise.
- `guaranteed_bound` and `estimated_bound` say how much of a text any attacker can read, `privacy_spent` gives the
  epsilon, and `leak_warning` says in one line what a configuration is known to leak.
"""

from fedsea.privacy.accountant import PrivacySpent, privacy_spent
from fedsea.privacy.bound import (
    LeakageBound,
    Source,
    estimated_bound,
    guaranteed_bound,
    language_source,
    uniform_source,
)
from fedsea.privacy.chain import Chain
from fedsea.privacy.ledger import LookLedger
from fedsea.privacy.mechanism import FORMS, Channel, Magnitude, Noise, Unit
from fedsea.privacy.mechanisms.adaptive import AdaptiveGaussianNoise, adaptive_part
from fedsea.privacy.mechanisms.clip import Clip, clip_norms, clipped_gaussian, relative_clipped_gaussian
from fedsea.privacy.mechanisms.gaussian import GaussianNoise, RelativeGaussianNoise
from fedsea.privacy.mechanisms.narrow_cut import NarrowCut, taken_up
from fedsea.privacy.parse import parse_family, parse_mechanism, usage
from fedsea.privacy.source import DIGEST_BYTES, NoiseSource
from fedsea.privacy.warning import leak_warning

__all__ = [
    "DIGEST_BYTES",
    "FORMS",
    "AdaptiveGaussianNoise",
    "Chain",
    "Channel",
    "Clip",
    "GaussianNoise",
    "LeakageBound",
    "LookLedger",
    "Magnitude",
    "NarrowCut",
    "Noise",
    "NoiseSource",
    "PrivacySpent",
    "RelativeGaussianNoise",
    "Source",
    "Unit",
    "adaptive_part",
    "clip_norms",
    "clipped_gaussian",
    "estimated_bound",
    "guaranteed_bound",
    "language_source",
    "leak_warning",
    "parse_family",
    "parse_mechanism",
    "privacy_spent",
    "relative_clipped_gaussian",
    "taken_up",
    "uniform_source",
    "usage",
]
