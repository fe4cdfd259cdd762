"""What happens to hidden states before they leave the client, and what that is worth."""

from fedsea.privacy.adaptive import AdaptiveGaussianNoise
from fedsea.privacy.clipped import Clip, ClippedGaussianNoise, RelativeClip, RelativeClippedGaussianNoise
from fedsea.privacy.compose import Chain
from fedsea.privacy.gaussian import GaussianNoise
from fedsea.privacy.ledger import LookLedger
from fedsea.privacy.mechanism import Channel, Magnitude, Noise
from fedsea.privacy.narrow import NarrowCut
from fedsea.privacy.parse import parse_mechanism
from fedsea.privacy.relative import RelativeGaussianNoise
from fedsea.privacy.source import NoiseSource

__all__ = [
    "AdaptiveGaussianNoise",
    "Chain",
    "Channel",
    "Clip",
    "ClippedGaussianNoise",
    "GaussianNoise",
    "LookLedger",
    "Magnitude",
    "NarrowCut",
    "Noise",
    "NoiseSource",
    "RelativeClip",
    "RelativeClippedGaussianNoise",
    "RelativeGaussianNoise",
    "parse_mechanism",
]
