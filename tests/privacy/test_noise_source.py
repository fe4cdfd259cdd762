"""The draws of noise: their distribution, their secrecy, and that a state has the same ones each time."""

import copy
import math

import torch

from fedsea import GaussianNoise
from fedsea.privacy import NoiseSource


def standard_normal_cdf(values: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(values / math.sqrt(2)))


def test_draws_are_standard_normal_and_independent() -> None:
    source = NoiseSource(GaussianNoise(1.0))
    digests = source.extend(b"", range(400))
    draws = source.normals(digests, 577)  # an odd size: half of the last pair is left over
    flat, _ = draws.double().flatten().sort()
    count = len(flat)
    distance = (standard_normal_cdf(flat) - torch.arange(1, count + 1) / count).abs().max()
    assert distance < 3.0 / math.sqrt(count)  # Kolmogorov and Smirnov: once in 30 million times
    correlation = torch.corrcoef(draws.double())
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 7.5 / math.sqrt(577)  # of 80,000: once in 100 million times


def test_the_same_text_has_the_same_noise_and_any_other_text_another() -> None:
    source = NoiseSource(GaussianNoise(1.0))
    first, again, other = (source.extend(b"", text) for text in ([5, 6, 7], [5, 6, 7], [4, 6, 7]))
    assert torch.equal(source.normals(first, 64), source.normals(again, 64))
    assert source.extend(source.extend(b"", [5])[-1], [6, 7]) == first[1:]
    assert not set(first) & set(other)  # the later tokens are equal, what came before is not
    drawn = torch.cat([source.normals(first, 64), source.normals(other, 64)])
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.75  # 6 sigma and more; equal draws have 1


def test_no_two_sources_agree_no_seed_reaches_them_and_a_copy_has_its_secret() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        source = NoiseSource(GaussianNoise(1.0))
        draws.append(source.normals(source.extend(b"", [1, 2, 3]), 64))
        again = copy.deepcopy(source)
        assert torch.equal(again.normals(again.extend(b"", [1, 2, 3]), 64), draws[-1])
    assert not torch.equal(*draws)
