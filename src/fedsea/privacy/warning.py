"""What each configuration is known to leak, in one line that its user sees."""

from collections.abc import Callable

from fedsea.partition import Partition
from fedsea.privacy.mechanism import Magnitude, Noise

# Measured on SmolLM2-135M (docs/trust.md): a search still names about half of the tokens at this multiple of the mean
# |h_A|. What a search can tell apart grows with the square root of a state's size, and so does this.
WEAK_LEVEL, WEAK_SIZE = 10.0, 576


def leak_warning(noise: Noise, partition: Partition, hidden_size: int, measure: Callable[[], Magnitude]) -> str:
    """Why a configuration is known to let the provider read the text or the answer: one line.

    `noise` is calibrated; `measure` measures the model's states (`measure_magnitude`), and is called only if needed.
    """
    channel = noise.channel
    if channel.std == 0:
        return "without noise, a provider who knows the public weights can read this text"
    if partition.input_layers == 0:
        return "with no input layer each state is one token's own, and is looked up in the public embedding"
    magnitude = measure()
    level = channel.std / (magnitude.mean * min(1.0, channel.clip / magnitude.norm))
    if level < WEAK_LEVEL * (hidden_size / WEAK_SIZE) ** 0.5:
        return f"noise of {level:.3g} x the mean |h_A| is weak: a search with the public weights is likely to read much"
    return "noise on what leaves hides no answer: a provider who knows the public weights can read it"
