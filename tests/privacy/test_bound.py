"""The bound on leakage: against channels whose information is known, decoders that are optimal, and its limits."""

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from fedsea.errors import UsageError
from fedsea.privacy import (
    Chain,
    Clip,
    GaussianNoise,
    Noise,
    Source,
    clipped_gaussian,
    estimated_bound,
    guaranteed_bound,
    language_source,
    privacy_spent,
    uniform_source,
)
from fedsea.privacy.bound import fano_accuracy, guess_accuracy, observed_capacity, power_capacity

STDS = [0.1, 0.3, 0.7, 1.0, 2.0, 10.0]


def draws(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def information(points: np.ndarray, weights: np.ndarray, std: float, step: float = 0.05) -> float:
    """Bits of mutual information of points `[points, 1 or 2]` in Gaussian noise, integrated on a grid."""
    reach = np.abs(points).max() + 7 * std
    axis = np.arange(-reach, reach, step * std)
    grid = np.stack(np.meshgrid(*[axis] * points.shape[1]), -1).reshape(-1, points.shape[1])
    cell = (step * std) ** points.shape[1]
    scale = (2 * math.pi * std**2) ** (points.shape[1] / 2)
    given = np.exp(-((grid[:, None] - points[None]) ** 2).sum(-1) / (2 * std**2)) / scale
    output = given @ weights
    noise = points.shape[1] / 2 * math.log2(2 * math.pi * math.e * std**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return -float(np.nansum(output * np.log2(output))) * cell - noise


def covariance_capacity(eigenvalues: np.ndarray, std: float) -> float:
    """Bits that states with a covariance of these eigenvalues carry at most (Cover and Thomas, chapter 9)."""
    return float(np.log2(1 + eigenvalues / std**2).sum() / 2)


def test_capacities_are_those_of_textbooks() -> None:
    assert power_capacity(1.0, 1.0, 1) == pytest.approx(0.5)
    assert power_capacity(15.0, 1.0, 1) == pytest.approx(2.0)
    assert power_capacity(15.0 * 8, 1.0, 8) == pytest.approx(16.0)
    assert power_capacity(1e-9, 1.0, 1000) == pytest.approx(1e-9 / 2 / math.log(2))


def test_no_noise_carries_everything_and_no_power_nothing() -> None:
    assert power_capacity(1.0, 0.0, 3) == math.inf
    assert power_capacity(0.0, 0.0, 3) == 0
    assert observed_capacity(torch.ones(5, 2), 0.0) == math.inf


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("seed", range(3))
def test_an_alphabet_in_two_dimensions_never_carries_more(std: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    points, weights = random.standard_normal((9, 2)) * [1.5, 0.3] + 0.2, random.dirichlet(np.ones(9))
    carried = information(points, weights, std, 0.1)
    mean = weights @ points
    covariance = (points - mean).T @ ((points - mean) * weights[:, None])
    of_covariance = covariance_capacity(np.linalg.eigvalsh(covariance), std)
    of_power = power_capacity(float(weights @ (points**2).sum(1)), std, 2)
    clip = float(np.linalg.norm(points, axis=1).max())
    guaranteed = guaranteed_bound(clipped_gaussian(clip, std), 2, uniform_source(9)).bits
    assert carried <= of_covariance + 1e-6
    assert of_covariance <= of_power <= guaranteed + 1e-12


@pytest.mark.parametrize("ratio", [0.3, 1.0, 3.0, 10.0])
def test_the_best_use_of_a_clipped_channel_carries_no_more(ratio: float) -> None:
    """Blahut and Arimoto's algorithm, on states of one number from -clip to clip."""
    inputs, outputs = np.linspace(-ratio, ratio, 61), np.linspace(-ratio - 6, ratio + 6, 600)
    given = np.exp(-((outputs[None] - inputs[:, None]) ** 2) / 2)
    given /= given.sum(1, keepdims=True)
    weights = np.full(61, 1 / 61)
    for _ in range(300):
        divergence = np.where(given > 0, given * np.log2(np.maximum(given, 1e-300) / (weights @ given)), 0).sum(1)
        weights = weights * 2**divergence
        weights /= weights.sum()
    capacity = float(weights @ divergence)
    bound = guaranteed_bound(clipped_gaussian(ratio, 1.0), 1, uniform_source(2)).bits
    assert 0.6 * bound < capacity <= bound


def test_more_looks_carry_what_they_carry_together() -> None:
    signal, std, source = np.array([[-1.0], [1.0]]), 1.3, uniform_source(2)
    noise = clipped_gaussian(1.0, std)
    twice = information(np.repeat(signal, 2, 1), np.array([0.5, 0.5]), std)  # the same state, seen in two dimensions
    assert twice == pytest.approx(information(signal, np.array([0.5, 0.5]), std / math.sqrt(2)), abs=1e-3)
    same = guaranteed_bound(noise, 1, source, looks=2)
    assert same.bits == pytest.approx(power_capacity(1.0, std / math.sqrt(2), 1))
    assert twice <= same.bits
    # Four corners of a square: each of two looks at states of their own tells another bit of the token.
    corners = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    moved = guaranteed_bound(noise, 1, uniform_source(4), looks=2, same_states=False)
    assert moved.bits == pytest.approx(2 * power_capacity(1.0, std, 1))
    assert same.bits < moved.bits
    assert information(corners, np.full(4, 0.25), std) <= moved.bits
    assert guaranteed_bound(noise, 1, source).bits == same.bits / math.log2(1 + 2 / std**2) * math.log2(1 + 1 / std**2)


@pytest.mark.parametrize("vocabulary", [2, 50, 49152])
def test_fanos_inequality_is_solved(vocabulary: int) -> None:
    full = math.log2(vocabulary)
    for remaining in np.linspace(0, full, 23)[1:-1]:
        error = 1 - fano_accuracy(remaining, vocabulary)
        coin = -error * math.log2(error) - (1 - error) * math.log2(1 - error)
        assert coin + error * math.log2(vocabulary - 1) == pytest.approx(remaining, rel=1e-6)
        # For uniform tokens the other bound is the same.
        assert guess_accuracy(full - remaining, 1 / vocabulary) == pytest.approx(1 - error, rel=1e-6)
    assert fano_accuracy(0.0, vocabulary) == 1
    assert fano_accuracy(full, vocabulary) == 1 / vocabulary
    assert guess_accuracy(full + 1e-9, 1 / vocabulary) == 1


def test_a_bound_by_guessing_begins_at_the_guess() -> None:
    assert guess_accuracy(0.0, 0.3) == pytest.approx(0.3)
    assert guess_accuracy(0.0, 1.0) == 1
    assert guess_accuracy(5.0, 0.0) == 0
    assert guess_accuracy(math.inf, 0.3) == 1
    assert 0.3 < guess_accuracy(0.1, 0.3) < guess_accuracy(0.5, 0.3) < 1


def best_decoder(clip: float, std: float, weights: np.ndarray, looks: int, trials: int = 20000) -> float:
    """How often a token is named by an attacker who knows every token's state, the noise and the source."""
    random = np.random.default_rng(1)
    book = random.standard_normal((len(weights), 8))
    book *= clip / np.linalg.norm(book, axis=1, keepdims=True)
    tokens = random.choice(len(weights), trials, p=weights)
    seen = book[tokens] + std * random.standard_normal((looks, trials, 8)).mean(0)
    score = seen @ book.T * looks / std**2 + np.log(weights)
    return float((score.argmax(1) == tokens).mean())


UNIFORM = np.full(64, 1 / 64)
ZIPF = 1 / np.arange(1, 65) / (1 / np.arange(1, 65)).sum()


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize(("weights", "looks"), [(UNIFORM, 1), (UNIFORM, 5), (ZIPF, 1)], ids=["once", "five", "zipf"])
def test_the_best_decoder_names_no_more_than_the_bound(std: float, weights: np.ndarray, looks: int) -> None:
    source = Source(float(-weights @ np.log2(weights)), float(weights.max()), 64, "drawn")
    bound = guaranteed_bound(clipped_gaussian(1.5, std), 8, source, looks)
    reached = best_decoder(1.5, std, weights, looks=looks)
    assert bound.guarantee
    assert reached <= bound.accuracy + 4 * math.sqrt(0.25 / 20000)
    # It is above what is guessed without looking, and the sharper of the two bounds counts.
    assert source.guess < bound.accuracy <= fano_accuracy(max(0.0, source.entropy - bound.bits), 64)


def test_little_noise_hides_nothing_and_much_noise_leaves_the_guess() -> None:
    uniform = uniform_source(49152)
    losses = torch.tensor([0.5, 3.0, 2.5])
    language = language_source(losses, 49152, torch.tensor([True, False, False]))
    likely = binomtest(1, 3).proportion_ci(method="wilson").high  # one of three says little
    for source, chance in ((uniform, 1 / 49152), (language, likely)):
        assert guaranteed_bound(clipped_gaussian(1.0, 0.0), 576, source).accuracy == 1
        assert guaranteed_bound(clipped_gaussian(1.0, 1e-3), 576, source).accuracy == 1
        lost = guaranteed_bound(clipped_gaussian(1.0, 1e9), 576, source)
        assert lost.accuracy == pytest.approx(chance, rel=1e-3)
        assert lost.bits == pytest.approx(0, abs=1e-12)
    assert language.entropy == pytest.approx(2.0 / math.log(2))  # nats to bits
    unknown = guaranteed_bound(clipped_gaussian(1.0, 1e9), 576, language_source(losses, 49152))
    assert likely < unknown.accuracy < 1  # the guess is not known: Fano's inequality alone


def test_more_noise_less_clip_and_fewer_looks_leak_less() -> None:
    def accuracy(noise: Noise, looks: int = 1) -> float:
        return guaranteed_bound(noise, 64, uniform_source(1000), looks).accuracy

    middle = accuracy(clipped_gaussian(1.5, 1.0))
    assert accuracy(clipped_gaussian(1.5, 1.1)) < middle < accuracy(clipped_gaussian(1.6, 1.0))
    assert middle < accuracy(clipped_gaussian(1.5, 1.0), 2) < accuracy(clipped_gaussian(1.5, 1.0), 3)


@pytest.mark.parametrize("count", [60, 300, 4000])
def test_an_estimate_is_not_too_small_however_few_states_there_are(count: int) -> None:
    size, std = 120, 0.5
    scales = np.geomspace(3, 0.01, size)
    true = covariance_capacity(scales**2, std)
    sample = draws(count, size) * scales + 2.0
    estimate = observed_capacity(torch.from_numpy(sample), std)
    assert estimate > 0.98 * true
    assert estimate < (1.1 if count == 4000 else 2.5) * true
    plugged = covariance_capacity(np.linalg.eigvalsh(np.cov(sample.T)).clip(0), std)
    if count == 60:
        assert plugged < 0.9 * true  # what the plain covariance of a small sample says


def test_an_estimate_is_of_what_leaves_and_below_the_guarantee() -> None:
    states = torch.from_numpy(draws(500, 16) * np.geomspace(5, 0.1, 16))
    source = uniform_source(1000)
    noise = clipped_gaussian(4.0, 1.0)
    clipped, free = estimated_bound(noise, states, source), estimated_bound(GaussianNoise(1.0), states, source)
    assert not clipped.guarantee
    assert clipped.bits < free.bits
    assert clipped.bits < guaranteed_bound(noise, 16, source).bits
    assert estimated_bound(Chain((Clip(4.0), GaussianNoise(1.0))), states, source) == clipped
    assert estimated_bound(Chain((GaussianNoise(1.0), Clip(4.0))), states, source) == free  # clipping after is no help
    halved = estimated_bound(clipped_gaussian(4.0, 0.5), states, source)
    assert estimated_bound(noise, states, source, 4).bits == pytest.approx(halved.bits)
    assert estimated_bound(noise, states, source, 4, same_states=False).bits == pytest.approx(4 * clipped.bits)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda: guaranteed_bound(GaussianNoise(1.0), 4, uniform_source(9)), "gaussian:std=1.0 guarantees nothing"),
        (lambda: guaranteed_bound(clipped_gaussian(1.0, 1.0), 4, uniform_source(9), 0), "once or more"),
        (lambda: estimated_bound(GaussianNoise(1.0), torch.ones(3, 4), uniform_source(9)), "four states or more"),
        (lambda: language_source(torch.tensor([1.0, math.nan]), 9), "finite numbers"),
        (lambda: language_source(torch.tensor([]), 9), "finite numbers"),
        (lambda: privacy_spent(GaussianNoise(1.0), delta=1e-5), "gaussian:std=1.0 has no epsilon"),
        (lambda: privacy_spent(clipped_gaussian(1.0, 1.0), delta=0.0), "between 0 and 1"),
        (lambda: privacy_spent(clipped_gaussian(1.0, 1.0), delta=1e-5, releases=0), "one release or more"),
    ],
)
def test_what_cannot_be_said_is_one_line(ask: Callable[[], object], says: str) -> None:
    with pytest.raises(UsageError, match=says) as raised:
        ask()
    assert "\n" not in str(raised.value)


def delta_of(epsilon: float, distance: float) -> float:
    """By definition: the integral of what one Gaussian has above `exp(epsilon)` times another, to 50 digits."""
    with mpmath.workdps(50):
        mean, factor = mpmath.mpf(distance), mpmath.exp(epsilon)
        crossing = mean / 2 - epsilon / mean
        steps = [min(-40, crossing - 40), *[crossing - away for away in (20, 8, 4, 2, 1)], crossing]
        return float(mpmath.quad(lambda x: mpmath.npdf(x) - factor * mpmath.npdf(x - mean), steps))


@pytest.mark.parametrize("delta", [1e-5, 1e-9])
@pytest.mark.parametrize("releases", [1, 100, 10000])
@pytest.mark.parametrize("multiplier", [0.05, 1.0, 30.0, 500.0])
def test_epsilon_is_exact(multiplier: float, releases: int, delta: float) -> None:
    noise = clipped_gaussian(clip=2.0, std=4.0 * multiplier)  # sensitivity 2 * clip
    spent = privacy_spent(noise, delta=delta, releases=releases)
    # Gaussian releases compose to one whose sensitivity is larger by the root of their number.
    assert delta_of(spent.epsilon, math.sqrt(releases) / multiplier) == pytest.approx(delta, rel=1e-9)
    assert (spent.delta, spent.releases) == (delta, releases)


def test_epsilon_is_infinite_without_noise_and_falls_with_it() -> None:
    assert privacy_spent(clipped_gaussian(1.0, 0.0), delta=1e-5).epsilon == math.inf
    spent = privacy_spent(clipped_gaussian(1.0, 2.0), delta=1e-5)
    assert privacy_spent(clipped_gaussian(1.0, 4.0), delta=1e-5).epsilon < spent.epsilon
    assert privacy_spent(clipped_gaussian(1.0, 1e9), delta=1e-5).epsilon == 0  # two states are told apart less often
