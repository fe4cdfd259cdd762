"""What happens to hidden states before they leave the client."""

from fedsea.privacy.noise import GaussianNoise, Noise, NoiseSource, RelativeGaussianNoise

__all__ = ["GaussianNoise", "Noise", "NoiseSource", "RelativeGaussianNoise"]
