"""The draws of noise: their distribution, their secrecy, and that a state has the same ones each time."""

import math
from typing import Any

import torch

from fedsea import GaussianNoise
from fedsea.privacy import NoiseSource
from tests.conftest import RunningServer, connect
from tests.support.sent_states import by_position, capture


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


def test_no_two_sources_agree_and_no_seed_reaches_them() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        source = NoiseSource(GaussianNoise(1.0))
        draws.append(source.normals(source.extend(b"", [1, 2, 3]), 64))
    assert not torch.equal(*draws)


def test_no_noise_draws_nothing_and_changes_nothing() -> None:
    hidden = torch.randn(2, 3)

    def must_not_be_drawn() -> torch.Tensor:
        raise AssertionError

    assert GaussianNoise(0.0).apply(hidden, must_not_be_drawn) is hidden


def test_a_state_that_is_sent_again_carries_the_same_noise(tiny_server: RunningServer) -> None:
    ids = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    with connect(tiny_server, noise=GaussianNoise(0.5)) as model:
        first = by_position(capture(model, lambda: model(ids)))
        in_pieces = by_position(capture(model, lambda: two_calls(model, ids)))
        asked_anew = by_position(
            capture(model, lambda: model.generate(ids, max_new_tokens=4, use_cache=False, pad_token_id=0))
        )
    # In batches of other shapes states differ in their last bits, and may so come to the next step of the noise's grid.
    for position in range(12):
        torch.testing.assert_close(in_pieces[0, position], first[0, position], atol=0.01, rtol=0)
        torch.testing.assert_close(asked_anew[0, position], first[0, position], atol=0.01, rtol=0)


def two_calls(model: Any, ids: torch.Tensor) -> None:
    cache = model.new_cache()
    model(ids[:, :5], past_key_values=cache)
    model(ids[:, 5:], past_key_values=cache)
